"""Clips of the tiny world with one known defect each, injected at a random place, and the alarms that they set off."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.quality.clip_defects import KINDS, find_defects
from trainer.tiny.world import TinyWorld
from utils.clip_measures import luma, series

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


def confusion(clips: int, seed: int) -> dict[str, dict[str, int]]:
    """{injected defect: {alarm: number of clips}}, with the same scenes for each defect."""
    world = TinyWorld()
    scenes = world.scenes(seed, clips + 1, balanced=True)
    counts_by_defect = {}
    for name, inject in INJECTED.items():
        rng = np.random.default_rng(seed)
        counts = dict.fromkeys(KINDS, 0)
        for scene, other in zip(scenes, scenes[1:], strict=False):
            clean, second = (world.render([s])[0].add(1).div(2) for s in (scene, other))
            frames = inject(clean, second, rng).clamp(0, 1).mul(255).round().byte()
            for kind in {defect.kind for defect in find_defects(series(frames), BORDERS)}:
                counts[kind] += 1
        counts_by_defect[name] = counts
    return counts_by_defect
