"""Stages `pretrain` (the teacher) and `teacher_forcing` (a causal student): flow matching on the tiny world."""

from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from configs.geometry import pixel_frames
from configs.load import CHECKOUT
from model.denoiser import ScoreModel
from model.flow import add_noise, v_target
from model.text import TextEncoder
from trainer import flow
from trainer.clips import draw
from trainer.flow import FIRST
from trainer.tiny.captions import ATTRIBUTES
from trainer.tiny.data import LatentBank, SwitchedBank
from trainer.tiny.world import TinyWorld, caption, flip_attribute
from trainer.validation import causal_clips, evaluate_clips, teacher_clips
from utils.device import pick_dtype
from utils.seeds import generator

Bank = TypeVar("Bank", LatentBank, SwitchedBank)
CROPPED = "first chunks about the subject"  # a third kind of step


class _OnTheTinyWorld:
    """The banks, steps on first chunks cropped around the subject, which teach shapes, and the prompts."""

    @property
    def world(self) -> TinyWorld:
        return TinyWorld(self.config.video.height, self.config.video.width)

    def _bank(self, clips: int, latent_frames: int, kind: type[Bank] = LatentBank, **options) -> Bank:
        c = self.config
        if kind is LatentBank:
            options["open_captions"] = c.training.open_captions
        return kind(
            self.world, self.codec, self.text, clips=clips, frames=pixel_frames(latent_frames), seed=c.seed,
            dtype=pick_dtype(c.training.precision, self.device),
            cache=None if c.training.flow.bank_cache is None else CHECKOUT / c.training.flow.bank_cache, **options,
        )  # fmt: skip

    def plan(self, step: int) -> str:
        kind = super().plan(step)
        cropped = torch.rand(2, generator=generator(self.config.seed, "first chunk", step))[1]
        return CROPPED if kind == FIRST and cropped < self.config.training.flow.crop_share else kind

    def _clips(self, step: int, micro: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        knobs, bank = self.config.training.flow, self.first_chunks
        if self.plan(step) != CROPPED:
            return super()._clips(step, micro, rng)
        index = draw(len(bank.latents), knobs.crop_batch, self.config.seed, self.part(step, micro), self.device)
        return bank.crops(index, self.geometry.chunk_frames, knobs.crop, rng)

    def _prompts(self) -> list[str]:
        return self.world.prompts(self.config.seed + 1, self.config.training.validation_clips)


class Pretrain(_OnTheTinyWorld, flow.Teacher):
    """The teacher."""

    name = "pretrain"

    @torch.no_grad()
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Attributes of sampled clips, and caption gaps by attribute."""
        score, prompts = ScoreModel(self.averaged), self._prompts()
        frames = teacher_clips(score, self.codec, self.text, prompts, self.geometry, self.config)
        gaps = caption_gaps(score, self.bank, self.text, self.config.seed)
        return evaluate_clips(prompts, frames, folder / f"{self.name}_{step:06d}.png") | gaps


class TeacherForcing(_OnTheTinyWorld, flow.TeacherForcing):
    """The causal student."""

    name = "teacher_forcing"

    @torch.no_grad()
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Attributes of clips generated as in inference."""
        prompts = self._prompts()
        frames = causal_clips(self.averaged, self.codec, self.text, prompts, self.schedule, self.config)
        return evaluate_clips(prompts, frames, folder / f"{self.name}_{step:06d}.png")


@torch.no_grad()
def caption_gaps(score: ScoreModel, bank: LatentBank, text: TextEncoder, seed: int) -> dict[str, float]:
    """Loss with one attribute of the caption changed minus loss with the right caption, by attribute.

    Mean over timesteps 600, 800, 900, 950. `axis` turns the direction by 90 degrees, `sign` reverses it. An attribute
    without a gap is not being learnt from the caption.
    """
    clips = min(128, len(bank.latents))
    index = torch.arange(clips, device=bank.latents.device)
    x0, _ = bank.batch(index)
    rng = generator(seed, "caption gaps", device=x0.device)
    eps = torch.randn(x0.shape, generator=rng, device=x0.device)
    scenes, draw = bank.scenes[:clips], np.random.default_rng(seed)
    names = (*ATTRIBUTES, "axis", "sign")
    said = {"right": text([caption(scene) for scene in scenes])}
    said |= {name: text([flip_attribute(scene, name, draw) for scene in scenes]) for name in names}
    losses = {}
    for name, embedded in said.items():
        total = 0.0
        for t in (600.0, 800.0, 900.0, 950.0):
            times = torch.full((clips,), t, device=x0.device)
            v = score.v(add_noise(x0, eps, times), times, embedded)
            total += F.mse_loss(v.float(), v_target(x0, eps)).item() / 4
        losses[name] = total
    return {f"gap_{name}": losses[name] - losses["right"] for name in names}
