"""Stages `world_teacher` (bidirectional) and `world_causal` (a causal student): flow matching on the moving world.

The losses are in trainer/flow.py; here are the clips and the validation.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.geometry import pixel_frames
from configs.load import CHECKOUT
from model.denoiser import ScoreModel
from model.flow import add_noise, v_target
from model.text import TextEncoder
from trainer.flow import Teacher, TeacherForcing
from trainer.validation import causal_clips, teacher_clips, write_sheet
from trainer.world.captions import ATTRIBUTES, flip_stated, phrase
from trainer.world.data import Latents
from trainer.world.measures import score
from trainer.world.scene import World
from utils.device import pick_dtype
from utils.seeds import generator

SEED = 4322222  # of captions that no training sees
GUIDANCES = (1.0, 0.0, 2.0)  # of the teacher's clips that are looked at, the first one also before the end
GAP_CLIPS, GAP_TIMESTEPS = 128, (600.0, 800.0, 900.0, 950.0)


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
        """What clips in 50 steps show of their captions, by guidance: that of distillation is chosen from it; and the
        gap of each attribute, which shows earlier what is being learnt."""
        prompts, at_end = self._prompts(), step >= self.config.training.steps
        figures = caption_gaps(ScoreModel(self.averaged), self.bank, self.text, self.config.seed)
        for guidance in GUIDANCES if at_end else GUIDANCES[:1]:
            places = (self.codec, self.text, prompts, self.geometry, self.config)
            frames = teacher_clips(ScoreModel(self.averaged), *places, guidance)
            judged = self._judged(prompts, frames, folder / f"{self.name}_{step:06d}_guidance_{guidance:g}.png")
            figures |= {f"guidance_{guidance:g}_{name}": value for name, value in judged.items()}
        return figures


class WorldCausal(_OnTheMovingWorld, TeacherForcing):
    """A causal student conditioned on real context, at the noise level that diagonal forcing leaves in the cache."""

    name = "world_causal"

    @torch.no_grad()
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """What clips along the configured schedule show of their captions."""
        prompts = self._prompts()
        frames = causal_clips(self.averaged, self.codec, self.text, prompts, self.schedule, self.config)
        return self._judged(prompts, frames, folder / f"{self.name}_{step:06d}.png")


@torch.no_grad()
def caption_gaps(model: ScoreModel, bank: Latents, text: TextEncoder, seed: int) -> dict[str, float]:
    """By attribute, the loss under captions that state another value of it minus the loss under the right ones, on
    clips of the bank that have it; mean over GAP_TIMESTEPS. Without a gap it is not being learnt from captions."""
    device, draw = bank.latents.device, np.random.default_rng(seed)
    index = torch.arange(0, len(bank.scenes), -(-len(bank.scenes) // GAP_CLIPS))
    stated = [{name: vars(bank.scenes[i])[name] for name in ATTRIBUTES} for i in index.tolist()]
    x0, _ = bank.batch(index.to(device))
    eps = torch.randn(x0.shape, generator=generator(seed, "caption gaps", device=device), device=device)

    def losses(rows: list[int], said: list[str]) -> Tensor:
        parts = []
        for first in range(0, len(rows), 64):
            part, embedded = rows[first : first + 64], text(said[first : first + 64])
            x, noise, total = x0[part], eps[part], torch.zeros((), device=device)
            for t in GAP_TIMESTEPS:
                times = torch.full((len(part),), t, device=device)
                error = model.v(add_noise(x, noise, times), times, embedded).float() - v_target(x, noise)
                total = total + error.square().flatten(1).mean(1) / len(GAP_TIMESTEPS)
            parts.append(total)
        return torch.cat(parts)

    right = losses(list(range(len(stated))), [phrase(one) for one in stated])
    gaps = {}
    for name in ATTRIBUTES:
        rows = [row for row, one in enumerate(stated) if one[name] is not None]
        if rows:
            wrong = losses(rows, [phrase(flip_stated(stated[row], name, draw)) for row in rows])
            gaps[f"gap_{name}"] = (wrong - right[rows]).mean().item()
    return gaps
