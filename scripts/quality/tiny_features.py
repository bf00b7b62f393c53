"""How clips of the tiny world look as a set: drift, diversity, and the distance to other clips.

Legend: B clips, T pixel frames; frames are uint8 or float in [-1, 1], [B, T, 3, H, W]; `measured` is what
`tiny_measures.measure` gives for them.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.clip_measures import unit_frames

MOMENTS = 8  # of a clip, evenly spaced, that its features look at
NEXT = 4  # frames between the two pictures that motion is read from
FEATURES = 64


def saturation_drift(measured: dict[str, Tensor]) -> Tensor:
    """[B] relative change of the subject's chroma from the first quarter of the clip to the last; 0 = none.

    NaN where the subject is missing from either quarter.
    """
    quarter = max(1, measured["saturation"].shape[1] // 4)
    value = torch.where(measured["present"], measured["saturation"], torch.nan)
    return value[:, -quarter:].nanmean(1) / value[:, :quarter].nanmean(1) - 1


def start_spread(measured: dict[str, Tensor], expected: Tensor | None = None) -> float:
    """Pixels: root of the summed variances of the start positions, of clips whose subject was seen.

    expected [B, 2]: `TinyWorld.expected_starts`; the spread is then that which the captions leave open, so that a
    model that always starts at the middle of what is possible shows none. NaN for fewer than two clips.
    """
    seen = measured["present"].any(1)
    start = measured["start"] if expected is None else measured["start"] - expected
    return float(start[seen].double().var(0).sum().sqrt()) if int(seen.sum()) > 1 else float("nan")


def heading_spread(measured: dict[str, Tensor]) -> float:
    """Circular variance 1 - R of the headings of moving subjects, R their mean resultant length (Mardia and Jupp,
    Directional Statistics, 2.3): 0 if all go one way, 1 if they go evenly in all directions; NaN if nothing moves.
    """
    angle = torch.deg2rad(measured["heading"][measured["direction"] >= 0].double())
    if not len(angle):
        return float("nan")
    return 1.0 - float(torch.complex(angle.cos().mean(), angle.sin().mean()).abs())


@cache
def _filters() -> tuple[Tensor, Tensor, Tensor]:
    """Two random convolutions and a projection. `RandomState` is frozen by NumPy: the same numbers in every version."""
    random = np.random.RandomState(0)
    shapes = ((24, 6, 5, 5), (32, 24, 3, 3), (32 * 6, FEATURES - 32))
    scales = (2.0 / np.sqrt(6 * 25), 2.0 / np.sqrt(24 * 9), 1.0 / np.sqrt(6))
    first, second, mix = (
        torch.from_numpy(random.standard_normal(s) * scale).float() for s, scale in zip(shapes, scales, strict=True)
    )
    return first - first.mean((2, 3), keepdim=True) * 0.5, second, mix


def clip_features(frames: Tensor) -> Tensor:
    """[B, 64] fixed features of clips, for `frechet_distance`.

    At 8 moments, the picture and its change over 4 frames (6 channels, halved in size) go through two fixed random
    convolutions with ReLU. 32 features are the responses' mean over space and time (what is there), 32 a random mix of
    their means over a 2 x 3 grid (where it is).
    """
    b, t = frames.shape[:2]
    first, second, mix = (w.to(frames.device) for w in _filters())
    moments = torch.linspace(0, max(0, t - 1 - NEXT), MOMENTS).round().long().tolist()
    sums = []
    for moment in moments:
        now, then = unit_frames(frames[:, moment]), unit_frames(frames[:, min(moment + NEXT, t - 1)])
        picture = F.avg_pool2d(torch.cat((2 * now - 1, 4 * (then - now)), dim=1), 2)
        sums.append(F.relu(F.conv2d(F.relu(F.conv2d(picture, first, stride=2)), second, stride=2)))
    response = torch.stack(sums).mean(0)
    grid = F.adaptive_avg_pool2d(response, (2, 3)).flatten(1)
    return torch.cat((response.mean((2, 3)), grid @ mix), dim=1)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) of features [n, D] and [m, D], in float64.

    Heusel et al., arXiv 1706.08500, eq. 6. Biased upwards for few clips: compare only figures of equal n.
    """
    a, b = a.double().cpu(), b.double().cpu()
    if len(a) < 2 or len(b) < 2:
        return float("nan")
    spread_a, spread_b = torch.atleast_2d(a.T.cov()), torch.atleast_2d(b.T.cov())
    values, vectors = torch.linalg.eigh(spread_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ spread_b @ root).clamp_min(0).sqrt().sum()
    gap = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(gap + spread_a.trace() + spread_b.trace() - 2 * cross))  # rounding can go below 0
