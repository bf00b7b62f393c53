"""Stage `few_steps`: a causal student is trained at the timesteps of its schedule and on its own predictions.

Flow matching at the timesteps of each chunk. In a share of clips (`flow.self_rollout_ratio`) later chunks and their
context are replaced by the student's own predictions: those of the previous step, noised to the current timestep. The
target stays the real clip, so the student learns to correct errors and they do not accumulate over chunks. One forward
pass without gradients gives the predictions of all chunks at once, each conditioned on real context.

First chunks have no context, so their first steps predict a blurred mean. They can be trained on trajectories of a
many-step student instead of real clips (`flow.first_chunk_trajectories`): each noise then has one sharp end point
(CausVid, arXiv 2412.07772, sec. 4.3).

In a share of clips the prompt changes at the border of a chunk (`flow.switched_share`). Chunks before the change then
only serve as context, under the new prompt, as in a recached stream.

    x_t = (1 - sigma) x0(x_s, s) + sigma eps       s the timestep before t in the row
    L = mean | v(x_t, t) - (x_t - x0) / sigma |^2  which is eps - x0 where the prediction is right
"""

import torch
from torch import Tensor
from tqdm import tqdm

from configs.schema import Config
from model.flow import add_noise, euler_v, integrate, v_from_x0, x0_from_v
from trainer.build import causal_student
from trainer.clips import draw
from trainer.flow import FIRST, WHOLE
from trainer.tiny.data import SwitchedBank
from trainer.tiny.flow import TeacherForcing
from trainer.trajectories import trajectory_grid
from utils.device import pick_dtype
from utils.distributed import Ranks
from utils.seeds import generator

TEACHER_BATCH = 128  # first chunks that the teacher generates at once


class FewSteps(TeacherForcing):
    """In a share `training.flow.self_rollout_ratio` of clips all chunks but the first are predictions."""

    name = "few_steps"

    def __init__(self, config: Config, device: torch.device, ranks: Ranks):
        super().__init__(config, device, ranks)
        flow, frames = config.training.flow, config.video.num_latent_frames
        self.switched, self.states = None, None
        if flow.switched_share:
            chunk = self.geometry.chunk_frames
            self.switched = self._bank(flow.switched_clips, frames, SwitchedBank, chunk_frames=chunk)
        if flow.first_chunk_trajectories:
            self.states = self._trajectories(flow.first_chunk_trajectories)

    @torch.no_grad()
    def _trajectories(self, clips: int) -> Tensor:
        """float16 [N, steps + 1, f, C, h, w]: a teacher's first chunks at the timesteps of the first row, and at 0."""
        c, row = self.config, self.schedule.timesteps(0)
        teacher = causal_student(c, "teacher").to(self.device).eval()
        if c.training.compile:
            teacher.compile_repeated_blocks(fullgraph=True)
        grid = trajectory_grid([row], c.training.flow.ode_interval, c.schedule.shift)
        texts = self.first_chunks.text[:clips]
        dtype, parts = pick_dtype(c.training.precision, self.device), []
        first = range(0, len(texts), TEACHER_BATCH)
        for i in tqdm(first, desc="first chunks of the teacher", leave=False, disable=None):
            text = texts[i : i + TEACHER_BATCH]
            like = self.first_chunks.latents[: len(text), : self.geometry.chunk_frames].float()
            x = self._noise(like, generator(c.seed, "first chunk trajectories", i, device=self.device))
            none = like[:, :0], x.new_zeros(len(x), 0)
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                parts.append(integrate(
                    lambda x, t, t_next, text=text, none=none: euler_v(
                        x, self._guided(teacher, *none, x, x.new_full(x.shape[:2], t), text), t, t_next
                    ), x, grid, [*row, 0.0],
                ).half())  # fmt: skip
        return torch.cat(parts)

    def _first_chunks(self, step: int, micro: int) -> dict[str, Tensor]:
        """First chunks at a timestep of their trajectories, as arguments of the loss of teacher forcing."""
        rng = self._rng(step, micro)
        size = self.config.training.flow.first_chunk_batch
        index = draw(len(self.states), size, self.config.seed, self.part(step, micro), self.device)
        steps = torch.randint(self.states.shape[1] - 1, (size,), generator=rng, device=self.device)
        x_t, x0 = self.states[index, steps].float(), self.states[index, -1].float()
        t = self.timesteps[0, steps][:, None].expand(x0.shape[:2])
        return {
            "context": x0[:, :0], "context_t": t[:, :0], "context_target": x0[:, :0], "context_mask": t[:, :0],
            "x_t": x_t, "t": t, "target": v_from_x0(x_t, x0, t), "loss_mask": torch.ones_like(t),
            "text": self.first_chunks.text[index],
        }  # fmt: skip

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        if self.plan(step) == FIRST and self.states is not None:
            return self._first_chunks(step, micro)
        if self.plan(step) != WHOLE:
            return super().batch(step, micro)
        rng = self._rng(step, micro)
        x0, text, late = self._with_changes(*self._clips(step, micro, rng), rng)
        drawn = self._steps((len(x0), self.chunks), rng)
        t, previous_t = (level.repeat_interleave(self.geometry.chunk_frames, dim=1) for level in drawn)
        ratio, frames = self.config.training.flow.self_rollout_ratio, torch.arange(x0.shape[1], device=self.device)
        self_rollout = torch.rand(len(x0), 1, generator=rng, device=self.device) < ratio
        self_rollout = self_rollout & late & (frames >= self.geometry.chunk_frames)
        previous_t = torch.where(self_rollout, previous_t, t)
        context, context_t, _ = self._context(x0, rng)
        x_previous = add_noise(x0, self._noise(x0, rng), previous_t)
        x_previous, previous_t, loss_mask = self._begin_with_image(x0, x_previous, previous_t, rng)
        if self.states is not None:  # only first chunks with a conditioning frame are trained on here
            loss_mask[:, : self.geometry.chunk_frames] *= 1 - loss_mask[:, :1]
        return {
            "x0": x0, "text": self._drop(text, rng), "context": context, "context_t": context_t,
            "x_previous": x_previous, "previous_t": previous_t, "t": torch.where(self_rollout, t, previous_t),
            "self_rollout": self_rollout, "loss_mask": loss_mask * late, "context_mask": late.float(),
            "eps": self._noise(x0, rng), "context_eps": self._noise(x0, rng),
        }  # fmt: skip

    def _with_changes(self, x0: Tensor, text: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Replace a share of clips by clips whose prompt changes; bool [B, F]: frames that follow the prompt."""
        late = torch.ones(x0.shape[:2], dtype=torch.bool, device=self.device)
        if self.switched is None:
            return x0, text, late
        changes = torch.rand(len(x0), generator=rng, device=self.device) < self.config.training.flow.switched_share
        index = torch.randint(len(self.switched.latents), (len(x0),), generator=rng, device=self.device)
        after = torch.arange(x0.shape[1], device=self.device) >= self.switched.switch[index][:, None]
        return (
            torch.where(changes[:, None, None, None, None], self.switched.latents[index].float(), x0),
            torch.where(changes[:, None, None], self.switched.text[index], text),
            after | ~changes[:, None],
        )

    def _timesteps(self, shape: tuple[int, int], rng: torch.Generator) -> Tensor:
        """[B, chunks]: one of the timesteps of each chunk."""
        return self._steps(shape, rng)[0]

    def _steps(self, shape: tuple[int, int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """[B, chunks] each: a timestep of each chunk, and the one before it (for the first, itself)."""
        chunks = torch.arange(shape[1], device=self.device)
        share = torch.rand(shape, generator=rng, device=self.device)
        index = (share * self.num_steps[: shape[1]]).long()
        return self.timesteps[chunks, index], self.timesteps[chunks, (index - 1).clamp_min(0)]

    def loss(self, **batch: Tensor) -> dict[str, Tensor]:
        return super().loss(**(self._roll_out(**batch) if "self_rollout" in batch else batch))

    @torch.no_grad()
    def _roll_out(
        self, x0: Tensor, text: Tensor, context: Tensor, context_t: Tensor, x_previous: Tensor, previous_t: Tensor,
        t: Tensor, self_rollout: Tensor, eps: Tensor, context_eps: Tensor, **masks: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Arguments of the loss of teacher forcing: frames of `self_rollout` are predicted by the student from
        `x_previous`, at the timestep `previous_t`."""
        v = self._v(self.module, context, context_t, x_previous, previous_t, text).float()
        predicted = x0_from_v(x_previous, v, previous_t)
        in_chunks, in_context = self_rollout & (t < previous_t), self_rollout & (context_t > 0)
        x_t = torch.where(in_chunks[:, :, None, None, None], add_noise(predicted, eps, t), x_previous)
        noised = add_noise(predicted, context_eps, context_t)
        context = torch.where(in_context[:, :, None, None, None], noised, context)
        return {
            "context": context, "context_t": context_t, "x_t": x_t, "t": t, "text": text, **masks,
            # clean frames (t = 0) are masked
            "context_target": v_from_x0(context, x0, context_t.clamp_min(1)),
            "target": v_from_x0(x_t, x0, t.clamp_min(1)),
        }  # fmt: skip
