"""Defects of a clip: flashes, cuts, freezes, blurred stretches, drifting colours, seams at chunk borders.

Each is a rule for the measures of utils/clip_measures.py. A defect should not trigger the rule of another: colour and
sharpness are compared within a shot, the jump after a freeze is no cut, and a flash is no pair of cuts. Their accuracy
on clips with known defects is in docs/benchmarks/tiny-world.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.clip_measures import FAR, FrameSeries, colour_change, flicker, relative_change, repeats, runs

FLASH = 0.02  # brightness; 5 of 255 levels for at most 3 frames
CUT = (0.05, 6.0)  # a step is one from this brightness and this many times the clip's middling step on
LASTING = 0.5  # share of a cut's step by which frames before and after it still differ
FREEZE = 4  # frames in a row that repeat the one before; a quarter of a second at 16 a second
BLUR = (0.66, 4)  # sharpness below this share of its shot's median, for at least so many frames
DRIFT = (12.0, 0.25, 0.35)  # levels of mean colour; change of contrast; change of saturation
SEAM = (1.6, 0.3)  # median step at borders over that inside; levels of 255 that it must exceed it by

KINDS = ("flash", "cut", "freeze", "blur", "drift", "seam")


@dataclass(frozen=True)
class Defect:
    """One finding, from pixel frame `first` to `last`, both included."""

    kind: str
    first: int
    last: int


def find_defects(measures: FrameSeries, borders: Sequence[int]) -> list[Defect]:
    """All defects of one clip, in the order of KINDS."""
    if measures.frames < 2:
        return []
    flashes = [Defect("flash", a, b) for a, b in runs(flicker(measures.luma) > FLASH)]
    freezes = [Defect("freeze", a + 1, b + 1) for a, b in runs(repeats(measures.steps)) if b - a + 1 >= FREEZE]
    cuts = _cuts(measures, freezes)
    edges = [0, *(cut.first for cut in cuts), measures.frames]
    shots = [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    longest = max(shots, key=lambda shot: shot.stop - shot.start)
    still = [*flashes, *cuts, *freezes]
    return [*still, *_blurs(measures, shots), *_drift(measures, longest, flashes), *_seams(measures, borders, cuts)]


def _cuts(measures: FrameSeries, freezes: list[Defect]) -> list[Defect]:
    """Frames that differ from the one before, and whose surroundings go on to differ, so that a flash is none."""
    steps, far = measures.steps, measures.far_steps
    least = max(CUT[0], CUT[1] * float(steps.median()))
    thawed = {freeze.last + 1 for freeze in freezes}
    cuts = []
    for t in (i + 1 for i in torch.nonzero(steps > least).flatten().tolist()):  # frame t differs from t - 1
        needed = LASTING * float(steps[t - 1])
        # pairs that span the cut: (t - 1, t + 3) and (t - 4, t), each where both frames exist
        spans = [far[i] for i in (t - 1, t - FAR) if 0 <= i < len(far)]
        if t not in thawed and all(float(span) >= needed for span in spans):
            cuts.append(Defect("cut", t, t))
    return cuts


def _blurs(measures: FrameSeries, shots: list[slice]) -> list[Defect]:
    blurs = []
    for shot in shots:
        sharpness = measures.sharpness[shot]
        for a, b in runs(sharpness < BLUR[0] * sharpness.median()):
            if b - a + 1 >= BLUR[1]:
                blurs.append(Defect("blur", shot.start + a, shot.start + b))
    return blurs


def _drift(measures: FrameSeries, shot: slice, flashes: list[Defect]) -> list[Defect]:
    """At most one, over the longest shot, without the frames of flashes."""
    use = torch.zeros(measures.frames, dtype=torch.bool)
    use[shot] = True
    for flash in flashes:
        use[flash.first : flash.last + 1] = False
    if not use.any():
        return []
    changes = (
        colour_change(measures.rgb[use]),
        relative_change(measures.contrast[use]),
        relative_change(measures.saturation[use]),
    )
    drifted = any(change > limit for change, limit in zip(changes, DRIFT, strict=True))
    return [Defect("drift", shot.start, shot.stop - 1)] if drifted else []


def _seams(measures: FrameSeries, borders: Sequence[int], cuts: list[Defect]) -> list[Defect]:
    """At most one, over the whole clip: the middling border against the middling frame, cuts left out of both."""
    steps: Tensor = measures.steps
    use = torch.ones(len(steps), dtype=torch.bool)
    use[[cut.first - 1 for cut in cuts]] = False
    at = torch.zeros_like(use)
    at[[b - 1 for b in borders if 0 < b <= len(steps)]] = True
    if not (at & use).any() or not (~at & use).any():
        return []
    border, inside = float(steps[at & use].median()), float(steps[~at & use].median())
    seen = border > SEAM[0] * inside and 255 * (border - inside) > SEAM[1]
    return [Defect("seam", 0, measures.frames - 1)] if seen else []
