"""Precompute the prompt embeddings of a training run, which then needs no text encoder.

    python scripts/encode_prompts.py --config_path configs/train_wan2.1_t2v_1.3b.yaml --output_folder prompts/encoded
    torchrun --nproc_per_node 8 scripts/encode_prompts.py --config_path ... --output_folder prompts/encoded
    bash training.sh --config_path configs/train_wan2.1_t2v_1.3b.yaml training.distill.encoded_prompts=prompts/encoded

All prompts of the run are encoded: for training, validation and pairs, and the negative prompt. Existing files are
kept, so the command can be stopped and restarted, with any number of processes, also on several machines that share a
file system. In bfloat16 a prompt takes 2 x 4096 bytes per token, without padding: 250,000 prompts of 150 tokens take
300 GB. File format: model/encoded_manifest.py.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import exits

exits.guard(__name__)


def parse(argv=None) -> argparse.Namespace:
    parser = exits.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/train_tiny_distill.yaml", help="of the run (%(default)s)")
    parser.add_argument("--output_folder", required=True)
    parser.add_argument("--caption_path", help="prompts, one a line (default: what the configuration trains on)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                        help="on disk; auto = the dtype of training.precision, without loss")  # fmt: skip
    parser.add_argument("--compute", choices=("float32", "bfloat16"), default="float32",
                        help="of the encoder; float32 as in training (23 GB, UMT5-XXL)")  # fmt: skip
    parser.add_argument("--stream", action="store_true", help="encoder on the host, one block at a time on the GPU")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="as for the run")
    return parser.parse_intermixed_args(argv)


def main(argv=None) -> int:
    args = parse(argv)

    import torch

    from configs.load import load_config
    from model.encoded_text import EncodingJob, encoder_hash, unpadded_embeddings
    from model.fast.offload import OffloadedTextEncoder
    from model.weights.files import resolve_path
    from model.weights.load import load_text_encoder
    from trainer.prompt_bank import prompt_groups
    from utils.device import DTYPES, pick_device, pick_dtype
    from utils.distributed import Ranks
    from utils.files import check_writable, sha256_of
    from utils.progress import progress_bar

    given = [f"training.distill.prompts={json.dumps(args.caption_path)}", "training.open_captions=0"]
    extra = [] if args.caption_path is None else given
    config, ranks = load_config(args.config_path, [*extra, *args.settings]), Ranks.from_env()
    folder = check_writable(args.output_folder, "--output_folder")
    folder.mkdir(parents=True, exist_ok=True)
    device, model = pick_device(config.device, ranks.local_rank), config.model
    torch.set_float32_matmul_precision("high")  # as in training
    wide = pick_dtype(config.training.precision, device) == torch.float32
    dtype = ("float32" if wide else "bfloat16") if args.dtype == "auto" else args.dtype

    load_on = torch.device("cpu") if args.stream else device
    encoder = load_text_encoder(model.text_encoder, model.tokenizer, model.text_tokens, load_on, DTYPES[args.compute])
    encoder.encoder.requires_grad_(False)
    file = config.training.distill.prompts
    about = {"encoder": encoder_hash(model), "encoder_path": model.text_encoder, "prompts_file": file}
    about["prompts_file_sha256"] = None if file is None else sha256_of(resolve_path(file))
    sizes = {"text_tokens": model.text_tokens, "dim": encoder.dim, "dtype": dtype}
    job = EncodingJob(folder, prompt_groups(config), **sizes, about=about)
    encode = OffloadedTextEncoder(encoder, device, stream=True) if args.stream else encoder
    mine = [index for index in ranks.share(range(len(job.files))) if not job.done(index)]
    with progress_bar("encoding prompts", len(mine), "file", disable=None if ranks.first else True) as bar:
        for index in mine:
            job.write(index, lambda prompts: unpadded_embeddings(encode, prompts, DTYPES[dtype]))
            bar.update()
    if job.finish():
        print(f"{len(job.prompts):,} prompts in {folder}; train with training.distill.encoded_prompts={folder}")
    return 0


if __name__ == "__main__":
    exits.run(main)
