"""Generate clips of the tiny world for seeded prompts, measure them from their pixels, print how well they agree.

    python scripts/evaluate_tiny.py --config_path configs/tiny.yaml --num_prompts 64 --seed 7 --json scores.json
    python scripts/evaluate_tiny.py --ground_truth        # the same measures on rendered clips: all right
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits  # noqa: E402

exits.guard(__name__)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from configs.errors import UserError  # noqa: E402
from configs.geometry import Geometry, pixel_frames  # noqa: E402
from configs.load import load_config  # noqa: E402
from configs.schema import Config  # noqa: E402
from scripts.quality.tiny_features import (  # noqa: E402
    clip_features,
    frechet_distance,
    heading_spread,
    saturation_drift,
    start_spread,
)
from trainer.tiny.measures import Scores, measure, score_measured  # noqa: E402
from trainer.tiny.world import TinyScene, TinyWorld, caption  # noqa: E402
from utils.clip_measures import motion_energy, seam_score  # noqa: E402
from utils.files import check_writable, safe_name, write_json_atomic  # noqa: E402
from utils.intervals import mean_interval  # noqa: E402
from utils.logs import console  # noqa: E402
from utils.progress import progress_bar  # noqa: E402
from utils.seeds import sample_seed  # noqa: E402
from utils.video import VideoWriter  # noqa: E402

Maker = Callable[[list[TinyScene], list[int]], Tensor]  # scenes, seeds -> uint8 clips [B, T, 3, H, W]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = exits.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/tiny.yaml")
    parser.add_argument("--checkpoint_path", help="student to evaluate instead of the configured one")
    parser.add_argument("--num_prompts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=7, help="of the prompts and of the noise")
    parser.add_argument("--batch", type=int, default=8, help="clips generated together")
    parser.add_argument("--num_output_frames", type=int, help="latent frames of a clip; 21 are 81 pixel frames")
    parser.add_argument("--json", metavar="FILE", help="write the scores here too")
    parser.add_argument("--save_videos", metavar="DIR", help="write the clips here as .mp4")
    parser.add_argument("--ground_truth", action="store_true", help="measure rendered clips instead of generated ones")
    parser.add_argument("overrides", nargs="*", help="configuration values, e.g. schedule.steps=5432222")
    args = parser.parse_args(arguments)
    for name in ("num_prompts", "batch"):
        if vars(args)[name] < 1:
            raise UserError(f"{name}={vars(args)[name]} is less than 1; give at least 1")
    if args.seed < 0:
        raise UserError(f"seed={args.seed} is negative; give 0 or more")
    for name, folder in (("json", args.json and Path(args.json).parent), ("save_videos", args.save_videos)):
        if folder:
            check_writable(folder, name)
    return args


def configure(args: argparse.Namespace) -> Config:
    """The configuration with what the flags override."""
    overrides = list(args.overrides)
    if args.checkpoint_path is not None:
        overrides.append(f"model.student={args.checkpoint_path}")
    if args.num_output_frames is not None:
        overrides.append(f"video.num_latent_frames={args.num_output_frames}")
    return load_config(args.config_path, overrides)


def generate_with(config: Config) -> Maker:
    from pipeline import DiagonalPipeline  # here, so that rendered clips are measured without loading any network

    pipe = DiagonalPipeline.from_config(config)

    def make(scenes: list[TinyScene], seeds: list[int]) -> Tensor:
        videos = pipe([caption(scene) for scene in scenes], seed=seeds).videos
        return torch.from_numpy(np.stack([video.frames for video in videos])).permute(0, 1, 4, 2, 3)

    return make


def render_with(world: TinyWorld, frames: int) -> Maker:
    def make(scenes: list[TinyScene], seeds: list[int]) -> Tensor:
        return ((world.render(scenes, frames) + 1) * 127.5).round().to(torch.uint8)

    return make


def batches(scenes: list[TinyScene], seed: int, size: int) -> Iterator[tuple[list[TinyScene], list[int]]]:
    """Scenes by `size`, each with a seed of its own that does not depend on the batch."""
    seeds = [sample_seed(seed, i) for i in range(len(scenes))]
    for first in range(0, len(scenes), size):
        yield scenes[first : first + size], seeds[first : first + size]


def save(folder: str, first: int, scenes: list[TinyScene], clips: Tensor, fps: int) -> None:
    for i, (scene, clip) in enumerate(zip(scenes, clips, strict=True), start=first):
        with VideoWriter(Path(folder) / f"{i:04d}_{safe_name(caption(scene))}.mp4", fps, clip.shape[-2:]) as video:
            video.write(clip.permute(0, 2, 3, 1).numpy())


def evaluate(make: Maker, world: TinyWorld, config: Config, args: argparse.Namespace) -> tuple[Scores, dict]:
    """Scores of the clips, and figures of the set beside those of rendered clips of the same captions."""
    scenes = world.scenes(args.seed, args.num_prompts, balanced=True)
    frames = pixel_frames(config.video.num_latent_frames)
    chunks = Geometry.from_config(config).num_chunks(config.video.num_latent_frames)
    borders = [pixel_frames(k * config.stream.chunk_frames) for k in range(1, chunks)]
    render = render_with(world, frames)
    # Other starts and sizes for the same captions: what the distance and the spread are compared with.
    rng = np.random.default_rng([args.seed, 1])
    reference = [world.place(vars(scene), rng) for scene in scenes]
    parts, true_parts, seconds, done = [], [], 0.0, 0
    with progress_bar("clips", len(scenes), "clip") as bar:
        for some, seeds in batches(scenes, args.seed, args.batch):
            begin = time.perf_counter()
            clips = make(some, seeds)
            seconds += time.perf_counter() - begin
            if args.save_videos:
                save(args.save_videos, done, some, clips, config.video.fps)
            parts.append(describe(clips, borders))
            true_parts.append(describe(render(reference[done : done + len(some)], seeds), borders))
            done += len(some)
            bar.update(len(some))
    measured, true = ({k: torch.cat([p[k] for p in ps]) for k in ps[0]} for ps in (parts, true_parts))
    extras = figures(measured, true, world.expected_starts(scenes))
    extras["seconds_per_clip"] = seconds / len(scenes)
    return score_measured([caption(scene) for scene in scenes], measured), extras


def describe(clips: Tensor, borders: list[int]) -> dict[str, Tensor]:
    measures = measure(clips)
    return {
        **measures,
        "features": clip_features(clips),
        "seam": seam_score(clips, borders),
        "motion": motion_energy(clips),
        "drift": saturation_drift(measures),
    }


def figures(measured: dict[str, Tensor], true: dict[str, Tensor], expected: Tensor) -> dict:
    """What is not right or wrong: means with intervals, and numbers of the whole set."""
    whole = {
        "frechet_distance": frechet_distance(measured["features"], true["features"]),
        "start_spread": start_spread(measured, expected),
        "start_spread_data": start_spread(true, expected),
        "heading_spread": heading_spread(measured),
        "heading_spread_data": heading_spread(true),
    }
    means = {
        "consistency_share": mean_interval(measured["consistency"]).to_dict(),
        "seam_score": mean_interval(measured["seam"]).to_dict(),
        "saturation_drift": mean_interval(measured["drift"]).to_dict(),
        "motion_amplitude": mean_interval(measured["motion"] / true["motion"].mean()).to_dict(),
    }
    return {**means, **{k: v if np.isfinite(v) else None for k, v in whole.items()}}


def print_extras(extras: dict) -> None:
    print()
    for name, value in extras.items():
        middle, low, high = (value[k] for k in ("value", "low", "high")) if isinstance(value, dict) else (value,) * 3
        spread = f"{low:>10.3f} .. {high:.3f}" if isinstance(value, dict) and low is not None else ""
        print(f"{name:<20} {'none' if middle is None else f'{middle:.3f}':>8} {spread}")


def main(arguments: list[str] | None = None) -> int:
    console()
    args = parse_arguments(arguments)
    config = configure(args)
    world = TinyWorld(config.video.height, config.video.width)
    frames = pixel_frames(config.video.num_latent_frames)
    make = render_with(world, frames) if args.ground_truth else generate_with(config)
    scores, extras = evaluate(make, world, config, args)
    print(scores.table())
    print_extras(extras)
    if args.json:
        head = {"num_prompts": args.num_prompts, "seed": args.seed, "ground_truth": args.ground_truth}
        write_json_atomic(args.json, {**scores.to_dict(), **extras, **head, "config_path": str(args.config_path)})
    return 0


if __name__ == "__main__":
    exits.run(main)
