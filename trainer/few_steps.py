"""Stage `few_steps`: a causal student practises the timesteps that its schedule takes, and its own mistakes.

Flow matching at the timesteps of each chunk's row. A chunk after the first follows from its past but for a little, so
in a share of clips it is shown as the student itself would have it: its prediction from the step before, noised to the
timestep of the step at hand, after a past that is predicted, too. The target stays the real clip, so errors of one step
are mended in the next and do not grow from chunk to chunk. One forward pass without gradients gives the predictions,
of all chunks at once, each from its real past.

    x_t = (1 - sigma) x0(x_s, s) + sigma eps       s the timestep before t in the row
    L = mean | v(x_t, t) - (x_t - x0) / sigma |^2  which is eps - x0 where the prediction is right
"""

import torch
from torch import Tensor

from model.flow import add_noise, v_from_x0, x0_from_v
from trainer.flow_stages import WHOLE, TeacherForcing


class FewSteps(TeacherForcing):
    """Of the clips of `training.flow.own_share`, every chunk but the first is the student's own."""

    name = "few_steps"

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        if self.plan(step) != WHOLE:
            return super().batch(step, micro)
        rng = self._rng(step, micro)
        x0, text = self._clips(step, micro, rng)
        drawn = self._steps((len(x0), self.chunks), rng)
        t, before = (level.repeat_interleave(self.geometry.chunk_frames, dim=1) for level in drawn)
        own = torch.rand(len(x0), 1, generator=rng, device=self.device) < self.config.training.flow.own_share
        own = own & (torch.arange(x0.shape[1], device=self.device) >= self.geometry.chunk_frames)
        before = torch.where(own, before, t)
        past, past_t, _ = self._context(x0, rng)
        first, before, counts = self._begin_with_image(x0, add_noise(x0, self._noise(x0, rng), before), before, rng)
        return {
            "x0": x0, "text": self._drop(text, rng), "past": past, "past_t": past_t, "first": first, "before": before,
            "t": torch.where(own, t, before), "own": own, "counts": counts,
            "eps": self._noise(x0, rng), "past_eps": self._noise(x0, rng),
        }  # fmt: skip

    def _timesteps(self, shape: tuple[int, int], rng: torch.Generator) -> Tensor:
        """[B, chunks]: for each chunk one of the timesteps of its row."""
        return self._steps(shape, rng)[0]

    def _steps(self, shape: tuple[int, int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """[B, chunks] each: for each chunk a timestep of its row, and the one before it (of the first, itself)."""
        share = torch.rand(shape, generator=rng, device=self.device)
        rows = [torch.tensor(self.schedule.row(k), device=self.device) for k in range(shape[1])]
        index = [(share[:, k] * len(row)).long() for k, row in enumerate(rows)]
        drawn = torch.stack([row[i] for row, i in zip(rows, index, strict=True)], dim=1)
        before = torch.stack([row[(i - 1).clamp_min(0)] for row, i in zip(rows, index, strict=True)], dim=1)
        return drawn, before

    def loss(self, **batch: Tensor) -> dict[str, Tensor]:
        return super().loss(**(self._own(**batch) if "own" in batch else batch))

    @torch.no_grad()
    def _own(self, x0, text, past, past_t, first, before, t, own, counts, eps, past_eps) -> dict[str, Tensor]:
        """What the loss of teacher forcing takes: `own` frames as predicted from `first`, at the timestep `before`."""
        predicted = x0_from_v(first, self._v(self.module, past, past_t, first, before, text).float(), before)
        again, shown = (own & (t < before))[:, :, None, None, None], (own & (past_t > 0))[:, :, None, None, None]
        x_t = torch.where(again, add_noise(predicted, eps, t), first)
        past = torch.where(shown, add_noise(predicted, past_eps, past_t), past)
        return {
            "past": past, "past_t": past_t, "x_t": x_t, "t": t, "counts": counts, "text": text,
            # A clean frame (t = 0) is not graded
            "past_target": v_from_x0(past, x0, past_t.clamp_min(1)), "target": v_from_x0(x_t, x0, t.clamp_min(1)),
        }  # fmt: skip
