"""Flow matching of a bidirectional teacher and, with teacher forcing, of a causal student; subclasses give the clips.

    L = mean | v(x_t, t, text) - (eps - x0) |^2        x_t = (1 - sigma) x0 + sigma eps, sigma = t / 1000
"""

from abc import abstractmethod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.geometry import Geometry
from configs.schema import Config
from model.causal_wan import chunk_causal_mask
from model.denoiser import ScoreModel
from model.flow import add_noise, shift_time, v_target
from model.schedule import Schedule
from model.weights.load import save_network
from trainer.build import causal_student, frozen_codec, frozen_text_encoder, score_network
from trainer.clips import draw
from trainer.parallel.apply import ParallelPlan, choose_attention
from trainer.stage import Supervised
from utils.device import pick_dtype
from utils.distributed import Ranks
from utils.seeds import generator

CONTEXT_LOSS_WEIGHT = 0.5  # weight of the loss of noisy context

WHOLE, FIRST = "whole clips", "first chunks"  # kinds of steps


class Bank(Protocol):
    """Encoded clips in memory: `latents` float16 [N, F, C, h, w], and the embedding `null` [1, L, D] of no caption."""

    latents: Tensor
    null: Tensor

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, F, C, h, w] float32 and text [B, L, D] of these clips."""


class FlowStage(Supervised):
    """Common part of both: a bank of latents, timesteps, noise, dropped prompts."""

    def __init__(self, config: Config, device: torch.device, ranks: Ranks, module: nn.Module):
        super().__init__(config, device, ranks, module)
        self.geometry = Geometry.from_config(config).for_network(module.config)
        self.codec = frozen_codec(config, device)
        self.text = frozen_text_encoder(config, device)
        chunks = config.training.flow.first_chunk_clips
        self.bank = self._bank(config.training.bank_clips, config.video.num_latent_frames)
        self.first_chunks = self._bank(chunks, self.geometry.chunk_frames) if chunks else self.bank

    @abstractmethod
    def _bank(self, clips: int, latent_frames: int) -> Bank:
        """So many clips of that length."""

    def _rng(self, step: int, micro: int) -> torch.Generator:
        return generator(self.config.seed, self.name, self.part(step, micro), 0, device=self.device)

    def plan(self, step: int) -> str:
        """Kind of step: whole clips, or first chunks, which teach the words of captions at a fraction of the cost."""
        share = float(torch.rand(1, generator=generator(self.config.seed, "first chunk", step)))
        return WHOLE if share >= self.config.training.flow.first_chunk_share else FIRST

    def _clips(self, step: int, micro: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents [B, F, C, h, w] and text [B, L, D] of a micro-batch."""
        t, whole = self.config.training, self.plan(step) == WHOLE
        size, bank = (t.micro_batch, self.bank) if whole else (t.flow.first_chunk_batch, self.first_chunks)
        x0, text = bank.batch(draw(len(bank.latents), size, self.config.seed, self.part(step, micro), self.device))
        return x0[:, : None if whole else self.geometry.chunk_frames], text

    def _drop(self, text: Tensor, rng: torch.Generator) -> Tensor:
        share = self.config.training.flow.text_dropout
        dropped = torch.rand(len(text), generator=rng, device=self.device) < share
        return torch.where(dropped[:, None, None], self.bank.null, text)

    def _timesteps(self, shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        """Shifted timesteps in (0, 1000], stratified over the first axis."""
        size = shape[0]
        offset = torch.arange(size, device=self.device).view(-1, *[1] * (len(shape) - 1))
        even = (offset + torch.rand(shape, generator=rng, device=self.device)) / size
        return shift_time(1000 * even, self.config.training.flow.shift)

    def _noise(self, like: Tensor, rng: torch.Generator) -> Tensor:
        return torch.randn(like.shape, generator=rng, device=self.device)


class Teacher(FlowStage):
    """A bidirectional network, one timestep a clip."""

    def __init__(self, config: Config, device: torch.device, ranks: Ranks):
        super().__init__(config, device, ranks, score_network(config, "transformer"))
        dtype = pick_dtype(config.training.precision, device)
        choose_attention(self.module, ParallelPlan(config.training, device), dtype)  # the EMA stays in float32

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        rng = self._rng(step, micro)
        x0, text = self._clips(step, micro, rng)
        t = self._timesteps((len(x0),), rng)
        return {"x0": x0, "eps": self._noise(x0, rng), "t": t, "text": self._drop(text, rng)}

    def loss(self, x0: Tensor, eps: Tensor, t: Tensor, text: Tensor) -> dict[str, Tensor]:
        v = ScoreModel(self.module).v(add_noise(x0, eps, t), t, text)
        return {"loss": F.mse_loss(v.float(), v_target(x0, eps))}

    def export(self, folder: Path, step: int) -> None:
        save_network(self.averaged, folder, card={"stage": self.name, "step": step})


class TeacherForcing(FlowStage):
    """A causal student conditioned on real context: one pass over [context ; noisy chunks], one timestep per chunk.

    The context is noised to one of `context_timesteps` (drawn per clip), as in the KV cache of inference: 0 after a
    clean pass, the last timestep of the schedule with diagonal forcing.
    """

    def __init__(self, config: Config, device: torch.device, ranks: Ranks):
        super().__init__(config, device, ranks, causal_student(config, "student"))
        frames = config.video.num_latent_frames
        self.chunks = self.geometry.num_chunks(frames)
        self.mask = chunk_causal_mask(self.geometry, frames, device, teacher_forcing=True, kind="chunks")
        self.frame_ids = torch.arange(frames, device=device).repeat(2)
        self.schedule = Schedule.from_config(config.schedule, config.stream)
        timesteps = [torch.tensor(self.schedule.timesteps(k)) for k in range(self.chunks)]
        self.timesteps = nn.utils.rnn.pad_sequence(timesteps, batch_first=True).to(device)  # [chunks, steps], 0-padded
        self.num_steps = torch.tensor([len(t) for t in timesteps], device=device)
        self.context_timesteps = torch.tensor(config.training.flow.context_timesteps, device=device)

    def _context(self, x0: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The context, noised; its timesteps [B, F]; its target v."""
        drawn = torch.randint(len(self.context_timesteps), (len(x0), 1), generator=rng, device=self.device)
        t = self.context_timesteps[drawn].expand(-1, x0.shape[1])
        eps = self._noise(x0, rng)
        return add_noise(x0, eps, t), t, v_target(x0, eps)

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        rng = self._rng(step, micro)
        x0, text = self._clips(step, micro, rng)
        chunks = self.geometry.num_chunks(x0.shape[1])
        t = self._timesteps((len(x0), chunks), rng).repeat_interleave(self.geometry.chunk_frames, dim=1)
        context, context_t, context_target = self._context(x0[:, :0] if chunks == 1 else x0, rng)
        eps = self._noise(x0, rng)
        x_t, t, loss_mask = self._begin_with_image(x0, add_noise(x0, eps, t), t, rng)
        return {
            "context": context, "context_t": context_t, "context_target": context_target,
            "context_mask": torch.ones_like(context_t),
            "x_t": x_t, "t": t, "loss_mask": loss_mask, "target": v_target(x0, eps), "text": self._drop(text, rng),
        }  # fmt: skip

    def _begin_with_image(self, x0: Tensor, x_t: Tensor, t: Tensor, rng: torch.Generator) -> tuple[Tensor, ...]:
        """x_t and t with a conditioning frame in a share of clips, and the mask [B, F] of frames in the loss."""
        given = torch.rand(len(x0), 1, generator=rng, device=self.device) < self.config.training.image_start
        shown, level, _ = self._context(x0[:, :1], rng)
        first = torch.where(given[:, :, None, None, None], shown, x_t[:, :1])
        times = torch.where(given, level, t[:, :1])
        loss_mask = torch.cat([(~given).float(), torch.ones_like(t[:, 1:])], dim=1)
        return torch.cat([first, x_t[:, 1:]], dim=1), torch.cat([times, t[:, 1:]], dim=1), loss_mask

    def _velocities(self, module: nn.Module, context: Tensor, context_t: Tensor, x_t: Tensor, t: Tensor, text: Tensor):
        """v [B, F, C, h, w] of the context and of every chunk, conditioned on earlier chunks of the context."""
        if not context.shape[1]:
            return context, module(x_t, t, text)
        both, times = torch.cat([context, x_t], dim=1), torch.cat([context_t, t], dim=1)
        return module(both, times, text, mask=self.mask, frame_ids=self.frame_ids).chunk(2, dim=1)

    def _v(self, *args) -> Tensor:
        return self._velocities(*args)[1]

    def _guided(
        self, module: nn.Module, context: Tensor, context_t: Tensor, x_t: Tensor, t: Tensor, text: Tensor
    ) -> Tensor:
        """v of every chunk, float32, with `training.flow.guidance`."""
        v, guidance = self._v(module, context, context_t, x_t, t, text).float(), self.config.training.flow.guidance
        if not guidance:
            return v
        null = self.bank.null.expand_as(text)
        return v + guidance * (v - self._v(module, context, context_t, x_t, t, null).float())

    def loss(
        self, context: Tensor, context_t: Tensor, context_target: Tensor, context_mask: Tensor, x_t: Tensor, t: Tensor,
        loss_mask: Tensor, target: Tensor, text: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Noisy context is a chunk at its last denoising step, so its error is part of the loss."""
        v_context, v = self._velocities(self.module, context, context_t, x_t, t, text)
        noisy = (context_t > 0).float() * context_mask
        context_error = (v_context.float() - context_target).square().mean((2, 3, 4))
        context_loss = (context_error * noisy).sum() / noisy.sum().clamp_min(1)
        error = (v.float() - target).square().mean((2, 3, 4))
        loss = (error * loss_mask).sum() / loss_mask.sum()
        return {
            "loss": loss + CONTEXT_LOSS_WEIGHT * context_loss,
            "chunk_loss": loss, "past_loss": context_loss,
        }  # fmt: skip

    def export(self, folder: Path, step: int) -> None:
        card = {
            "stage": self.name,
            "step": step,
            "schedule": self.schedule.to_dict(),
            "size": [self.config.video.height, self.config.video.width],
            "trained_image_start": self.config.training.image_start > 0,
        }
        save_network(self.averaged, folder, card=card)
