"""Compare the memory plan with measurements on a GPU, at full size with zero weights. Or measure the host memory that
loading takes.

    python scripts/measure_memory.py --config_path configs/wan2.1_t2v_1.3b_12gb.yaml --card 12
    python scripts/measure_memory.py --config_path configs/wan2.1_t2v_1.3b.yaml --json memory.json
    python scripts/measure_memory.py --card 12 inference.{student,text_encoder}=stream inference.decode_frames=1
    python scripts/measure_memory.py --card 24 inference.text_int8=true inference.decode_frames=1
    python scripts/measure_memory.py --network 1.3B                   # one training pass of a network, checkpointed
    python scripts/measure_memory.py --host 14B                       # loading six shards of 57 GB; --to cpu, cuda

The third command is `--low_memory`, the smallest setting with the VAE. No files are needed: weights are zeros in the
published sizes. --card limits torch's allocator to that many GiB minus the driver's share, so a run that would not fit
such a GPU fails. The memory that the allocator reserves, fragmentation included, is printed last; other programs on the
GPU are not counted. The exit code is 1 if a phase differs from the plan by more than 10%, or if loading takes more host
memory than 1.3 times the size of the files. The files of --host are sparse: they have the published sizes and names,
and take no space on most disks.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits

exits.guard(__name__)

import torch
from diffusers import WanTransformer3DModel

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from model.checkpointing import selective_checkpoint
from model.memory import CONTEXT, GIB, graph_bytes, inference_plan
from model.sizes import TRANSFORMER_SIZES, TransformerSize
from model.text import TextEncoder, word_tokenizer
from model.weights.load import load_score
from model.weights.names import original_config, original_name
from model.weights.random import random_codec, random_transformer, random_umt5
from pipeline.diagonal import DiagonalPipeline
from pipeline.networks import load_device, text_load_device
from scripts.bench.host_peak import HostPeak
from utils.device import pick_device
from utils.files import write_json_atomic

PROMPT = "a red circle moves right"
TOLERANCE = 0.1
HOST_LIMIT = 1.3  # times the files
Probe = Callable[[], int]  # peak bytes allocated since the last call


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = exits.Parser(prog="scripts/measure_memory.py", description=__doc__, formatter_class=form)
    parser.add_argument("--config_path", default="configs/wan2.1_t2v_1.3b.yaml", metavar="FILE")
    parser.add_argument("--student", choices=TRANSFORMER_SIZES, default="1.3B", help="sizes of the student")
    parser.add_argument("--chunks", type=int, default=6, help="to generate; the window is full after four")
    parser.add_argument("--card", type=float, metavar="GIB", help="limit the allocator as on a GPU with so many GiB")
    parser.add_argument(
        "--network", choices=TRANSFORMER_SIZES, help="instead: forward and backward pass of one network over one clip"
    )
    parser.add_argument("--host", choices=TRANSFORMER_SIZES, help="instead: host memory of loading such a network")
    parser.add_argument("--to", choices=("cpu", "cuda"), help="device of --host, in bfloat16 (default: a GPU)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="any value of configs/schema.py")
    return parser.parse_intermixed_args(argv)


def build(config: Config, size: str, device: torch.device, dtype: torch.dtype) -> DiagonalPipeline:
    """The pipeline that `DiagonalPipeline.from_config` would build, with zero weights."""
    places = config.inference
    student = random_transformer(size, load_device(places.student, device), dtype, causal=True, seed=None)
    encoder = random_umt5(size, text_load_device(places, device), dtype, seed=None)
    text = TextEncoder(encoder, word_tokenizer(PROMPT.split()), config.model.text_tokens)
    return DiagonalPipeline.from_parts(config, student, random_codec(config, size, device, dtype), text, device)


def run_phases(pipe: DiagonalPipeline, chunks: int, probe: Probe) -> dict[str, int]:
    """Peak bytes in each phase of the plan."""
    session, most = pipe.session, {"encode prompt": 0, "denoise": 0, "decode": 0}
    make_stream = session.codec.stream

    def note(phase: str) -> None:
        most[phase] = max(most[phase], probe())

    def stream():
        note("encode prompt")  # a decoder is created after the prompt is encoded and before the cache
        inner = make_stream()
        decode = inner.decode

        def watched(latents):
            note("denoise")
            pixels = decode(latents)
            note("decode")
            return pixels

        inner.decode = watched
        return inner

    session.codec.stream = stream
    probe()
    for result in session.play(PROMPT, 0, chunks):
        result.wait()
    return most


def run_network(size: str, frames: int, probe: Probe, device: torch.device) -> tuple[int, int]:
    """(planned, measured) bytes of activations in a pass with a graph over one clip of 480x832, checkpointed."""
    model = random_transformer(size, device, torch.bfloat16, causal=False, seed=None)
    model.enable_gradient_checkpointing(selective_checkpoint)
    model.train().requires_grad_(True)
    latents = torch.zeros(1, 16, frames, 60, 104, device=device, dtype=torch.bfloat16)
    text = torch.zeros(1, 512, 4096, device=device, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = probe()
    out = model(latents, torch.zeros(1, device=device), text, return_dict=False)[0]
    out.float().square().mean().backward()
    return graph_bytes(TRANSFORMER_SIZES[size], frames * 1560, True), probe() - before


def sparse_folder(folder: Path, network: TransformerSize, shards: int = 6, kind: str = "F32") -> int:
    """Write an original Wan folder of sparse files, all zeros; returns their size in bytes."""
    with torch.device("meta"):
        model = WanTransformer3DModel(**network.config)
    shapes = {original_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    (folder / "config.json").write_text(json.dumps(original_config(model.config)), encoding="utf-8")
    each, total, places = -(-len(shapes) // shards), 0, {}
    for i in range(shards):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors"
        header, end = {}, 0
        for name in [*shapes][i * each : (i + 1) * each]:
            size = torch.Size(shapes[name]).numel() * {"F32": 4, "BF16": 2}[kind]
            header[name] = {"dtype": kind, "shape": shapes[name], "data_offsets": [end, end := end + size]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
        places |= dict.fromkeys(header, file)
        total += end
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}), encoding="utf-8")
    return total


def run_host(network: TransformerSize, device: torch.device, folder: Path) -> tuple[int, HostPeak]:
    """Bytes of the files, and the host memory that loading them to `device` in bfloat16 takes."""
    total = sparse_folder(folder, network)
    torch.zeros(1, device=device)  # CUDA's own memory is not the loader's
    with HostPeak() as peak:
        load_score(folder, device, torch.bfloat16)
    return total, peak


def report_host(name: str, device: torch.device, to_json: Path | None) -> int:
    with tempfile.TemporaryDirectory(prefix="sparse-") as folder:
        total, peak = run_host(TRANSFORMER_SIZES[name], device, Path(folder))
    print(f"loading {name} to {device}, files of {total / 1e9:.2f} GB")
    print(f"host memory of its own, at most   {peak.own / 1e9:7.2f} GB  {peak.own / total:.2f} of the files")
    print(f"pages of the files, at most       {peak.files / 1e9:7.2f} GB  which the kernel may drop")
    if to_json:
        write_json_atomic(to_json, {"host": name, "to": str(device), "files": total, "own": peak.own})
    return int(peak.own > HOST_LIMIT * total)


def gpu_probe(device: torch.device, held: list[int]) -> Probe:
    """A probe that also appends the peak bytes reserved by the allocator to `held`."""

    def probe() -> int:
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        held.append(torch.cuda.max_memory_reserved(device))
        torch.cuda.reset_peak_memory_stats(device)
        return peak

    return probe


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    config = load_config(args.config_path, args.settings)
    if args.host:
        return report_host(args.host, pick_device(args.to or "auto"), args.json)
    if not torch.cuda.is_available():
        raise UserError("memory is measured on a GPU and there is none; `python scripts/doctor.py` prints the plan")
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory
    if args.card:
        torch.cuda.set_per_process_memory_fraction(min(1.0, (args.card * GIB - CONTEXT) / total), device)
    held: list[int] = []
    probe = gpu_probe(device, held)
    if args.network:
        planned, measured = run_network(args.network, config.video.num_latent_frames, probe, device)
        rows, room = {"activations": (planned, measured)}, None
    else:
        network = TRANSFORMER_SIZES[args.student]
        most = run_phases(build(config, args.student, device, torch.bfloat16), args.chunks, probe)
        plan = inference_plan(config, network)
        rows = {phase.name: (int(sum(phase.parts.values())), most[phase.name]) for phase in plan.phases}
        room = plan.peak.total - CONTEXT
    probe()
    off = {name: planned / measured - 1 for name, (planned, measured) in rows.items()}
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {config.name}")
    for name, (planned, measured) in rows.items():
        print(f"{name:<16}planned {planned / 1e9:7.2f} GB  measured {measured / 1e9:7.2f} GB  {off[name]:+.1%}")
    figure = f"planned {room / 1e9:7.2f} GB  " if room else ""
    print(f"{'allocator':<16}{figure}held     {max(held) / 1e9:7.2f} GB")
    if args.json:
        figures = {name: {"planned": p, "measured": m} for name, (p, m) in rows.items()}
        write_json_atomic(args.json, {"config": config.name, "card": args.card, "phases": figures, "held": max(held)})
    return int(any(abs(error) > TOLERANCE for error in off.values()))


if __name__ == "__main__":
    exits.run(main)
