"""Whether a subject that was not seen for a while comes back in the colour that it had.

Legend: B clips, T frames. Each frame is read by itself, so that a subject that comes back in another colour counts as
seen.
"""

import torch
from torch import Tensor

from trainer.world.track import LEAST_AREA, colour_areas

GAP = 12  # frames, a chunk, for which nothing is seen
CLEAR = 0.5  # area, over the largest, of a subject that can be looked at
LOOKED_AT = 12  # clear frames before a gap, and after it, at most
LONGEST_GAP = 36  # frames after which a subject that is gone is not coming back; of the slowest 21 are right


def kept_colour(frames: Tensor, gap: tuple[int, int] | None = None) -> Tensor:
    """[B] of clips [B, T, 3, H, W] with one subject: 1 where its colour is the same after every gap as before it, 0
    where it is not or the subject never comes back, NaN where there is no gap.

    gap: frames from one index to another that are left out, a gap in motions that have none.
    """
    area = colour_areas(frames)[0]
    most, colour = area.max(2)
    seen = most > LEAST_AREA
    clear = seen & (most >= CLEAR * most.quantile(0.9, dim=1, keepdim=True))
    if gap is not None:
        seen[:, gap[0] : gap[1]] = False
    clear &= seen
    rows = [_kept(*(v.tolist() for v in row)) for row in zip(seen, clear, colour, strict=True)]
    return torch.tensor(rows, dtype=torch.float64)


def _kept(seen: list[bool], clear: list[bool], colour: list[int]) -> float:
    answers = []
    for first, end in _gaps(seen):
        before = [colour[t] for t in range(first) if clear[t]][-LOOKED_AT:]
        after = [colour[t] for t in range(end, len(seen)) if clear[t]][:LOOKED_AT]
        if before and after:
            answers.append(_commonest(before) == _commonest(after))
        elif before and end == len(seen) and end - first > LONGEST_GAP:
            answers.append(False)
    return float(all(answers)) if answers else float("nan")


def _gaps(seen: list[bool]) -> list[tuple[int, int]]:
    """First and end of each run of at least GAP frames that show nothing."""
    edges = [t for t in range(len(seen) + 1) if (t > 0 and not seen[t - 1]) != (t < len(seen) and not seen[t])]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= GAP]


def _commonest(values: list[int]) -> int:
    return max(sorted(set(values)), key=values.count)
