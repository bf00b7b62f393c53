"""Stages `world_teacher` (bidirectional) and `world_causal` (a causal student): flow matching on the moving world.

The losses are in trainer/flow.py; here are the clips and what is looked at.
"""

from pathlib import Path

import torch
from torch import Tensor

from configs.geometry import pixel_frames
from configs.load import CHECKOUT
from model.denoiser import ScoreModel
from trainer.flow import Teacher, TeacherForcing
from trainer.validation import causal_clips, teacher_clips, write_sheet
from trainer.world.data import Latents
from trainer.world.measures import score
from trainer.world.scene import World
from utils.device import pick_dtype

SEED = 4322222  # of captions that no training sees
GUIDANCES = (0.0, 0.5, 1.0)  # of the teacher's clips that are looked at


class _OnTheMovingWorld:
    """The bank of latents, and the measures."""

    export_often = True  # a stage that is cut off leaves weights that others can start from

    def _bank(self, clips: int, latent_frames: int) -> Latents:
        c, cache = self.config, self.config.training.flow.bank_cache
        return Latents(
            self.codec, self.text, clips=clips, frames=pixel_frames(latent_frames), seed=c.seed,
            dtype=pick_dtype(c.training.precision, self.device), cache=None if cache is None else CHECKOUT / cache,
        )  # fmt: skip

    def _judged(self, prompts: list[str], frames: Tensor, sheet: Path) -> dict[str, float]:
        write_sheet(prompts, frames, sheet)
        return {name: interval.value for name, interval in score(prompts, frames).columns.items()}

    def _prompts(self) -> list[str]:
        return World().prompts(SEED, self.config.training.validation_clips)


class WorldTeacher(_OnTheMovingWorld, Teacher):
    """The teacher: a bidirectional network, one timestep a clip."""

    name = "world_teacher"

    @torch.no_grad()
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """What clips in 50 steps show of their captions, by guidance: that of distillation is chosen from it."""
        prompts, figures = self._prompts(), {}
        for guidance in GUIDANCES:
            places = (self.codec, self.text, prompts, self.geometry, self.config)
            frames = teacher_clips(ScoreModel(self.averaged), *places, guidance)
            found = self._judged(prompts, frames, folder / f"{self.name}_{step:06d}_guidance_{guidance:g}.png")
            figures |= {f"guidance_{guidance:g}_{name}": value for name, value in found.items()}
        return figures


class WorldCausal(_OnTheMovingWorld, TeacherForcing):
    """A causal student that learns from real pasts, as noisy as diagonal forcing leaves them."""

    name = "world_causal"

    @torch.no_grad()
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """What clips along the configured schedule show of their captions."""
        prompts = self._prompts()
        frames = causal_clips(self.averaged, self.codec, self.text, prompts, self.schedule, self.config)
        return self._judged(prompts, frames, folder / f"{self.name}_{step:06d}.png")
