"""Pictures of the moving world to look at: contact sheets of clips, and strips of long streams.

    python scripts/world_sheets.py --output sheets                             # rendered clips, two of each motion
    python scripts/world_sheets.py --output sheets --minutes 10                # and strips of ten minutes
    python scripts/world_sheets.py --output sheets --config_path FILE          # what a student makes of the captions
    python scripts/world_sheets.py --output sheets --vae DIR --columns 17      # rendered clips, and below through a VAE

sheet.png has a row a clip, its frames at even distances, the caption above; strip.png a row a stream, one frame from
each part of it.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits  # noqa: E402

exits.guard(__name__)

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from configs.errors import UserError  # noqa: E402
from configs.geometry import TEMPORAL_STRIDE, pixel_frames  # noqa: E402
from configs.load import load_config  # noqa: E402
from configs.schema import Config  # noqa: E402
from model.codec import WanCodec  # noqa: E402
from model.weights.load import load_vae  # noqa: E402
from scripts.studies.vocabulary import check_world  # noqa: E402
from trainer.world.render import render  # noqa: E402
from trainer.world.scene import CLIP_FRAMES, Scene, World, caption  # noqa: E402
from utils.files import atomic_path, check_writable  # noqa: E402
from utils.logs import console  # noqa: E402
from utils.seeds import sample_seed  # noqa: E402

FPS = 16
LABEL = 13  # pixels: height of the line above a row
Shown = Callable[[int, Scene, Sequence[int]], np.ndarray]  # clip, scene, frames -> uint8 [len(frames), H, W, 3]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = exits.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="sheets", metavar="DIR", help="folder of the pictures (%(default)s)")
    parser.add_argument("--config_path", metavar="FILE", help="show what its student makes; without it, rendered clips")
    parser.add_argument("--vae", metavar="DIR", help="show rendered clips and, below, what this VAE makes of them")
    parser.add_argument("--clips", type=int, default=14, help="rows of the sheet (%(default)s)")
    parser.add_argument("--columns", type=int, default=9, help="frames a row (%(default)s)")
    parser.add_argument("--minutes", type=float, default=0.0, help="length of streams; 0 = no strip (%(default)s)")
    parser.add_argument("--streams", type=int, default=7, help="rows of the strip (%(default)s)")
    parser.add_argument("--seed", type=int, default=7, help="of captions and noise (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, with --config_path")
    args = parser.parse_intermixed_args(arguments)
    if args.vae and args.config_path:
        raise UserError("--vae shows rendered clips and --config_path a student's; give one of them")
    if args.overrides and not args.config_path:
        raise UserError(f"{args.overrides[0]} has no effect on rendered clips; give --config_path too, or leave it out")
    if args.vae and args.minutes:
        raise UserError("--vae shows clips, not streams; leave out --minutes")
    for name, least in (("clips", 1), ("columns", 2), ("minutes", 0), ("streams", 1), ("seed", 0)):
        if vars(args)[name] < least:
            raise UserError(f"--{name} {vars(args)[name]} is too little; give at least {least}")
    return args


def rendered(world: World) -> Shown:
    def show(_: int, scene: Scene, frames: Sequence[int]) -> np.ndarray:
        parts = [render(world, [scene], 1, dtype=torch.uint8, start_frame=frame)[0] for frame in frames]
        return torch.cat(parts).permute(0, 2, 3, 1).numpy()

    return show


def reconstructed(world: World, folder: str) -> Shown:
    codec = WanCodec(load_vae(folder).eval())

    def show(_: int, scene: Scene, frames: Sequence[int]) -> np.ndarray:
        pixels = render(world, [scene], 1 + -(-max(frames) // TEMPORAL_STRIDE) * TEMPORAL_STRIDE)
        both = torch.cat([pixels, codec.decode(codec.encode(pixels))], dim=-2)[0, list(frames)]
        return ((both + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()

    return show


def generated(config: Config, seed: int) -> Shown:
    from pipeline import DiagonalPipeline  # here, so that rendered clips are shown without loading any network

    pipe, chunk = DiagonalPipeline.from_config(config), config.stream.chunk_frames

    def show(clip: int, scene: Scene, frames: Sequence[int]) -> np.ndarray:
        wanted, last = set(frames), max(frames)
        latents = 1 + -(-last // TEMPORAL_STRIDE)
        whole = pixel_frames(-(-latents // chunk) * chunk)  # streams end with a chunk
        stream = pipe.stream(caption(scene), seed=sample_seed(seed, clip), num_frames=whole)
        every = enumerate(itertools.chain.from_iterable(stream))
        return np.stack([picture for i, picture in itertools.takewhile(lambda x: x[0] <= last, every) if i in wanted])

    return show


def sheet(show: Shown, scenes: Sequence[Scene], frames: Sequence[int]) -> Image.Image:
    """A row a scene, with its caption."""
    font, rows = ImageFont.load_default(10), []
    for i, scene in enumerate(scenes):
        pictures = np.concatenate([np.pad(p, ((0, 2), (0, 2), (0, 0))) for p in show(i, scene, frames)], axis=1)
        head = Image.new("RGB", (pictures.shape[1], LABEL))
        ImageDraw.Draw(head).text((2, 0), caption(scene), "white", font)
        rows += [np.asarray(head), pictures]
    return Image.fromarray(np.concatenate(rows))


def main(arguments: list[str] | None = None) -> int:
    console()
    args = parse(arguments)
    folder = check_writable(args.output, "--output")
    world = World()
    if args.config_path is not None:
        config = load_config(args.config_path, args.overrides)
        check_world(config, "moving")
        show = generated(config, args.seed)
    else:
        show = rendered(world) if args.vae is None else reconstructed(world, args.vae)
    folder.mkdir(parents=True, exist_ok=True)
    even = np.linspace(0, CLIP_FRAMES - 1, args.columns).round().astype(int).tolist()
    scenes = world.scenes(args.seed, args.clips, balanced=True)
    with atomic_path(folder / "sheet.png") as aside:
        sheet(show, sorted(scenes, key=lambda scene: scene.motion), even).save(aside)
    if args.minutes:
        last = int(args.minutes * 60 * FPS) - 1
        even = np.linspace(0, max(last, args.columns - 1), args.columns).round().astype(int)
        even = np.clip(even + 7 * np.arange(args.columns), 0, last).tolist()  # not a whole number of periods apart
        scenes = world.scenes(args.seed + 1, args.streams, balanced=True)
        with atomic_path(folder / "strip.png") as aside:
            sheet(show, sorted(scenes, key=lambda scene: scene.motion), even).save(aside)
    print(f"written to {folder}")
    return 0


if __name__ == "__main__":
    exits.run(main)
