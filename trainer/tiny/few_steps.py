"""Stage `few_steps`: a causal student practises the timesteps that its schedule takes, and its own mistakes.

Flow matching at the timesteps of each chunk's row. A chunk after the first follows from its past but for a little, so
in a share of clips it is shown as the student itself would have it: its prediction from the step before, noised to the
timestep of the step at hand, after a past that is predicted, too. The target stays the real clip, so errors of one step
are mended in the next and do not grow from chunk to chunk. One forward pass without gradients gives the predictions,
of all chunks at once, each from its real past.

A first chunk has no past, and what its first steps predict is a blur of all that the prompt allows. So first chunks can
be learnt from trajectories of a many-step student in place of real clips (`flow.first_chunk_trajectories`): each noise
then has one end, and that is sharp (CausVid, arXiv 2412.07772, sec. 4.3).

In a share of clips the prompt changes at the border of a chunk (`flow.switched_share`). The chunks before it are then
only the past of those after it, under the later prompt, as a stream's cache holds them after the change.

    x_t = (1 - sigma) x0(x_s, s) + sigma eps       s the timestep before t in the row
    L = mean | v(x_t, t) - (x_t - x0) / sigma |^2  which is eps - x0 where the prediction is right
"""

import torch
from torch import Tensor
from tqdm import tqdm

from configs.schema import Config
from model.flow import add_noise, euler_v, integrate, v_from_x0, x0_from_v
from trainer.build import causal_student
from trainer.tiny.data import SwitchedBank, draw
from trainer.tiny.flow import FIRST, WHOLE, TeacherForcing
from trainer.trajectories import trajectory_grid
from utils.device import pick_dtype
from utils.distributed import Ranks
from utils.seeds import generator

TEACHER_BATCH = 128  # first chunks that a teacher makes at once


class FewSteps(TeacherForcing):
    """Of the clips of `training.flow.self_rollout_ratio`, every chunk but the first is the student's own."""

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
        for i in tqdm(range(0, len(texts), TEACHER_BATCH), desc="first chunks of the teacher", leave=False):
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
        """First chunks at a timestep of their trajectories, as the loss of teacher forcing takes them."""
        rng, name = self._rng(step, micro), step * self.micro_batches + micro
        size = self.config.training.flow.first_chunk_batch
        index = draw(len(self.states), size, self.config.seed, name, self.ranks.rank, self.device)
        steps = torch.randint(self.states.shape[1] - 1, (size,), generator=rng, device=self.device)
        x_t, x0 = self.states[index, steps].float(), self.states[index, -1].float()
        t = self.rows[0, steps][:, None].expand(x0.shape[:2])
        return {
            "past": x0[:, :0], "past_t": t[:, :0], "past_target": x0[:, :0], "past_counts": t[:, :0],
            "x_t": x_t, "t": t, "target": v_from_x0(x_t, x0, t), "counts": torch.ones_like(t),
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
        t, before = (level.repeat_interleave(self.geometry.chunk_frames, dim=1) for level in drawn)
        own = torch.rand(len(x0), 1, generator=rng, device=self.device) < self.config.training.flow.self_rollout_ratio
        own = own & late & (torch.arange(x0.shape[1], device=self.device) >= self.geometry.chunk_frames)
        before = torch.where(own, before, t)
        past, past_t, _ = self._context(x0, rng)
        first, before, counts = self._begin_with_image(x0, add_noise(x0, self._noise(x0, rng), before), before, rng)
        if self.states is not None:  # first chunks are learnt from trajectories, but for those that a frame begins
            counts[:, : self.geometry.chunk_frames] *= 1 - counts[:, :1]
        return {
            "x0": x0, "text": self._drop(text, rng), "past": past, "past_t": past_t, "first": first, "before": before,
            "t": torch.where(own, t, before), "own": own, "counts": counts * late, "past_counts": late.float(),
            "eps": self._noise(x0, rng), "past_eps": self._noise(x0, rng),
        }  # fmt: skip

    def _with_changes(self, x0: Tensor, text: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Some clips replaced by such whose prompt changes; bool [B, F] says which frames follow from the prompt."""
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
        """[B, chunks]: for each chunk one of the timesteps of its row."""
        return self._steps(shape, rng)[0]

    def _steps(self, shape: tuple[int, int], rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """[B, chunks] each: for each chunk a timestep of its row, and the one before it (of the first, itself)."""
        chunks = torch.arange(shape[1], device=self.device)
        share = torch.rand(shape, generator=rng, device=self.device)
        index = (share * self.row_lengths[: shape[1]]).long()
        return self.rows[chunks, index], self.rows[chunks, (index - 1).clamp_min(0)]

    def loss(self, **batch: Tensor) -> dict[str, Tensor]:
        return super().loss(**(self._own(**batch) if "own" in batch else batch))

    @torch.no_grad()
    def _own(self, x0, text, past, past_t, first, before, t, own, eps, past_eps, **counts) -> dict[str, Tensor]:
        """What the loss of teacher forcing takes: `own` frames as predicted from `first`, at the timestep `before`."""
        predicted = x0_from_v(first, self._v(self.module, past, past_t, first, before, text).float(), before)
        again, shown = (own & (t < before))[:, :, None, None, None], (own & (past_t > 0))[:, :, None, None, None]
        x_t = torch.where(again, add_noise(predicted, eps, t), first)
        past = torch.where(shown, add_noise(predicted, past_eps, past_t), past)
        return {
            "past": past, "past_t": past_t, "x_t": x_t, "t": t, "text": text, **counts,
            # A clean frame (t = 0) is not graded
            "past_target": v_from_x0(past, x0, past_t.clamp_min(1)), "target": v_from_x0(x_t, x0, t.clamp_min(1)),
        }  # fmt: skip
