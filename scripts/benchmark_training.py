"""Time a distillation cycle (a generator update and its critic updates) by phase, for several layouts of GPUs.

    python scripts/benchmark_training.py --layouts none:1 full:2 sequence:2 device=cpu              # tiny, on a CPU too
    python scripts/benchmark_training.py --config_path configs/train_wan2.1_t2v_1.3b.yaml --fake_ranks 64

At full size, each in under 10 minutes: on 2 GPUs of 140 GB, limited to 80 GB except for the baseline, which does not
fit; equality of results on them; on 4 GPUs; and on one GPU of 80 GB:

    python scripts/benchmark_training.py --config_path configs/train_wan2.1_t2v_1.3b.yaml \\
      --json two.json --budget 590 --save logs --layouts full:2 sequence:2 none:1,card=140
    python scripts/benchmark_training.py --config_path configs/train_wan2.1_t2v_1.3b.yaml \\
      --json equal.json --budget 300 --check_only --layouts full:2 sequence:2
    python scripts/benchmark_training.py --config_path configs/train_wan2.1_t2v_1.3b.yaml \\
      --json four.json --budget 520 --check --layouts full:4 sequence:4 sequence2:4 hybrid:4 full:2 none:1,card=140
    python scripts/benchmark_training.py --config_path configs/train_wan2.1_t2v_1.3b.yaml \\
      --json one.json --budget 520 --save logs --layouts none:1,teacher=1.3B \\
      none:1,training.distill.teacher_fp8=true,training.distill.fast_rollout=false

Weights are random, in the published sizes; prompts have random embeddings. scripts/bench/layouts.py has the syntax of
layouts. They run one after another in separate processes, and the reason is printed for those that do not work here.
The run ends within a few seconds of --budget, with tables of what was measured and a list of what was not. Layouts with
training.compile get a larger share of the budget. MFU is the FLOPs of the model (scripts/bench/training_cost.py),
without recomputation, divided by time and by the sustained matrix peak, measured under the card's power limit.

--check runs first and fills torch's compile cache. It trains networks with two layers of full width for three generator
and five critic updates, on N ranks and, with the same global batch, on one rank without compilation and fast rollouts.
Bounds in bfloat16: a value is rounded by up to 2^-9, and sums in another order differ by a few of these, so losses may
differ by 2% and gradient norms by 5%. The first steps of AdamW without momentum are lr x sign(gradient). Noise of
relative size e flips the sign of e / pi of the gradients, which changes those steps by twice their length, so the
weight changes differ by 2 sqrt(e / pi); the bound 0.3 means e = 7%. In float32 the bounds are 1e-4, 1e-3 and 2e-2.
"""

import argparse
import itertools
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START = time.time()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits

exits.guard(__name__)

import torch
from safetensors.torch import load_file

from configs.errors import UserError
from configs.load import load_config
from model.fp8 import check_fp8
from model.memory import start_of
from model.sizes import TRANSFORMER_SIZES, TransformerSize
from model.weights.parts import TRANSFORMERS
from model.weights.random import transformer_sizes
from scripts.bench import cycle_tables as tables
from scripts.bench.cycle import cap_memory, check, measure
from scripts.bench.layouts import ADAPTERS, Layout, advice, plan_table, project, sizes_of
from scripts.bench.random_prompts import random_prompts
from trainer.parallel.control_group import ControlGroup
from utils.device import pick_device, set_threads
from utils.distributed import Ranks, process_group
from utils.files import check_file, check_writable, write_json_atomic
from utils.logs import console

MIN_SECONDS = 20.0  # a layout is not started with less time left
CYCLE, COMPARED, COMPILED = 90.0, 30.0, 60.0  # estimated seconds: a layout at full size, a check, compilation
BOUNDS = {True: (2e-2, 5e-2, 0.3), False: (1e-4, 1e-3, 2e-2)}  # bfloat16 or not: losses, gradient norms, weights
PLAIN = ("training.compile", "training.distill.fast_rollout")  # disabled on the single rank of a check
LOSSES, NORMS = ("generator_loss", "critic_loss"), ("generator_grad_norm", "critic_grad_norm")
FIXED = (
    "training.validation_clips=0", "training.cuda_graphs=false", "training.loggers=[]", "training.distill.pairs=null",
    "training.distill.encode_ahead=false", "training.distill.critic_warmup=0", "training.export=null",
    "training.open_captions=0",
)  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = exits.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/train_tiny_distill.yaml", metavar="FILE")
    parser.add_argument("--layouts", nargs="+", default=[], metavar="KIND:GPUS", help="see scripts/bench/layouts.py")
    for role in TRANSFORMERS:
        parser.add_argument(f"--{role}", metavar="SIZE", help="tiny, 1.3B, 14B; 14B/2 for two of its layers")
    parser.add_argument("--card_gb", type=float, default=80, help="limit of the allocator in 1e9 bytes; 0 = none (80)")
    parser.add_argument("--budget", type=float, default=520, metavar="SECONDS", help="of the whole run (520)")
    parser.add_argument("--check", action="store_true", help="also compare layouts of several GPUs with one GPU")
    parser.add_argument("--check_only", action="store_true", help="only compare")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="also time a checkpoint in this folder")
    parser.add_argument("--fake_ranks", type=int, default=0, metavar="N", help="memory plans for N GPUs; needs none")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 16, 64], help="numbers to project to (8 16 64)")
    parser.add_argument("--global_batch", type=int, default=64, help="of the projected run (64)")
    parser.add_argument("--iterations", type=int, default=600, help="critic updates of the projected run (600)")
    parser.add_argument("--network_gb_s", type=float, default=50, help="assumed between machines, per GPU (50)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results to this file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="any value of configs/schema.py")
    args = parser.parse_intermixed_args(argv)
    if args.json:
        check_file(args.json, "--json")
    if not args.network_gb_s > 0:
        raise UserError(f"--network_gb_s={args.network_gb_s:g} is not above 0; give GB per second, or leave it out")
    given = [text for text in args.layouts if "=" in text.partition(",")[0]]  # settings that follow --layouts
    args.layouts = [Layout.parse(text) for text in args.layouts if text not in given]
    args.settings = [*args.settings, *given]
    return args


def worker(file: Path) -> int:
    """One rank of one layout."""
    spec = json.loads(file.read_text())
    ranks = Ranks.from_env()
    file.with_suffix(f".pid{ranks.rank}").write_text(str(os.getpid()))
    console(quiet=True)
    config = load_config(spec["config_path"], spec["settings"])
    device = pick_device(config.device, ranks.local_rank)
    if config.training.distill.teacher_fp8 and device.type == "cuda":
        check_fp8(device, "training.distill.teacher_fp8=true", "teacher_fp8=false")
    cap_memory(spec["card_gb"], device)
    torch.set_float32_matmul_precision("high")  # as train.py does
    torch.backends.cudnn.benchmark = True
    set_threads(config.cpu_threads, training=True)
    out = Path(spec["out"])
    with process_group(ranks, device, timeout_s=spec["limit"]):
        if spec["check"]:
            check(config, device, ranks, out)
        else:
            save = spec["save"] and Path(spec["save"])
            measure(config, device, ranks, out, spec["deadline"], ControlGroup(), save=save)
    return 0


@dataclass(frozen=True)
class Job:
    """A layout to run. batch: replaces its global batch. layers: number of layers for a check; 0 = no check."""

    layout: Layout
    batch: int | None = None
    layers: int = 0

    @property
    def key(self) -> tuple[str, int | None]:
        return self.layout.text, self.batch


class Benchmark:
    """Runs layouts one after another within the time limit."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder, self.began = args, folder, 0
        base = load_config(args.config_path, args.settings)
        tiny = base.model.student.startswith("assets/tiny")
        sources = {role: base.training.init.get(start_of(base.training, role), "") for role in TRANSFORMERS}
        named = {
            role: next((size for size in TRANSFORMER_SIZES if size.lower() in source.lower()), "1.3B")
            for role, source in sources.items()
        }
        self.sizes = {role: vars(args)[role] or ("tiny" if tiny else named[role]) for role in TRANSFORMERS}
        self.networks = sizes_of(self.sizes, TransformerSize.from_config(transformer_sizes("tiny")))
        self.training, self.micro = base.training, base.training.micro_batch
        dim = transformer_sizes(self.sizes["student"])["text_dim"]
        given = [*args.settings, *FIXED]
        self.text = [] if args.fake_ranks else [*FIXED, *random_prompts(args.config_path, given, folder, dim)]

    @property
    def left(self) -> float:
        return self.args.budget - (time.time() - START)

    def cost(self, job: "Job") -> float:
        """Estimated seconds of a job at full size, by which the budget is divided."""
        try:
            compiled = load_config(self.args.config_path, [*self.args.settings, *job.layout.settings]).training.compile
        except UserError:
            return 1.0  # fails immediately
        return (COMPARED if job.layers else CYCLE) + COMPILED * compiled

    def run(self, job: "Job", ahead: Sequence["Job"] = ()) -> dict[str, Any]:
        """Results of a job, or `why` there are none. ahead: jobs that follow."""
        self.began += 1
        layout, batch, layers = job.layout, job.batch, job.layers
        sizes = {**self.sizes, **layout.sizes}
        sizes = {role: f"{name.partition('/')[0]}/{layers}" for role, name in sizes.items()} if layers else sizes
        init = ", ".join(f"{role}: random:{name}" for role, name in sizes.items())
        steps = ["training.distill.dfake_gen_update_ratio=2"] if layers else []  # for rollout sharing
        settings = [*self.args.settings, *self.text, *steps, f"training.init={{{init}}}"]
        settings += layout.overrides(self.micro, batch)
        result: dict[str, Any] = {"layout": layout.text, "sizes": sizes, "whole": False}
        try:
            config = load_config(self.args.config_path, settings)
            on_gpus = pick_device(config.device).type == "cuda"
        except UserError as error:
            return result | {"why": f"refused: {error}"}
        if on_gpus and torch.cuda.device_count() < layout.gpus:
            return result | {"why": f"needs GPUs: {layout.gpus}; there are {torch.cuda.device_count()}"}
        full = sorted({name for name in sizes.values() if name in TRANSFORMER_SIZES})
        if full and not on_gpus:
            some = ", ".join(f"--{role} {sizes[role]}/2" for role in TRANSFORMERS if sizes[role] in full)
            return result | {"why": f"refused: {', '.join(full)} would take hours on a CPU; give {some}, or use GPUs"}
        if self.left < MIN_SECONDS:
            return result | {"why": f"left out: {max(0.0, self.left):.0f} s were left"}
        cost = self.cost(job)
        share = self.left * cost / (cost + sum(self.cost(one) for one in ahead))
        limit = min(self.left - 5, 2 * share + 20)
        out, card = self.folder / f"{self.began}.json", layout.card_gb
        spec = {"config_path": str(self.args.config_path), "settings": settings, "out": str(out), "limit": limit}
        spec["check"] = bool(layers)
        spec |= {"card_gb": self.args.card_gb if card is None else card}
        saved = self.args.save and self.args.save / f"benchmark-{secrets.token_hex(8)}"
        spec["save"] = saved and str(saved)
        spec["deadline"] = time.time() + min(1.2 * share, limit) - 10
        why = self._start(layout.gpus, spec, limit)
        if saved:
            shutil.rmtree(saved, ignore_errors=True)
        if out.exists():
            return result | json.loads(out.read_text()) | {"whole": why is None, "ended": why, "file": str(out)}
        return result | {"why": why or "ended without a result"}

    def _start(self, gpus: int, spec: dict[str, Any], limit: float) -> str | None:
        """Run the processes; returns None on success, else the reason of the failure."""
        file, log = self.folder / f"{self.began}.spec", self.folder / f"{self.began}.log"
        file.write_text(json.dumps(spec))
        program = [str(Path(__file__).resolve()), "--worker", str(file)]
        if gpus > 1:
            program = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}", *program]
        with log.open("wb") as stream:
            process = subprocess.Popen([sys.executable, *program], stdout=stream, stderr=stream, start_new_session=True)
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:  # Ctrl-C included
                end(process, sorted(self.folder.glob(f"{self.began}.pid*")))
        if code == 0:
            return None
        return f"cut off after {limit:.0f} s" if code is None else reason(log.read_text(errors="replace"))


def end(process: subprocess.Popen, pids: Sequence[Path]) -> None:
    """Stop a running process and its ranks, which torchrun starts in separate sessions."""
    if process.poll() is not None:
        return
    process.terminate()  # torchrun forwards it, also to ranks that have not written their PID yet
    try:
        process.wait(4)
    except subprocess.TimeoutExpired:
        for file in pids:  # ranks that wait for a GPU or for each other do not react
            with suppress(ProcessLookupError):
                os.kill(int(file.read_text()), signal.SIGKILL)
        process.kill()
        process.wait()


def reason(log: str) -> str:
    """The line of a log that tells why a run failed."""
    lines = [re.sub(r"^\[rank\d+\]:\s*", "", line).strip() for line in log.splitlines()]
    errors = [line for line in lines if line.startswith("error: ")]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line) and "ChildFailed" not in line]
    killed = re.search(r"Signal \d+ \((?!SIGTERM)(SIG\w+)\) received by PID", log)  # SIGTERM: by torchrun
    if errors:
        return "refused: " + errors[0].removeprefix("error: ")
    if killed:  # the other ranks only report that it is gone
        return f"a rank was killed by {killed[1]}"
    return raised[0][:300] if raised else (lines[-1][:300] if lines else "ended without output")


def compare(ours: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    """Largest relative differences, each with its bound."""
    for one in (ours, alone):
        if "why" in one or not one["whole"]:
            return {"layout": ours["layout"], "why": one.get("why") or one["ended"], "passed": False}

    def worst(names: Sequence[str]) -> float:
        pairs = [(a[n], b[n]) for a, b in zip(ours["logs"], alone["logs"], strict=True) for n in names]
        return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)

    a, b = (load_file(Path(one["file"]).with_suffix(".safetensors")) for one in (ours, alone))
    sums: dict[str, list[float]] = {}
    for name in (key.removeprefix("after.") for key in b if key.startswith("after.")):
        both = sums.setdefault(name.partition(".")[0], [0.0, 0.0])
        both[0] += float((a[f"after.{name}"] - b[f"after.{name}"]).double().square().sum())
        both[1] += float((b[f"after.{name}"] - b[f"before.{name}"]).double().square().sum())
    weights = max((difference / change) ** 0.5 if change else 1.0 for difference, change in sums.values())
    differences = dict(zip(("losses", "norms", "weights"), (worst(LOSSES), worst(NORMS), weights), strict=True))
    bounds = dict(zip(differences, BOUNDS[alone["bfloat16"]], strict=True))
    passed = all(differences[name] <= bounds[name] for name in differences)
    compared = {name: [differences[name], bounds[name]] for name in differences}
    return {"layout": ours["layout"], **compared, "passed": passed}


def check_jobs(layouts: Sequence[Layout], micro: int) -> list[tuple[Job, Job]]:
    """Each layout of several ranks and the single rank that it is compared with, for networks of two layers."""
    pairs = []
    for layout in layouts:
        if layout.gpus > 1:
            batch = micro * layout.gpus // layout.sequence * layout.accumulate
            options = [word for word in layout.text.split(",")[1:] if word.partition("=")[0] not in PLAIN]
            one = Layout.parse(",".join(["none:1", *options, *(f"{key}=false" for key in PLAIN)]))
            pairs.append((Job(layout, batch, 2), Job(one, batch, 2)))
    return pairs


def check_all(bench: Benchmark, layouts: Sequence[Layout], timed: Sequence[Layout] = ()) -> list[dict[str, Any]]:
    """Run and compare the jobs of `check_jobs`. timed: layouts that follow within the same budget."""
    pairs = check_jobs(layouts, bench.micro)
    jobs = list({job.key: job for ours, one in pairs for job in (one, ours)}.values())
    results = {job.key: bench.run(job, [*jobs[i + 1 :], *map(Job, timed)]) for i, job in enumerate(jobs)}
    return [compare(results[ours.key], results[one.key]) for ours, one in pairs]


def projections(args: argparse.Namespace, results: Sequence[dict[str, Any]], trained: int) -> list[dict[str, Any]]:
    """Projections of every measured layout to as many GPUs as it has, or more."""
    settings = {"global_batch": args.global_batch, "steps": args.iterations, "network_gb_s": args.network_gb_s}
    rows = []
    for one, layout in zip(results, args.layouts, strict=False):
        if "updates" not in one:
            continue
        for gpus in sorted({layout.gpus, *args.gpus}):
            if gpus >= layout.gpus and gpus % layout.sequence == 0:
                rows.append(project(one, gpus, sequence=layout.sequence, trained=trained, **settings))
    return [row for row in rows if row is not None]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        return worker(args.worker)
    if not args.layouts and not args.fake_ranks:
        raise UserError("--layouts is empty; give some, such as --layouts none:1 full:2, or --fake_ranks 64")
    if args.save:
        check_writable(args.save, "--save")
    console(quiet=True)
    report: dict[str, Any] = {"config": str(args.config_path), "settings": args.settings, "card_gb": args.card_gb}
    with tempfile.TemporaryDirectory() as folder:
        bench = Benchmark(args, Path(folder))
        report["sizes"] = bench.sizes
        where = (args.config_path, args.settings, bench.networks)
        if args.fake_ranks:
            world = args.fake_ranks
            report["plan"] = plan_table(*where, world, args.global_batch, args.card_gb)
            print(tables.plan_text(report["plan"], world, args.card_gb))
        timed = [] if args.check_only else args.layouts
        report["check"] = check_all(bench, args.layouts, timed) if args.check or args.check_only else []
        results = report["layouts"] = []
        for i, layout in enumerate(timed):
            results.append(bench.run(Job(layout), [Job(one) for one in timed[i + 1 :]]))
            newest = results[-1]
            if args.json:
                write_json_atomic(args.json, report)
            print("\n" + (tables.phase_table(newest) if "updates" in newest else newest["why"]), flush=True)
        report["advice"] = []
        for trained, gpus in itertools.product(ADAPTERS, (1, 2, 4, 8)):
            best = advice(*where, gpus, args.card_gb, trained)
            report["advice"].append((gpus, trained, *((best[0], best[1].peak.total) if best else (None, 0))))
        trained = max(bench.networks[role].parameters for role in ("student", "critic"))
        report["projection"] = projections(args, results, trained)
    if args.json:
        write_json_atomic(args.json, report)
    show(args, report)
    return int(bool(results) and all("why" in one for one in results) or any(not c["passed"] for c in report["check"]))


def show(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Print the remaining tables, after a list of what is missing in them."""
    missing = tables.left_out(report["layouts"], report["check"])
    if missing:
        print("\n" + missing)
    if report["layouts"]:
        print("\n" + tables.overview(report["layouts"], args.card_gb))
        print("\n" + tables.scaling(report["layouts"]))
    if report["check"]:
        print("\n" + tables.check_text(report["check"]))
    if report["projection"]:
        run = (args.iterations, args.global_batch, args.network_gb_s)
        print("\n" + tables.projection_table(report["projection"], *run))
    print("\n" + tables.advice_text(report["advice"], args.card_gb))


if __name__ == "__main__":
    exits.run(main)
