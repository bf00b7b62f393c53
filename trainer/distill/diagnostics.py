"""Diagnostics of a distillation, measured on the student's samples, and a remedy for each problem."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STATISTICS = frozenset({"motion", "contrast", "seam", "critic_gap"})
BASELINE_ROWS = 3  # first logged rows
RECENT_ROWS = 3  # newest logged rows, averaged so that a single batch does not warn


@torch.no_grad()
def sample_statistics(x: Tensor, real_x0: Tensor, fake_x0: Tensor, chunk_frames: int) -> dict[str, Tensor]:
    """Statistics of samples x [B, F, C, H, W] and of the x0 of their noised copies: teacher's r, critic's f.

    motion       mean |x_i+1 - x_i| over neighbouring latent frames
    contrast     standard deviation of x over all but the batch
    seam         motion across chunk borders over motion inside chunks; 1 = no seams
    critic_gap   mean |f - x| / mean |r - x|; should be below 1, since the critic is trained on such samples
    """
    x, r, f = x.float(), real_x0.float(), fake_x0.float()
    steps = (x[:, 1:] - x[:, :-1]).abs().flatten(2).mean(2)[:, 1:]  # the first latent is of one frame, not of four
    border = (torch.arange(2, x.shape[1], device=x.device) % chunk_frames) == 0
    inside = (steps * ~border).sum() / (~border).sum().clamp_min(1)
    across = (steps * border).sum() / border.sum().clamp_min(1)
    return {
        "motion": steps.mean(),
        "contrast": x.flatten(1).std(1).mean(),
        "seam": across / inside.clamp_min(1e-12),
        "critic_gap": (f - x).abs().mean() / (r - x).abs().mean().clamp_min(1e-12),
    }


@dataclass(frozen=True)
class Check:
    """A condition `bad(now, start)` on a logged value, and its warning."""

    name: str
    bad: Callable[[float, float], bool]
    sentence: str


CHECKS = (
    Check(
        "critic_gap",
        lambda now, start: now > 1.5 and now > start,
        "the critic lags behind the student (its x0 is {now:.2f} times as far from the samples as the teacher's); "
        "raise training.distill.critic_optimizer.lr or training.distill.dfake_gen_update_ratio",
    ),
    Check(
        "motion",
        lambda now, start: now < 0.5 * start,
        "motion is collapsing (from {start:.3g} to {now:.3g}); raise training.distill.flow.weight or lower "
        "training.optimizer.lr",
    ),
    Check(
        "contrast",
        lambda now, start: now > 1.3 * start,
        "contrast drifts (from {start:.3g} to {now:.3g}), which shows as saturated colours; lower "
        "training.distill.guidance or training.optimizer.lr",
    ),
    Check(
        "seam",
        lambda now, start: now > 1.5 and now > 1.2 * start,
        "chunks jump at their borders ({now:.2f} times the motion inside them); check that the student was initialised "
        "causally and that training.distill.context_grad is on",
    ),
)


def warnings(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Warnings on the newest rows compared with the first ones; each is given once, when it begins."""
    now = _problems(rows)
    before = _problems(rows[:-1])
    return [sentence for name, sentence in now.items() if name not in before]


def _problems(rows: Sequence[Mapping[str, float]]) -> dict[str, str]:
    problems = {}
    for check in CHECKS:
        values = [row[check.name] for row in rows if isinstance(row.get(check.name), float)]
        if len(values) < BASELINE_ROWS + RECENT_ROWS:
            continue
        start = sum(values[:BASELINE_ROWS]) / BASELINE_ROWS
        now = sum(values[-RECENT_ROWS:]) / RECENT_ROWS
        if check.bad(now, start):
            problems[check.name] = check.sentence.format(now=now, start=start)
    return problems
