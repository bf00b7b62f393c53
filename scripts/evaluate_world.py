"""Measure clips and streams of the moving world against their captions, and compare with what is aimed at.

    python scripts/evaluate_world.py --json scores.json                                # 256 clips of 81 frames
    python scripts/evaluate_world.py --streams 32 --minutes 10 --switches 64           # and streams, and new prompts
    python scripts/evaluate_world.py --rendered --num_prompts 28                       # the same of rendered clips
    python scripts/evaluate_world.py --teacher_path assets/world/teacher --num_prompts 28   # and of the teacher's

clips      each attribute, rate and amplitude; how many have all of them right, by motion too; seams, the outline's
           tremble and the spread of what captions leave open (of headings only with --people), over those of rendered
           clips of the same captions that went through the VAE, whose own seams are `seam_vae`
streams    whether number, colour, shape, size and rate stay what they are for --minutes
switches   streams whose prompt changes its colour: in how many the new one is seen within two chunks, and stays for
           --stay seconds
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits  # noqa: E402

exits.guard(__name__)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from configs.errors import UserError  # noqa: E402
from configs.geometry import pixel_frames  # noqa: E402
from configs.load import load_config  # noqa: E402
from configs.schema import Config  # noqa: E402
from scripts.studies.clips import System  # noqa: E402
from scripts.studies.vocabulary import check_world  # noqa: E402
from scripts.studies.world_diversity import spread  # noqa: E402
from scripts.studies.world_endless import Watch  # noqa: E402
from trainer.world.captions import COLOURS, MOTIONS, parse_caption  # noqa: E402
from trainer.world.measures import measure, score_measured  # noqa: E402
from trainer.world.render import render  # noqa: E402
from trainer.world.scene import Scene, World, caption, training_caption  # noqa: E402
from utils.clip_measures import seam_score  # noqa: E402
from utils.files import check_file, write_json_atomic  # noqa: E402
from utils.intervals import Interval, mean_interval, wilson  # noqa: E402
from utils.logs import console  # noqa: E402
from utils.progress import progress_bar  # noqa: E402
from utils.seeds import sample_seed  # noqa: E402
from utils.tables import number  # noqa: E402

SEED = 4322222  # of captions that no training sees
SWITCH_AT, WITHIN = 5, 2  # the first chunk under the new prompt; chunks within which it has to show
GOALS: dict[str, tuple[str, float]] = {  # figure -> what is aimed at
    **{f"clips.{name}": ("at least", 0.97) for name in ("colour", "shape", "direction", "partner", "ground")},
    **{f"clips.{name}": ("at least", 0.90) for name in ("rate_near", "amplitude_near")},
    "clips.motion": ("at least", 0.95), "clips.rate_ratio": ("within", 0.10), "clips.amplitude_ratio": ("within", 0.10),
    "clips.seam": ("at most", 1.10), "clips.jitter": ("at most", 1.5),
    **{f"clips.spread_{name}": ("at least", 0.90) for name in ("starts", "phases", "headings")},
    "streams.number": ("at least", 0.99), "streams.colour": ("at least", 0.98), "streams.shape": ("at least", 0.98),
    "streams.size": ("at most", 0.10), "streams.rate": ("at most", 0.10), "streams.saturation_trend": ("no trend", 0.0),
    "streams.sharpness_trend": ("no trend", 0.0),
    **{f"switches.{name}": ("at least", 0.95) for name in ("seen", "stayed")},
}  # fmt: skip

# Plays scenes: (scenes, seeds, chunks, {chunk: scenes from it on}) -> the frames of each chunk, uint8 [B, t, 3, H, W]
Player = Callable[[Sequence[Scene], Sequence[int], int, dict[int, list[Scene]]], Iterator[Tensor]]
Wording = Callable[[Scene], str]
Through = Callable[[Tensor], Tensor]  # clips uint8 [B, T, 3, H, W] as the VAE gives them back


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = exits.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/world/world.yaml", metavar="FILE", help="(%(default)s)")
    parser.add_argument("--checkpoint_path", metavar="PATH", help="student to evaluate in place of the configured one")
    parser.add_argument("--teacher_path", metavar="PATH", help="clips of this teacher, in 50 steps, instead")
    parser.add_argument("--num_prompts", type=int, default=256, help="clips; 0 = none (%(default)s)")
    parser.add_argument("--streams", type=int, default=0, help="long streams; 0 = none (%(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="length of each (%(default)s)")
    parser.add_argument("--switches", type=int, default=0, help="streams whose prompt changes (%(default)s)")
    parser.add_argument("--stay", type=float, default=60.0, help="seconds that a new prompt has to stay (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="clips and streams made together (%(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="of captions and noise (%(default)s)")
    parser.add_argument("--people", action="store_true", help="clips of captions as people type them, some left open")
    parser.add_argument("--rendered", action="store_true", help="measure rendered clips in place of generated ones")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. schedule.steps=2")
    args = parser.parse_intermixed_args(arguments)
    least_of = {"num_prompts": 0, "streams": 0, "minutes": 0.25, "switches": 0, "stay": 0, "batch": 1, "seed": 0}
    for name, least in least_of.items():
        if vars(args)[name] < least:
            raise UserError(f"--{name} {vars(args)[name]} is too little; give at least {least}")
    if not (args.num_prompts or args.streams or args.switches):
        raise UserError("--num_prompts 0 leaves nothing to measure; give clips, --streams or --switches")
    others = [flag for flag in ("checkpoint_path", "rendered", "streams", "switches") if vars(args)[flag]]
    if args.teacher_path and others:
        raise UserError(f"--teacher_path makes clips without a student, and no streams; leave --{others[0]} out")
    if args.json:
        check_file(args.json, "--json")
    return args


def rendered(config: Config) -> Player:
    """Rendered videos, cut as a stream's chunks are."""
    world, chunk = World(config.video.height, config.video.width), config.stream.chunk_frames

    def play(scenes, seeds, chunks, changes):
        now, at = list(scenes), 0
        for k in range(chunks):
            now = changes.get(k, now)
            end = pixel_frames((k + 1) * chunk)
            yield render(world, now, end - at, dtype=torch.uint8, start_frame=at)
            at = end

    return play


def generated(config: Config, wording: Wording, teacher: str | None = None) -> tuple[Player, Through]:
    """The student's videos, or whole clips of the network in the folder `teacher`; and what the VAE gives back."""
    from pipeline import DiagonalPipeline  # here, so that rendered clips are measured without loading any network

    check_world(config, "moving")
    session = DiagonalPipeline.from_config(config).session

    def through(frames):
        pixels = frames.to(session.device).float() / 127.5 - 1
        return torch.cat([session.codec.decode(session.codec.encode(part)) for part in pixels.split(4)])

    def play(scenes, seeds, chunks, changes):
        for result in session.play([wording(scene) for scene in scenes], list(seeds), chunks):
            if result.chunk + 1 in changes:  # said while this chunk is there, it goes for the next
                session.set_prompt([wording(scene) for scene in changes[result.chunk + 1]])
            yield result.wait().frames.movedim(-1, 2).to(session.device)

    if teacher is None:
        return play, through
    make = System(config, session.codec, session.text_encoder, session.device, torch.float32).teacher(teacher)

    def play_whole(scenes, seeds, chunks, _):
        yield make([wording(scene) for scene in scenes], seeds, chunks * config.stream.chunk_frames)

    return play_whole, through


def batches(count: int, size: int, what: str) -> Iterator[slice]:
    with progress_bar(what, count, "stream") as bar:
        for first in range(0, count, size):
            yield slice(first, min(first + size, count))
            bar.update(min(size, count - first))


def clips(play: Player, config: Config, args: argparse.Namespace, through: Through) -> dict[str, Interval]:
    wording = training_caption if args.people else caption
    world = World(config.video.height, config.video.width)
    scenes = world.scenes(args.seed, args.num_prompts, balanced=True)
    others = [world.place(vars(scene), np.random.default_rng([args.seed, 1, i])) for i, scene in enumerate(scenes)]
    chunks = config.video.num_latent_frames // config.stream.chunk_frames
    borders = [pixel_frames(k * config.stream.chunk_frames) for k in range(1, chunks)]
    shown, data = [], []
    for part in batches(len(scenes), args.batch, "clips"):
        seeds = [sample_seed(args.seed, i) for i in range(part.start, part.stop)]
        videos = torch.cat(list(play(scenes[part], seeds, chunks, {})), dim=1)
        known = through(torch.cat(list(rendered(config)(others[part], seeds, chunks, {})), dim=1))
        for frames, rows in ((videos, shown), (known, data)):
            rows.append({k: v.cpu() for k, v in (measure(frames) | {"seam": seam_score(frames, borders)}).items()})
    made, true = ({k: torch.cat([row[k] for row in rows]) for k in rows[0]} for rows in (shown, data))
    said = [wording(scene) for scene in scenes]
    scores = score_measured(said, made)
    left_open = torch.tensor([parse_caption(text)["direction"] is None for text in said])
    columns, whole = dict(scores.columns), scores.right["all"]
    for motion in MOTIONS:
        right = whole[torch.tensor([scene.motion == motion for scene in scenes])]
        if len(right):
            columns[f"all_{motion}"] = wilson(int(right.sum()), len(right))
    columns["seam"] = mean_interval(made["seam"] / true["seam"].nanmean())
    columns["seam_vae"] = mean_interval(true["seam"])
    columns["jitter"] = mean_interval(made["jitter"] / true["jitter"].nanmean())
    n = len(scenes)
    return columns | {f"spread_{name}": Interval(v, v, v, n) for name, v in spread(made, true, left_open).items()}


def streams(play: Player, config: Config, args: argparse.Namespace, _: Through) -> dict[str, Interval]:
    world, rows = World(config.video.height, config.video.width), []
    scenes = world.scenes(args.seed + 1, args.streams, balanced=True)
    chunks = max(1, round(args.minutes * 60 * config.video.fps / (4 * config.stream.chunk_frames)))
    for part in batches(len(scenes), args.batch, "streams"):
        watch = Watch([caption(scene) for scene in scenes[part]], config.video.fps)
        for frames in play(scenes[part], [sample_seed(args.seed, i) for i in range(part.start, part.stop)], chunks, {}):
            watch.add(frames)
        rows.append(watch.report())
    whole = {name: torch.cat([vars(row)[name] for row in rows]) for name in vars(rows[0])}
    return type(rows[0])(**whole).summary()


def switches(play: Player, config: Config, args: argparse.Namespace, _: Through) -> dict[str, Interval]:
    """The colour is read in each chunk; `stayed`: from WITHIN on every chunk that shows one, at least half of them,
    shows the new one."""
    world = World(config.video.height, config.video.width)
    scenes = world.scenes(args.seed + 2, args.switches, balanced=True)
    later = [replace(scene, colour=new_colour(scene, i)) for i, scene in enumerate(scenes)]
    chunks = SWITCH_AT + WITHIN + max(1, round(args.stay * config.video.fps / (4 * config.stream.chunk_frames)))
    seen, stayed = 0, 0
    for part in batches(len(scenes), args.batch, "switches"):
        wanted = torch.tensor([COLOURS.index(scene.colour) for scene in later[part]])
        seeds = [sample_seed(args.seed, i) for i in range(part.start, part.stop)]
        played = play(scenes[part], seeds, chunks, {SWITCH_AT: later[part]})
        read = torch.stack([measure(frames)["colour"].cpu() for frames in played])[SWITCH_AT:]  # [chunks, B]
        seen += int((read[:WITHIN] == wanted).any(0).sum())
        stayed += int(kept(read[WITHIN:], wanted).sum())
    return {"seen": wilson(seen, len(scenes)), "stayed": wilson(stayed, len(scenes))}


def kept(read: Tensor, wanted: Tensor) -> Tensor:
    """bool [B]: of the colours [chunks, B] that are read, -1 = none is seen, half are the wanted one, and no other."""
    right = read == wanted
    return (right | (read < 0)).all(0) & (right.double().mean(0) >= 0.5)


def new_colour(scene: Scene, turn: int) -> str:
    """Another colour than the scene's own and than that of what it orbits, each in turn."""
    others = [colour for colour in COLOURS if colour not in (scene.colour, scene.partner)]
    return others[turn % len(others)]


def verdict(name: str, value: Interval) -> str:
    """What is aimed at, and whether it is reached."""
    if name not in GOALS:
        return ""
    kind, limit = GOALS[name]
    reached = {
        "at least": value.value >= limit, "at most": value.value <= limit, "within": abs(value.value - 1) <= limit,
        "no trend": value.low <= limit <= value.high,
    }[kind]  # fmt: skip
    word = "unknown" if value.value != value.value else "reached" if reached else "missed"
    return f"{word:<8} {kind}{'' if kind == 'no trend' else f' {limit:g}'}"


def main(arguments: list[str] | None = None) -> int:
    console()
    args = parse(arguments)
    own = [] if args.checkpoint_path is None else [f"model.student={args.checkpoint_path}"]
    config = load_config(args.config_path, [*args.overrides, *own])
    wording = training_caption if args.people else caption
    play, through = rendered(config), lambda clips: clips
    if not args.rendered:
        play, through = generated(config, wording, args.teacher_path)
    parts = {"clips": args.num_prompts, "streams": args.streams, "switches": args.switches}
    makers, figures = {"clips": clips, "streams": streams, "switches": switches}, {}
    for part in [name for name, count in parts.items() if count]:
        for name, value in makers[part](play, config, args, through).items():
            figures[f"{part}.{name}"] = value
    for name, value in figures.items():
        mean, low, high = (number(x, ".3f") for x in (value.value, value.low, value.high))
        print(f"{name:<28}{mean:>9} {low:>9} .. {high:<9}{value.n:>5}  {verdict(name, value)}".rstrip())
    if args.json:
        rows = {name: value.to_dict() for name, value in figures.items()}
        write_json_atomic(args.json, {"seed": args.seed, "rendered": args.rendered, **rows})
    return 0


if __name__ == "__main__":
    exits.run(main)
