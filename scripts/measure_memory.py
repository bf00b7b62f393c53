"""Compare the memory plan with measurements on a GPU, at full size with zero weights.

    python scripts/measure_memory.py --config_path configs/wan2.1_t2v_1.3b_12gb.yaml --card 12
    python scripts/measure_memory.py --config_path configs/wan2.1_t2v_1.3b.yaml --json memory.json
    python scripts/measure_memory.py --card 12 inference.{student,text_encoder}=stream inference.decode_frames=1
    python scripts/measure_memory.py --card 24 inference.text_int8=true inference.decode_frames=1

The third command is `--low_memory`, the smallest setting with the VAE. No files are needed: weights are zeros in the
published sizes. --card limits torch's allocator to that many GiB minus the driver's share, so a run that would not fit
such a GPU fails. The memory that the allocator reserves, fragmentation included, is printed last; other programs on the
GPU are not counted. The exit code is 1 if a phase differs from the plan by more than 10%.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits

exits.guard(__name__)

import torch

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from model.memory import CONTEXT, GIB, inference_plan
from model.sizes import TRANSFORMER_SIZES
from model.text import TextEncoder, word_tokenizer
from model.weights.random import random_codec, random_transformer, random_umt5
from pipeline.diagonal import DiagonalPipeline
from pipeline.networks import load_device, text_load_device
from utils.files import check_file, write_json_atomic

PROMPT = "a red circle moves right"
TOLERANCE = 0.1
Probe = Callable[[], int]  # peak bytes allocated since the last call


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = exits.Parser(prog="scripts/measure_memory.py", description=__doc__, formatter_class=form)
    parser.add_argument("--config_path", default="configs/wan2.1_t2v_1.3b.yaml", metavar="FILE")
    parser.add_argument("--student", choices=TRANSFORMER_SIZES, default="1.3B", help="sizes of the student")
    parser.add_argument("--chunks", type=int, default=6, help="to generate; the window is full after four")
    parser.add_argument("--card", type=float, metavar="GIB", help="limit the allocator as on a GPU with so many GiB")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="any value of configs/schema.py")
    args = parser.parse_intermixed_args(argv)
    if args.json:
        check_file(args.json, "--json")
    return args


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
    if not torch.cuda.is_available():
        raise UserError("memory is measured on a GPU and there is none; `python scripts/doctor.py` prints the plan")
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory
    if args.card:
        torch.cuda.set_per_process_memory_fraction(min(1.0, (args.card * GIB - CONTEXT) / total), device)
    held: list[int] = []
    probe = gpu_probe(device, held)
    most = run_phases(build(config, args.student, device, torch.bfloat16), args.chunks, probe)
    plan = inference_plan(config, TRANSFORMER_SIZES[args.student])
    rows = {phase.name: (int(sum(phase.parts.values())), most[phase.name]) for phase in plan.phases}
    probe()
    off = {name: planned / measured - 1 for name, (planned, measured) in rows.items()}
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, {config.name}")
    for name, (planned, measured) in rows.items():
        print(f"{name:<16}planned {planned / 1e9:7.2f} GB  measured {measured / 1e9:7.2f} GB  {off[name]:+.1%}")
    room = plan.peak.total - CONTEXT
    print(f"{'allocator':<16}planned {room / 1e9:7.2f} GB  held     {max(held) / 1e9:7.2f} GB")
    if args.json:
        figures = {name: {"planned": p, "measured": m} for name, (p, m) in rows.items()}
        write_json_atomic(args.json, {"config": config.name, "card": args.card, "phases": figures, "held": max(held)})
    return int(any(abs(error) > TOLERANCE for error in off.values()))


if __name__ == "__main__":
    exits.run(main)
