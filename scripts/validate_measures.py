"""Detection rates and false alarms of the clip defects, on clips with one known defect each.

    python scripts/validate_measures.py            # a table: injected defects by alarms, in percent of clips
    python scripts/validate_measures.py --decoded  # after H.264, as in files

Clips of the tiny world are rendered without defects; then one defect is injected at a random place.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits

exits.guard(__name__)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.quality.clip_defects import KINDS, find_defects
from trainer.tiny.world import TinyWorld
from utils.clip_measures import as_clip, luma, series
from utils.tables import markdown
from utils.video import VideoWriter, read_video

BORDERS = (9, 21, 33, 45, 57, 69)
FIRST, LAST = 15, 60  # frames between which a defect begins


def flash(clip: Tensor, other: Tensor, rng: np.random.Generator) -> Tensor:
    """One to three frames are brighter or darker by 0.1 to 0.33."""
    at, length = int(rng.integers(FIRST, LAST)), int(rng.integers(1, 4))
    clip[at : at + length] += float(rng.choice([-1, 1]) * rng.uniform(0.1, 0.33))
    return clip


def cut(clip: Tensor, other: Tensor, rng: np.random.Generator) -> Tensor:
    """Another scene begins."""
    at = int(rng.integers(FIRST, LAST))
    return torch.cat((clip[:at], other[at:]))


def freeze(clip: Tensor, other: Tensor, rng: np.random.Generator) -> Tensor:
    """One frame is repeated for 6 to 12 frames; the clip continues as if it had not been."""
    at, length = int(rng.integers(FIRST, LAST)), int(rng.integers(6, 13))
    clip[at : at + length] = clip[at]
    return clip


def blur(clip: Tensor, other: Tensor, rng: np.random.Generator) -> Tensor:
    """8 to 16 frames are blurred with a box filter of 5 pixels."""
    at, length = int(rng.integers(FIRST, LAST)), int(rng.integers(8, 17))
    part = F.pad(clip[at : at + length], (2, 2, 2, 2), mode="replicate")
    clip[at : at + length] = F.avg_pool2d(part, 5, stride=1)
    return clip


def drift(clip: Tensor, other: Tensor, rng: np.random.Generator) -> Tensor:
    """A linear change over the clip: a colour channel rises, or saturation or contrast falls."""
    share = torch.linspace(0, 1, len(clip))[:, None, None, None] * float(rng.uniform(0.5, 0.7))
    kind = int(rng.integers(3))
    if kind == 0:
        clip[:, int(rng.integers(3))] += 0.5 * share[:, 0]
        return clip
    if kind == 1:
        return clip * (1 - share) + luma(clip)[:, None] * share
    return clip * (1 - share) + clip.mean((1, 2, 3), keepdim=True) * share


def seam(clip: Tensor, other: Tensor, rng: np.random.Generator) -> Tensor:
    """Every other chunk is brighter by 2 to 4% of white."""
    edges = (0, *BORDERS, len(clip))
    height = float(rng.uniform(0.02, 0.04))
    for k in range(0, len(edges) - 1, 2):
        clip[edges[k] : edges[k + 1]] += height
    return clip


INJECTED = {"none": lambda clip, other, rng: clip, **{f.__name__: f for f in (flash, cut, freeze, blur, drift, seam)}}


def coded(frames: np.ndarray, folder: str) -> np.ndarray:
    path = Path(folder) / "clip.mp4"
    with VideoWriter(path, 16, frames.shape[1:3]) as video:
        video.write(frames)
    return read_video(path)


def confusion(clips: int, seed: int, decoded: bool) -> dict[str, dict[str, int]]:
    """{injected defect: {alarm: number of clips}}, with the same scenes for each defect."""
    world = TinyWorld()
    scenes = world.scenes(seed, clips + 1, balanced=True)
    counts_by_defect = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, inject in INJECTED.items():
            rng = np.random.default_rng(seed)
            counts = dict.fromkeys(KINDS, 0)
            for scene, other in zip(scenes, scenes[1:], strict=False):
                clean, second = (world.render([s])[0].add(1).div(2) for s in (scene, other))
                frames = inject(clean, second, rng).clamp(0, 1).mul(255).round().byte()
                if decoded:
                    frames = as_clip(coded(frames.permute(0, 2, 3, 1).contiguous().numpy(), folder))
                for kind in {defect.kind for defect in find_defects(series(frames), BORDERS)}:
                    counts[kind] += 1
            counts_by_defect[name] = counts
    return counts_by_defect


def table(counts_by_defect: dict[str, dict[str, int]], clips: int) -> str:
    """As Markdown: injected defects as rows, alarms as columns, in percent of clips."""
    rows = [["injected \\ alarm", *KINDS]]
    for name, counts in counts_by_defect.items():
        rows.append([name, *(f"{100 * counts[kind] / clips:.0f}" for kind in KINDS)])
    return markdown(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = exits.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=100, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decoded", action="store_true", help="write and read each clip as H.264 first")
    args = parser.parse_args(arguments)
    print(table(confusion(args.clips, args.seed, args.decoded), args.clips))
    return 0


if __name__ == "__main__":
    exits.run(main)
