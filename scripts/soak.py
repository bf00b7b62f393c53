"""A soak test of training: whether memory grows, whether steps become slower, and whether resuming is exact.

    python scripts/soak.py --gpus 2 --config_path configs/train_wan2.1_t2v_1.3b.yaml video.num_latent_frames=15
    python scripts/soak.py --gpus 2 --cycles 12 --every 3 --student tiny/1 --teacher tiny/1 --critic tiny/1 device=cpu

Trains a distillation with random networks (by default two layers of full width) for --cycles cycles. A cycle is one
generator update and its critic updates; validation, a checkpoint and the export follow every --every cycles. The last
--every cycles are then repeated from the checkpoint before them.

Bounds: from the first third of the cycles to the last third, the median memory of rank 0 may grow by 1% and the median
time of a step by 3%. The first two cycles do not count, and times of cycles that begin with saving do not either.
Losses after resuming may differ by 2% in bfloat16, because a GPU does not add in a fixed order, and by 0.01% in
float32.
"""

import argparse
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import exits

exits.guard(__name__)

import torch

from configs.errors import UserError
from configs.load import load_config
from model.weights.parts import TRANSFORMERS
from model.weights.random import transformer_sizes
from scripts.bench.random_prompts import random_prompts
from trainer.loop import METRICS, history, run
from trainer.registry import build_stage
from utils.device import pick_device, pick_dtype, set_threads
from utils.distributed import Ranks, process_group
from utils.files import check_file, check_writable, write_json_atomic
from utils.logs import JsonlSink, console
from utils.tables import aligned

FULL = {"student": "1.3B/2", "teacher": "14B/2", "critic": "1.3B/2"}
MEMORY = {"allocated": 0.01, "reserved": 0.01, "host": 0.01}  # growth that is allowed
DRIFT = 0.03
LOSSES = ("generator_loss", "critic_loss")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = exits.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/train_tiny_distill.yaml", metavar="FILE")
    parser.add_argument("--gpus", type=int, default=1, help="processes (1)")
    parser.add_argument("--cycles", type=int, default=60, help="(60)")
    parser.add_argument("--every", type=int, default=10, help="cycles between checkpoints, a divisor of --cycles (10)")
    for role in TRANSFORMERS:
        parser.add_argument(f"--{role}", metavar="SIZE", default=FULL[role], help=f"({FULL[role]})")
    parser.add_argument("--folder", type=Path, default=Path("logs/soak"), help="working folder, removed at the end")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results to this file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="any value of configs/schema.py")
    args = parser.parse_intermixed_args(argv)
    if args.json:
        check_file(args.json, "--json")
    if args.gpus < 1:
        raise UserError(f"--gpus={args.gpus} is below 1; give the number of processes")
    if args.every < 2 or args.cycles % args.every or args.cycles < 3 * args.every:
        raise UserError(f"--cycles={args.cycles} is not 3 or more times --every={args.every}; try 60 and 10")
    return args


class Meter(JsonlSink):
    """The metrics of a run, with the memory of this process in bytes."""

    def write(self, step: int, **values: Any) -> None:
        held = {}
        if "seconds_per_step" in values:
            status = Path("/proc/self/status").read_text()
            held["host"] = 1024 * int(status.split("RssAnon:")[1].split()[0])
            if torch.cuda.is_available():
                held |= {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
        super().write(step, **values, **held)


class WarningRecorder(logging.Handler):
    """Collects the warnings of the run."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def worker(file: Path) -> int:
    """One rank of one run."""
    spec = json.loads(file.read_text())
    ranks, logdir, recorder = Ranks.from_env(), Path(spec["logdir"]), WarningRecorder()
    console(quiet=True)
    logging.getLogger("diagonal").addHandler(recorder)
    config = load_config(spec["config_path"], spec["settings"])
    device = pick_device(config.device, ranks.local_rank)
    torch.set_float32_matmul_precision("high")  # as train.py does
    torch.backends.cudnn.benchmark = True
    set_threads(0)
    with process_group(ranks, device, config.training.timeout_s):
        stage = build_stage(config, device, ranks)
        run(stage, logdir, lambda start: [Meter(logdir / METRICS, resume_step=start)])
        if ranks.first:
            half = pick_dtype(config.training.precision, device) != torch.float32
            write_json_atomic(logdir / "warnings.json", {"warnings": recorder.messages, "bfloat16": half})
    return 0


def start(args: argparse.Namespace, settings: Sequence[str], logdir: Path) -> None:
    """Run a training in `logdir` to its end. Raises UserError with the end of its log if it fails."""
    file, log = logdir.with_suffix(".spec"), logdir.with_suffix(".log")
    file.write_text(json.dumps({"config_path": args.config_path, "settings": list(settings), "logdir": str(logdir)}))
    program = [str(Path(__file__).resolve()), "--worker", str(file)]
    if args.gpus > 1:
        program = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.gpus}", *program]
    with log.open("w") as stream:
        code = subprocess.run([sys.executable, *program], stdout=stream, stderr=stream).returncode
    if code:
        raise UserError(f"the run in {logdir} ended with code {code}: {log.read_text()[-2000:]}")


def growth(rows: Sequence[dict[str, Any]], key: str) -> tuple[float, float, float]:
    """Median of the first third of the rows, median of the last third, and the relative change."""
    values, third = [row[key] for row in rows], max(1, len(rows) // 3)
    first, last = median(values[:third]), median(values[-third:])
    return first, last, last / first - 1 if first else 0.0


def steadiness(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """(first, last, relative change, bound) of memory and time. rows: one for each cycle; the first two warm up."""
    warm = rows[2:]
    changes = {name: (*growth(warm, name), limit) for name, limit in MEMORY.items() if name in warm[0]}
    return changes | {"seconds a step": (*growth(warm, "seconds_per_step"), DRIFT)}


def exactness(rows: Sequence[dict[str, Any]], again: Sequence[dict[str, Any]], bound: float) -> dict[str, Any]:
    """(last loss, the same after resuming, largest relative difference, bound) of each loss. again: repeated rows."""
    differences = {}
    for name in LOSSES:
        pairs = [(a[name], b[name]) for a, b in zip(rows[-len(again) :], again, strict=True)]
        differences[f"{name}, resumed"] = (*pairs[-1], max(abs(b - a) / max(abs(a), 1e-12) for a, b in pairs), bound)
    return differences


def table(results: dict[str, Any]) -> str:
    rows = [["", "first", "last", "change", "bound"]]
    for name, (first, last, share, limit) in results.items():
        rows.append([name, f"{first:.6g}", f"{last:.6g}", f"{share:+.2%}", f"{limit:.2%}"])
    return aligned(rows)


def course(rows: Sequence[dict[str, Any]], every: int) -> str:
    """Medians between checkpoints, one line each."""
    names = [*(name for name in MEMORY if name in rows[0]), "seconds_per_step"]
    lines = [["after cycle", *names]]
    for start in range(0, len(rows), every):
        part = rows[start : start + every]
        lines.append([str(start), *(f"{median(row[name] for row in part):.6g}" for name in names)])
    return aligned(lines)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        return worker(args.worker)
    folder = check_writable(args.folder, "--folder")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--folder {folder} is not empty; name a new one")
    folder.mkdir(parents=True, exist_ok=True)
    ratio = load_config(args.config_path, args.settings).training.distill.dfake_gen_update_ratio
    init = ", ".join(f"{role}: random:{vars(args)[role]}" for role in TRANSFORMERS)
    steps = args.every * ratio
    settings = [
        f"training.steps={args.cycles * ratio}", f"training.checkpoint_every={steps}", "training.max_checkpoints=2",
        f"training.validate_every={steps}", "training.validation_clips=1", "training.distill.video_clips=1",
        f"training.log_every={ratio}", f"training.global_batch={args.gpus}", "training.micro_batch=1",
        f"training.sharding={'full' if args.gpus > 1 else 'none'}", "training.cuda_graphs=false",
        "training.distill.critic_warmup=0", "training.distill.encode_ahead=false", "training.distill.pairs=null",
        "training.export=null", "training.open_captions=0", "model.vae=assets/tiny/vae", f"training.init={{{init}}}",
        *args.settings,
    ]  # fmt: skip
    settings += random_prompts(args.config_path, settings, folder, transformer_sizes(args.student)["text_dim"])
    whole, again = folder / "whole", folder / "again"
    start(args, settings, whole)
    outcome, rows = json.loads((whole / "warnings.json").read_text()), history(whole)
    results = steadiness(rows)
    print(f"{args.cycles} cycles on {args.gpus} process{'es' * (args.gpus > 1)}; bytes, seconds\n{table(results)}\n")
    print(course(rows, args.every), end="\n\n")
    warnings = outcome["warnings"]
    print("\n".join(["warnings of the run:", *warnings]) if warnings else "no warnings", flush=True)
    if args.json:
        write_json_atomic(args.json, {"found": results, "warnings": warnings, "rows": rows})
    before = whole / f"checkpoint_{(args.cycles - args.every) * ratio:06d}"
    again.mkdir()
    shutil.copytree(before, again / before.name)
    start(args, settings, again)
    resumed = exactness(rows, history(again), 2e-2 if outcome["bfloat16"] else 1e-4)
    print(f"\nthe last {args.every} cycles, uninterrupted and resumed\n{table(resumed)}")
    results |= resumed
    if args.json:
        write_json_atomic(args.json, {"found": results, "warnings": warnings, "rows": rows})
    shutil.rmtree(folder)
    return int(any(share > limit for _, _, share, limit in results.values()))


if __name__ == "__main__":
    exits.run(main)
