"""Train and measure the rows that decide the method's claims on the moving world, and set the claims in a table.

    python scripts/ablate_world.py --output logs/world_claims                      # all rows, three seeds each
    CUDA_VISIBLE_DEVICES=1 python scripts/ablate_world.py --part 2/2 --minutes 9   # on one of two GPUs, for so long

A row that is finished with the same settings and start is not made again; one that is stopped continues.
rows/<row>-<seed>.json holds a value a clip; claims.md, the table, is written after each row. Rows and claims:
scripts/studies/world_claims.py, fixed before any run.
"""

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits  # noqa: E402

exits.guard(__name__)

import numpy as np  # noqa: E402
import torch  # noqa: E402

from configs.errors import UserError  # noqa: E402
from configs.geometry import pixel_frames  # noqa: E402
from configs.load import load_config  # noqa: E402
from configs.schema import Config  # noqa: E402
from pipeline.preflight import check_training  # noqa: E402
from scripts.evaluate_world import SEED, Player, Wording, batches, generated  # noqa: E402
from scripts.studies.ablation import Row, fingerprint, trained  # noqa: E402
from scripts.studies.vocabulary import check_world  # noqa: E402
from scripts.studies.world_claims import (  # noqa: E402
    BUDGET,
    CLIPS,
    HALVES,
    HARD,
    MEMORY_CHUNKS,
    MEMORY_CLIPS,
    PARENTS,
    QUICK,
    REMEMBERED,
    ROWS,
    SEEDS,
    SHOWN,
    table,
)
from scripts.studies.world_memory import GAP, kept_colour  # noqa: E402
from scripts.train_world import PROMPTS, write_prompts  # noqa: E402
from trainer.world.captions import ATTRIBUTES  # noqa: E402
from trainer.world.measures import agreement, measure  # noqa: E402
from trainer.world.scene import Scene, World, caption  # noqa: E402
from utils.clip_measures import seam_score  # noqa: E402
from utils.device import gpu_memory, pick_device, set_threads  # noqa: E402
from utils.files import atomic_path, check_writable, write_json_atomic  # noqa: E402
from utils.logs import console  # noqa: E402
from utils.seeds import sample_seed  # noqa: E402

OPEN = dict.fromkeys(ATTRIBUTES)  # everything about a scene is drawn


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    names = [row.name for row in ROWS]
    parser = exits.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/world/distill.yaml", help="the base (%(default)s)")
    parser.add_argument("--start", default="logs/world/causal_start", help="where every row starts (%(default)s)")
    parser.add_argument("--output", default="logs/world_claims", metavar="DIR", help="(%(default)s)")
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW", help=f"of {' '.join(names)}")
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, metavar="N", help="of training")
    parser.add_argument("--num_prompts", type=int, default=CLIPS, help="clips a row and seed (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="clips made together (%(default)s)")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every N-th row from the I-th on (%(default)s)")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for every row, below what a row changes")
    args = parser.parse_intermixed_args(arguments)
    for name in ("num_prompts", "batch"):
        if vars(args)[name] < 1:
            raise UserError(f"--{name} {vars(args)[name]} is too few; give at least 1")
    if args.minutes is not None and args.minutes < 0:
        raise UserError(f"--minutes {args.minutes} is no time; give 0 or more")
    part = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", args.part)
    if part is None or int(part[1]) > int(part[2]):
        raise UserError(f"--part {args.part} is not one of so many; use 1/2 and 2/2 for two processes")
    args.part = int(part[1]), int(part[2])
    return args


def config_of(args: argparse.Namespace, row: Row, seed: int, start: Path | str) -> Config:
    """The base with a row's budget, the user's settings and what the row changes. start: the student."""
    own = (f"training.init.student={start}", f"seed={seed}", *row.overrides)
    settings = [*BUDGET, f"training.distill.prompts={args.output}/prompts.txt", *args.settings, *own]
    config = load_config(args.config_path, settings)
    if row.name not in HALVES:
        return config
    t = config.training
    half = [f"training.steps={t.steps // 2}", f"training.distill.critic_warmup={t.distill.critic_warmup // 2}"]
    return load_config(args.config_path, [*settings, *half])


def settings_of(args: argparse.Namespace, row: Row, seed: int) -> str:
    """Eight digits that change with a row's settings and with the weights that all rows start from."""
    return fingerprint(config_of(args, row, seed, args.start))


def student_of(args: argparse.Namespace, row: Row, seed: int, until: float) -> tuple[Config, Path | None]:
    """A row's configuration and its student, trained unless it is there; None if there is no time left."""
    start, runs = args.start, Path(args.output) / "runs"
    if row.name in PARENTS:
        start = student_of(args, PARENTS[row.name], seed, until)[1]
    config = config_of(args, row, seed, args.start if start is None else start)
    if start is None or time.monotonic() > until:
        return config, None
    device = pick_device(config.device)
    set_threads(config.cpu_threads, training=True)
    check_training(config, 1, gpu_memory(device))
    return config, trained(row, config, runs / f"{row.name}-{seed}-{settings_of(args, row, seed)}", device, until)


def _playing(config: Config, student: Path, wording: Wording) -> Player:
    """Without what takes longer to make than a row's clips."""
    plain = replace(config.inference, compile="off", cuda_graphs="off")
    return generated(replace(config, model=replace(config.model, student=str(student)), inference=plain), wording)[0]


def measured(config: Config, student: Path, scenes: list[Scene], batch: int) -> dict[str, list[float | None]]:
    """A value a clip of each figure, None where there is none."""
    play, chunk = _playing(config, student, caption), config.stream.chunk_frames
    chunks, shown = config.video.num_latent_frames // chunk, []
    borders = [pixel_frames(k * chunk) for k in range(1, chunks)]
    for part in batches(len(scenes), batch, "clips"):
        seeds = [sample_seed(SEED, i) for i in range(part.start, part.stop)]
        frames = torch.cat(list(play(scenes[part], seeds, chunks, {})), dim=1)
        values = measure(frames) | {"seam": seam_score(frames, borders)}
        shown.append({name: value.cpu() for name, value in values.items()})
    whole = {name: torch.cat([row[name] for row in shown]) for name in shown[0]}
    figures = agreement([caption(scene) for scene in scenes], whole) | {"seam": whole["seam"]}
    return {name: [None if x != x else x for x in value.tolist()] for name, value in figures.items()}


def memory(config: Config, student: Path, count: int, batch: int) -> dict[str, list[float | None]]:
    """Whether each clip of a hiding subject, and each of others over as long a time, keeps a colour that its caption
    does not state."""
    play, world = _playing(config, student, partial(caption, without=["colour"])), World()
    middle = pixel_frames(MEMORY_CHUNKS * config.stream.chunk_frames) // 2
    kinds = {"kept_hide": (("hide",), None), "kept_shown": (SHOWN, (middle - GAP // 2, middle + GAP // 2))}
    figures = {}
    for name, (motions, gap) in kinds.items():
        rng, kept = np.random.default_rng([SEED, len(motions)]), []
        wanted = [(motions[i % len(motions)], REMEMBERED[i % len(REMEMBERED)]) for i in range(count)]
        scenes = [world.place(OPEN | {"motion": motion, "rate": rate}, rng) for motion, rate in wanted]
        for part in batches(count, batch, name):
            seeds = [sample_seed(SEED, i) for i in range(part.start, part.stop)]
            frames = torch.cat(list(play(scenes[part], seeds, MEMORY_CHUNKS, {})), dim=1)
            kept += kept_colour(frames, gap).tolist()
        figures[name] = [None if x != x else x for x in kept]
    return figures


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    console()
    out, begin = check_writable(args.output, "--output"), time.monotonic()
    until = math.inf if args.minutes is None else begin + 60 * args.minutes
    scenes = World().scenes(SEED, args.num_prompts, balanced=True)
    hard = [scene.motion in HARD and scene.rate in QUICK for scene in scenes]
    wanted = [(row, seed) for seed in args.seeds for row in ROWS if row.name in args.rows]
    check_world(load_config(args.config_path, args.settings), "moving")
    first, parts = args.part
    torch.set_float32_matmul_precision("high")
    write_prompts(out / "prompts.txt", PROMPTS)
    asked = {(row.name, seed): [settings_of(args, row, seed), len(scenes)] for row in ROWS for seed in SEEDS}
    for row, seed in wanted[first - 1 :: parts]:
        if (row.name, seed) in read(out, asked):
            continue
        config, student = student_of(args, row, seed, until)
        if student is None:
            return 0  # the same command continues
        (out / "rows").mkdir(parents=True, exist_ok=True)
        figures = measured(config, student, scenes, args.batch)
        if row.name == "diagonal":
            figures |= memory(config, student, min(MEMORY_CLIPS, args.num_prompts), args.batch)
        write_json_atomic(_file(out, row.name, seed), {"asked": asked[row.name, seed], "figures": figures})
        with atomic_path(out / "claims.md") as aside:
            aside.write_text(table(read(out, asked), hard), encoding="utf-8")
        print(f"{row.title}, seed {seed}: {time.monotonic() - begin:.0f} s", flush=True)
    print(table(read(out, asked), hard))
    return 0


def _file(folder: Path, row: str, seed: int) -> Path:
    return folder / "rows" / f"{row}-{seed}.json"


def read(folder: Path, asked: Mapping[tuple[str, int], list]) -> dict[tuple[str, int], dict[str, list[float | None]]]:
    """Finished rows that were made as `asked` says: settings, and number of clips."""
    files = {key: _file(folder, *key) for key in asked}
    stored = {key: json.loads(file.read_text()) for key, file in files.items() if file.is_file()}
    return {key: row["figures"] for key, row in stored.items() if row.get("asked") == asked[key]}


if __name__ == "__main__":
    exits.run(main)
