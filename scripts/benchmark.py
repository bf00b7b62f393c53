"""Speed report of a configuration: times of a clip, its steps and parts, and the peak rates of the machine.

    python scripts/benchmark.py                                                     # the tiny model, on a CPU too
    python scripts/benchmark.py --config_path configs/wan2.1_t2v_1.3b.yaml --random_weights model.codec=taehv
    python scripts/benchmark.py --config_path configs/wan2.1_t2v_1.3b.yaml --json report.json
    python scripts/benchmark.py --suite h100 --json suite.json --budget 520         # many settings, a table last

Missing weights are replaced by random ones of the same sizes, with which speed and memory are the same; the report says
so. Figures are medians of --repeats runs after two warm-up runs. They do not include encoding of the prompt.
"""

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits

exits.guard(__name__)

import torch
from torch import Tensor

from configs.errors import UserError
from configs.geometry import Geometry
from configs.load import load_config
from configs.schema import Config
from model import fp8
from model.denoiser import Student
from model.fast.offload import BlockOffload
from model.fast.student import FastPlan
from model.sizes import TRANSFORMER_SIZES, TransformerSize
from model.text import TextEncoder, word_tokenizer
from model.weights.load import check_weights
from model.weights.random import RandomTextEncoder, random_codec, random_transformer, random_umt5
from pipeline.diagonal import DiagonalPipeline
from pipeline.networks import build_student, load_device
from pipeline.sequence_parallel import ParallelStudent
from pipeline.stream import StreamSession
from scripts.bench import speed
from scripts.bench.roofline import machine_of, roofline
from scripts.bench.speed_suites import SUITES, Variant
from scripts.bench.speed_tables import suite_table, table
from utils.device import pick_device, pick_dtype, set_threads
from utils.files import check_file, write_json_atomic
from utils.logs import console

# errors of settings that do not work on this machine; the suite continues with the next variant
FAILURES = (RuntimeError, UserError, ImportError, AssertionError, ValueError, TypeError, AttributeError, LookupError)
LONGEST = 60.0  # seconds that a variant takes at most, with cold caches


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = exits.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/tiny.yaml", metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--random_weights", action="store_true", help="in the published sizes; no files are read")
    parser.add_argument("--network", choices=("tiny", *TRANSFORMER_SIZES), help="sizes of random weights")
    parser.add_argument("--repeats", type="positive", default=5, help="clips that are timed (default: %(default)s)")
    parser.add_argument("--batch", type="positive", default=1, metavar="N", help="streams at once (%(default)s)")
    parser.add_argument("--text", action="store_true", help="also measure text encoding (11 GB more at full size)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report to this file")
    parser.add_argument("--suite", choices=SUITES, help="run all variants of a suite")
    parser.add_argument("--only", default="", metavar="A,B", help="run only these variants of the suite")
    parser.add_argument("--budget", type=float, default=520, help="seconds for a suite (default: %(default)s)")
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="any value of configs/schema.py")
    args = parser.parse_intermixed_args(argv)
    if args.budget <= 0:
        raise UserError(f"--budget {args.budget:g} is no time; give seconds, more than 0")
    known = [variant.name for variant in SUITES[args.suite]] if args.suite else []
    for name in filter(None, args.only.split(",")):
        if name not in known:
            raise UserError(f"--only {name} is no variant of --suite {args.suite}; use some of {', '.join(known)}")
    if args.json:
        check_file(args.json, "--json")
    return args


@dataclass
class BenchmarkSession:
    """A session to be measured, with its fast plan and weights."""

    session: StreamSession
    plan: FastPlan
    weights: str
    text: Any  # the text encoder without its cache, or None
    layer_errors: dict[str, float]


class CachedTextEncoder:
    """A text encoder with a cache, so that timed clips start from an embedding that is already computed."""

    def __init__(self, encode):
        self._encode = encode
        self._known: dict[tuple[str, ...], Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        key = tuple(prompts)
        if key not in self._known:
            self._known[key] = self._encode(prompts)
        return self._known[key]


def build(config: Config, args: argparse.Namespace) -> BenchmarkSession:
    """The networks in `config`, or random ones of their sizes, prepared as by the pipeline."""
    device = pick_device(config.device)
    plan = FastPlan.from_config(config.inference, device)
    dtype = pick_dtype(config.inference.precision, device)
    if not args.random_weights and not args.network:
        try:
            check_weights(config.model)
        except UserError as error:
            print(f"random weights, because {error}")
        else:
            made = DiagonalPipeline.from_config(config).session
            session = _session(made.student, made.codec, made.text_encoder, config)
            return BenchmarkSession(session, plan, "as configured", made.text_encoder, {})
    size = args.network or ("tiny" if config.model.student.startswith("assets/tiny") else "1.3B")
    model = random_transformer(size, load_device(config.inference.student, device), dtype, causal=True)
    if config.inference.student == "stream":
        BlockOffload(model, device)
    errors = layer_errors(model, config) if plan.fp8 else {}
    codec = random_codec(config, size, device, dtype)
    text, encode = None, RandomTextEncoder(config.model.text_tokens, model.config.text_dim, device)
    if args.text:
        encoder = random_umt5(size, device, dtype)
        text = TextEncoder(encoder, word_tokenizer(speed.PROMPT.split()), config.model.text_tokens)
    session = _session(*build_student(config, model, codec, plan, device), encode, config)
    return BenchmarkSession(session, plan, f"random, {size}", text, errors)


def _session(student: Student, codec, encode, config: Config) -> StreamSession:
    return StreamSession.from_config(config, student, codec, CachedTextEncoder(encode))


@torch.no_grad()
def layer_errors(model, config: Config) -> dict[str, float]:
    """Relative error of each float8 linear of the middle block, for its inputs in a first step."""
    geometry = Geometry.from_config(config).for_network(model.config)
    middle = len(model.blocks) // 2
    block, inputs, handles = model.blocks[middle], {}, []
    linears = {n: m for n, m in block.named_modules() if n in fp8.LINEARS and type(m) is torch.nn.Linear}
    for name, linear in linears.items():
        handles.append(linear.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0]})))
    place = {"device": model.device}
    latents = torch.randn(geometry.latent_shape(1, geometry.chunk_frames), **place)
    text = torch.randn(1, config.model.text_tokens, model.config.text_dim, **place)
    model(latents, torch.full((1,), 500.0, **place), text)
    for handle in handles:
        handle.remove()
    errors = fp8.layer_errors(linears, inputs)
    return {f"block {middle} {name}": error for name, error in errors.items()}


def measure(config: Config, args: argparse.Namespace, rates: dict[str, float] | None = None) -> dict[str, Any]:
    """The report of a configuration; its tensor `latents` is not for JSON. rates: peak rates, if already measured."""
    torch._dynamo.reset()
    began = time.perf_counter()
    bench = build(config, args)
    session, device = bench.session, bench.session.device
    network = TransformerSize.from_config(session.student.model.config)
    built = time.perf_counter() - began
    chunks = session.geometry.num_chunks(config.video.num_latent_frames)
    first = speed.play(session, chunks, args.batch)
    report: dict[str, Any] = {
        "config": config.name,
        "weights": bench.weights,
        "machine": machine_of(device),
        "settings": {
            "size": [config.video.width, config.video.height],
            "frames": sum(first.frames),
            "batch": args.batch,
            "gpus": config.inference.sequence_parallel,
            "schedule": [list(session.schedule.timesteps(k)) for k in range(chunks)],
            "context": session.schedule.context,
            "window_frames": config.stream.window_frames,
            "codec": config.model.codec,
            "precision": config.inference.precision,
            "kernels": str(bench.plan.kernels) if not bench.plan.is_noop else f"{config.inference.attention} (plain)",
            "compile": bench.plan.compile,
            "cuda_graphs": bench.plan.cuda_graphs,
            "fused_gelu": bench.plan.fused_gelu,
            "fused_norms": bench.plan.fused_norms,
        },
        "build_s": built,
        "first_clip_s": first.arrivals[-1],  # compilation included
        "since_start_s": time.perf_counter() - START,  # of the process, to the end of its first clip
    }
    if bench.layer_errors:
        report["fp8_layer_errors"] = bench.layer_errors
    settings = {"chunks": chunks, "batch": args.batch, "repeats": args.repeats, "fps": config.video.fps}
    report |= speed.report(session, network, text_tokens=config.model.text_tokens, **settings)
    report |= speed.parts(session, args.batch)
    report["text_encoding_s"] = speed.text_seconds(bench.text, device) if bench.text else None
    tokens = args.batch * session.geometry.tokens_per_chunk
    report["ceilings"] = rates or roofline(device, tokens, network.dim, network.ffn)
    settings = {"batch": args.batch, "plan": bench.plan, "gpus": config.inference.sequence_parallel}
    report["steps"] = speed.efficiency(session, network, report, report["ceilings"], **settings)
    if isinstance(session.student, ParallelStudent):
        session.student.close()  # frees the GPUs for other variants
    return report


def plain(report: dict[str, Any]) -> dict[str, Any]:
    """The report without tensors."""
    return {key: value for key, value in report.items() if not isinstance(value, Tensor)}


def run_suite(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Reports of all variants of a suite, written as they finish. Variants for which no time is left are listed."""
    reports: dict[str, dict[str, Any]] = {}
    reference: Tensor | None = None
    latents: dict[str, Tensor] = {}
    rates = None
    wanted = set(filter(None, args.only.split(",")))
    for variant in SUITES[args.suite]:
        if wanted and variant.name not in wanted:
            continue
        left = args.budget - (time.perf_counter() - START)
        if left < min(LONGEST, args.budget / 4):
            reports[variant.name] = {"failed": f"skipped: {left:.0f} s were left"}
            continue
        began = time.perf_counter()
        report = run_variant(variant, args, rates)
        report["variant_s"] = time.perf_counter() - began
        rates = rates or (report.get("ceilings") if variant.standard else None)
        if "latents" in report:
            latents[variant.name] = report["latents"]
        if variant.reference:
            reference = report.get("latents")
        against = latents.get(variant.against) if variant.against else reference if variant.standard else None
        if against is not None and not variant.reference and "latents" in report:
            report["error_to_plain"] = float((report["latents"] - against).norm() / against.norm())
        reports[variant.name] = plain(report)
        print(suite_table({variant.name: reports[variant.name]}).splitlines()[-1], flush=True)
        if args.json:
            write_json_atomic(args.json, reports)
        gc.collect()  # reference cycles keep the session alive, and it would count in the next peak
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return reports


def run_variant(variant: Variant, args: argparse.Namespace, rates: dict[str, float] | None) -> dict[str, Any]:
    """The report of a variant, or its error."""
    mine = argparse.Namespace(**vars(args) | variant.arguments)
    try:
        config = load_config(variant.config, [*variant.settings, *args.settings])
        return measure(config, mine, rates if variant.standard else None)
    except FAILURES as error:
        words = str(error).splitlines()
        return {"failed": f"{type(error).__name__}: {words[0][:160] if words else ''}"}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    console()
    if args.suite:
        reports = run_suite(args)
        print(suite_table(reports))
        return int(all("failed" in report for report in reports.values()))
    config = load_config(args.config_path, args.settings)
    set_threads(config.cpu_threads)
    report = plain(measure(config, args))
    print(table(report))
    if args.json:
        write_json_atomic(args.json, report)
    return 0


if __name__ == "__main__":
    exits.run(main)
