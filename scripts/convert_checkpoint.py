"""Convert a Wan transformer between formats; can merge LoRA.

    python scripts/convert_checkpoint.py checkpoints/self_forcing_dmd.pt students/self_forcing          # to our format
    python scripts/convert_checkpoint.py students/self_forcing self_forcing.pt                          # and back
    python scripts/convert_checkpoint.py wan_models/Wan2.1-T2V-14B teachers/14b --to diffusers
    python scripts/convert_checkpoint.py longlive_base.pt student --lora lora.pt                        # merged
    python scripts/convert_checkpoint.py logs/train_tiny_distill student --use_ema     # of a run's newest checkpoint
    python scripts/convert_checkpoint.py --tensors_only other.pt tensors.pt       # drops Python objects, runs no code

Without --dtype and --lora, values are unchanged bit for bit. Tensors are memory-mapped and streamed, so only one is in
memory at a time. Writing a .pt temporarily needs twice its size on disk.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits

exits.guard(__name__)

from configs.errors import UserError
from utils.machine import free_space
from utils.progress import progress_bar

FORMATS = ("ours", "diffusers", "wan", "self-forcing")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = exits.Parser(prog="scripts/convert_checkpoint.py", description=__doc__, formatter_class=form)
    parser.add_argument("source", metavar="IN", help="file or folder of any format that loads")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder, or a .pt")
    parser.add_argument("--to", choices=FORMATS, help="default: self-forcing for a .pt, else ours")
    parser.add_argument("--part", choices=("student", "critic"), default="student", help="of a training checkpoint")
    parser.add_argument("--use_ema", action="store_true", help="use the averaged weights")
    parser.add_argument("--lora", action="append", default=[], metavar="PATH", help="merge this adapter; repeatable")
    parser.add_argument("--lora_scale", action="append", type=float, default=[], metavar="X", help="of each --lora")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: unchanged")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT: a .pt, or a folder of form ours")
    parser.add_argument("--tensors_only", action="store_true", help="a .pt with objects to a .pt of its tensors")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.out.exists() and not args.overwrite:
        raise UserError(f"OUT={args.out} exists; give --overwrite to replace it, or another name")
    if args.out.resolve() == Path(args.source).resolve():
        raise UserError(f"OUT={args.out} is what is read; give another name")
    return strip_objects(args) if args.tensors_only else convert(args)


def strip_objects(args: argparse.Namespace) -> int:
    import torch

    from model.weights.export import read_tensors_only
    from utils.files import atomic_path, replaceable_file

    if args.out.suffix != ".pt" or not Path(args.source).is_file():
        raise UserError(f"--tensors_only takes a file and makes a .pt, and not {args.source} and {args.out}")
    with atomic_path(replaceable_file(args.out, "OUT")) as temporary:
        torch.save(read_tensors_only(Path(args.source)), temporary)
    print(f"{args.out}: the tensors of {args.source}")
    return 0


def convert(args: argparse.Namespace) -> int:
    import torch
    from diffusers import WanTransformer3DModel

    from model.weights import export
    from model.weights.files import PICKLES
    from model.weights.lora import plan_lora
    from model.weights.plans import has_ema, plan_transformer, transformer_config
    from utils.files import replaceable, replaceable_file

    form = args.to or ("self-forcing" if args.out.suffix == ".pt" else "ours")
    if form != "self-forcing" and args.out.suffix in (".safetensors", *PICKLES):
        raise UserError(f"OUT={args.out} is the name of a file, and {form} is a folder; leave the ending out")
    scales = args.lora_scale or [1.0] * len(args.lora)
    if len(scales) != len(args.lora):
        raise UserError(f"--lora_scale was given {len(scales)} times for {len(args.lora)} adapters; give one for each")
    plan = plan_transformer("IN", args.source, WanTransformer3DModel, args.part, use_ema=args.use_ema)
    loras = [
        (plan_lora(path, plan.tensors.shapes, "--lora"), scale)
        for path, scale in zip(args.lora, scales, strict=True)
    ]
    if form == "self-forcing":
        replaceable_file(args.out, "OUT")
    else:
        replaceable(args.out, "OUT", keep=[args.source])
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, None: None}[args.dtype]
    weights, ema = export.lazy_tensors(plan, loras, dtype), None
    both = form in ("ours", "self-forcing") and args.part == "student" and not args.use_ema and not loras
    if both and has_ema("IN", args.source):
        averaged = plan_transformer("IN", args.source, WanTransformer3DModel, use_ema=True)
        ema = export.lazy_tensors(averaged, (), dtype)
    size = sum(tensor.size for part in (weights, ema or {}) for tensor in part.values())
    check_space(args.out, size * (2 if form == "self-forcing" else 1))
    with progress_bar(args.out.name, size, "B") as bar:
        export.write(
            form,
            args.out,
            weights,
            transformer_config(plan),
            ema=ema,
            card=card_of(plan.card, args),
            part="critic" if args.part == "critic" else "generator",
            done=bar.update,
        )
    merged = f", {len(loras)} LoRA merged" * bool(loras)
    averages = ", with averaged weights" if ema is not None else ""
    print(f"{args.out}: {form}, {len(weights)} tensors, {size / 1e9:.2f} GB{averages}{merged}, from {plan.kind}")
    return 0


def card_of(card: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The card of the source, with the merged adapters."""
    merged = [{"file": Path(path).name} for path in args.lora]
    return dict(card) | ({"merged_lora": merged} if merged else {})


def check_space(out: Path, size: int) -> None:
    """Raise a UserError if the disk is too small."""
    free = free_space(out.absolute().parent)
    if free < size:
        raise UserError(f"OUT={out} needs {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there; make room")


if __name__ == "__main__":
    exits.run(main)
