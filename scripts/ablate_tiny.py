"""Ablation of the method on the tiny world: trains and measures one student per row, and writes a table.

Every row trains the shipped student from the same initial weights, with the change that its title names.

    bash scripts/ablate_tiny.sh --output logs/ablation                 # one GPU, or a CPU
    bash scripts/ablate_tiny.sh --rows teacher 4322222 no_flow --steps 500 --num_prompts 128 training.micro_batch=32

Finished rows are skipped, and so is their training if only the prompts changed. table.md and table.json are written
after each row; rows/<row>.json holds a row, runs/<row>-<settings>/ its training.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import exits  # noqa: E402

exits.guard(__name__)

import torch  # noqa: E402

from configs.errors import UserError  # noqa: E402
from configs.schema import Config  # noqa: E402
from model.schedule import Schedule  # noqa: E402
from pipeline.preflight import check_training  # noqa: E402
from scripts.studies import ablation  # noqa: E402
from scripts.studies.ablation_table import markdown  # noqa: E402
from scripts.studies.clips import TEACHER_STEPS, Bench, System, cpu_seconds  # noqa: E402
from scripts.studies.vocabulary import check_world  # noqa: E402
from utils.device import gpu_memory, pick_device, set_threads  # noqa: E402
from utils.files import check_writable, short_hash, write_json_atomic  # noqa: E402
from utils.logs import console  # noqa: E402

CPU = torch.device("cpu")
ASKED = {"settings", "seed", "clips", "open_clips", "long_clips", "long_frames"}  # what a row was measured with


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = exits.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/train_tiny_ablation.yaml", help="the base (%(default)s)")
    parser.add_argument("--output", default="logs/ablation", metavar="DIR", help="(%(default)s)")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"of {' '.join(row.name for row in ablation.ROWS)}")
    parser.add_argument("--steps", type=int, help="critic updates of each training, warm-up included (training.steps)")
    parser.add_argument("--num_prompts", type=int, default=256, help="clips a row, of 81 frames (%(default)s)")
    parser.add_argument("--open_prompts", type=int, help="clips for the spread of headings (4 x num_prompts)")
    parser.add_argument("--long_prompts", type=int, help="clips a row that go on (as num_prompts); 0 = none")
    parser.add_argument("--long_frames", type=int, default=81, help="latent frames of those; 81 are 321 frames")
    parser.add_argument("--eval_batch", type=int, default=64, help="clips made together (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of prompts and noise (%(default)s)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for every row, below what a row changes")
    args = parser.parse_intermixed_args(arguments)
    if args.rows:  # it takes all words that follow it
        args.settings += [word for word in args.rows if "=" in word]
        args.rows = [word for word in args.rows if "=" not in word]
    args.long_prompts = args.num_prompts if args.long_prompts is None else args.long_prompts
    args.open_prompts = 4 * args.num_prompts if args.open_prompts is None else args.open_prompts
    least_of = {"num_prompts": 2, "open_prompts": 2, "long_prompts": 0, "long_frames": 1, "eval_batch": 1, "seed": 0}
    for name, least in least_of.items():
        if vars(args)[name] < least:
            raise UserError(f"--{name} {vars(args)[name]} is too few; give at least {least}")
    if args.steps is not None:
        args.settings = [*args.settings, f"training.steps={args.steps}"]
    return args


def measured(row: ablation.Row, config: Config, weights: Path, system: System, bench: Bench, seconds: float | None):
    """The measures of a row, for its JSON. seconds: CPU time per clip, if known."""
    begin, teacher = time.perf_counter(), row.start == "teacher"
    schedule = Schedule.from_config(config.schedule, config.stream)
    make = system.teacher(weights) if teacher else system.student(weights, schedule)
    columns = {name: value.to_dict() for name, value in bench.columns(make, endless=not teacher).items()}
    took = time.perf_counter() - begin
    if seconds is None:
        on_cpu = System.load(config, CPU)
        network = on_cpu.teacher(weights) if teacher else on_cpu.student(weights, schedule)
        seconds = cpu_seconds(network, bench.prompts[0], bench.frames)
    passes = TEACHER_STEPS * (2 if config.training.flow.guidance else 1)
    nfe = passes if teacher else schedule.nfe(bench.frames // config.stream.chunk_frames)
    cost = {"nfe": nfe, "cpu_seconds": seconds, "cost_of": cost_of(row, config)}
    return {"name": row.name, "title": row.title, **cost, "columns": columns, "evaluation_seconds": took}


def cost_of(row: ablation.Row, config: Config) -> str:
    """A key for the cost of a row: rows with the same key take the same time."""
    which = "teacher" if row.start == "teacher" else str(Schedule.from_config(config.schedule, config.stream))
    return short_hash(which, config.video.num_latent_frames)


def read_rows(folder: Path, rows: list[ablation.Row]) -> dict[str, dict]:
    """Finished rows in the table's order, without those that an earlier version measured differently."""
    files = [folder / f"{row.name}.json" for row in rows]
    stored = [json.loads(file.read_text()) for file in files if file.is_file()]
    return {row["name"]: row for row in stored if row["asked"].keys() == ASKED}


def write_tables(out: Path, args: argparse.Namespace) -> str:
    rows = list(read_rows(out / "rows", list(ablation.ROWS)).values())
    text = markdown(rows)
    (out / "table.md").write_text(text, encoding="utf-8")
    write_json_atomic(out / "table.json", {"settings": args.settings, "rows": rows})
    return text


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    console()
    rows, out = ablation.chosen(args.rows), check_writable(args.output, "--output")
    configs = {row.name: ablation.row_config(args.config_path, row, args.settings) for row in rows}
    first = next(iter(configs.values()))
    check_world(first, "tiny")
    device = pick_device(first.device)
    for config in configs.values():
        check_training(config, 1, gpu_memory(device))
    torch.set_float32_matmul_precision("high")
    set_threads(first.cpu_threads, training=True)
    (out / "rows").mkdir(parents=True, exist_ok=True)
    sizes = {"clips": args.num_prompts, "open_clips": args.open_prompts}
    sizes |= {"long_clips": args.long_prompts, "long_frames": args.long_frames}
    system, bench = System.load(first, device), Bench(first, device, **sizes, batch=args.eval_batch, seed=args.seed)
    for row in rows:
        config, file = configs[row.name], out / "rows" / f"{row.name}.json"
        settings = ablation.fingerprint(config)
        asked = {"settings": settings, "seed": args.seed, **sizes}
        known = read_rows(out / "rows", list(ablation.ROWS))
        if row.name in known and known[row.name]["asked"] == asked:
            continue
        begin = time.perf_counter()
        weights = ablation.trained(row, config, out / "runs" / f"{row.name}-{settings}", device)
        if weights is None:
            return 0  # stopped by a signal; the same command goes on
        training = {"training_seconds": time.perf_counter() - begin, "steps": config.training.steps, "asked": asked}
        seconds = {r["cost_of"]: r["cpu_seconds"] for r in known.values()}.get(cost_of(row, config))
        write_json_atomic(file, measured(row, config, weights, system, bench, seconds) | training)
        write_tables(out, args)
        print(f"{row.title}: {time.perf_counter() - begin:.0f} s", flush=True)
    print(write_tables(out, args))
    return 0


if __name__ == "__main__":
    exits.run(main)
