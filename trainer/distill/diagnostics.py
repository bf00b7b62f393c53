"""Signs of a distillation that goes wrong, measured on the student's samples, and what to do about each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STATISTICS = frozenset({"motion", "contrast", "seam", "critic_gap"})
BASELINE_ROWS = 3  # the first logged rows, before training has changed much
RECENT_ROWS = 3  # the newest, so that one odd batch warns of nothing


@torch.no_grad()
def sample_statistics(x: Tensor, real_x0: Tensor, fake_x0: Tensor, chunk_frames: int) -> dict[str, Tensor]:
    """Scalars about samples x [B, F, C, H, W], the teacher's r and the critic's f of their noised copies.

    motion       mean |x_i+1 - x_i| over neighbouring latent frames
    contrast     standard deviation of x over all but the batch
    seam         motion across chunk borders over motion inside chunks; 1 = no seams
    critic_gap   mean |f - x| / mean |r - x|; the critic has seen such samples, so it should be the nearer one
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
    """`bad(now, at the start)` of one logged value, and the sentence to say then."""

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
    """What is wrong with the newest rows compared with the first, as sentences; each once, when it begins."""
    now = _problems(rows)
    before = _problems(rows[:-1])
    return [sentence for name, sentence in now.items() if name not in before]


def _problems(rows: Sequence[Mapping[str, float]]) -> dict[str, str]:
    found = {}
    for check in CHECKS:
        values = [row[check.name] for row in rows if isinstance(row.get(check.name), float)]
        if len(values) < BASELINE_ROWS + RECENT_ROWS:
            continue
        start = sum(values[:BASELINE_ROWS]) / BASELINE_ROWS
        now = sum(values[-RECENT_ROWS:]) / RECENT_ROWS
        if check.bad(now, start):
            found[check.name] = check.sentence.format(now=now, start=start)
    return found
