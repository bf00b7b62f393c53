"""How different clips are in what their captions leave open: places, phases and headings."""

import math

import torch
from torch import Tensor

from trainer.world.captions import MOTIONS, VALUES


def spread(measured: dict[str, Tensor], data: dict[str, Tensor], left_open: Tensor) -> dict[str, float]:
    """Spread of starts, phases and headings of clips, over that of rendered clips of the same captions.

    measured, data: what `measure` gives. Starts: root of the summed variances of the subject's mean place, about the
    mean of its motion. Phases: circular variance. Headings: entropy of left and right, and of clockwise and
    counterclockwise, in clips whose captions leave the direction open: `left_open`, bool [B]. NaN where the data itself
    has none.
    """
    free, known = ({name: rows[name][left_open] for name in ("motion", "direction")} for rows in (measured, data))
    pairs = {
        "starts": (_starts(measured), _starts(data)),
        "phases": (_phases(measured), _phases(data)),
        "headings": (_headings(free), _headings(known)),
    }
    return {name: a / b if b > 1e-3 else math.nan for name, (a, b) in pairs.items()}


def _starts(measured: dict[str, Tensor]) -> float:
    total, count = 0.0, 0
    for kind in range(len(MOTIONS)):
        place = torch.stack([measured["x"], measured["y"]], dim=1)[measured["motion"] == kind].double()
        if len(place) > 1:
            total += float((place - place.mean(0)).square().sum())
            count += len(place) - 1
    return math.sqrt(total / count) if count else math.nan


def _phases(measured: dict[str, Tensor]) -> float:
    phase = measured["phase"][~measured["phase"].isnan()] * 2 * math.pi
    return 1 - float(torch.polar(torch.ones_like(phase), phase).mean().abs()) if len(phase) else math.nan


def _headings(measured: dict[str, Tensor]) -> float:
    """Mean entropy in bits of the direction over motions that have one."""
    values = []
    for kind in range(len(MOTIONS)):
        index = measured["direction"][(measured["motion"] == kind) & (measured["direction"] >= 0)]
        if len(index) > 1:
            share = torch.bincount(index, minlength=len(VALUES["direction"])).double() / len(index)
            values.append(float(-(share * share.clamp_min(1e-12).log2()).sum()))
    return sum(values) / len(values) if values else math.nan
