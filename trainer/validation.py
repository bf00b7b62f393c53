"""Validation: sampled clips, and what they show of their captions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from configs.geometry import Geometry
from configs.schema import Config
from model.causal_wan import CausalWanModel
from model.codec import Codec
from model.denoiser import ScoreModel, Student
from model.schedule import Schedule
from model.text import TextEncoder
from pipeline.async_decoder import to_frames
from pipeline.bidirectional import sample
from pipeline.noise import NoiseSource
from pipeline.stream import StreamSession
from trainer.prompt_bank import validation_prompts
from trainer.tiny.measures import score as score_clips
from utils.files import atomic_path
from utils.seeds import sample_seed
from utils.video import VideoWriter, contact_sheet

TOGETHER = 64  # clips that are generated at once
LABEL = 16  # pixels: height of the line of text above clips that are shown side by side


def validation_seeds(config: Config, count: int) -> list[int]:
    """Fixed seeds, so that clips can be compared over the steps of a run."""
    return [sample_seed(config.seed, i + 1) for i in range(count)]


def teacher_clips(
    score: ScoreModel, codec: Codec, text: TextEncoder, prompts: list[str], geometry: Geometry, config: Config,
    guidance: float | None = None,
) -> Tensor:  # fmt: skip
    """Pixels [B, T, 3, H, W] that the teacher generates from `prompts` in 50 Euler steps; guidance: None = that of
    `training.flow`."""
    embedded, null = text(prompts), text([""])
    guidance = config.training.flow.guidance if guidance is None else guidance
    source = NoiseSource(validation_seeds(config, len(prompts)), geometry, embedded.device, torch.float32)
    chunks = geometry.num_chunks(config.video.num_latent_frames)
    noise = torch.cat([source.initial(k) for k in range(chunks)], dim=1)
    null = null.expand_as(embedded)
    latents = sample(score, noise, embedded, null, steps=50, shift=config.schedule.shift, guidance=guidance)
    return torch.cat([codec.decode(part) for part in latents.split(8)])


def causal_clips(
    model: CausalWanModel, codec: Codec, text: TextEncoder, prompts: list[str], schedule: Schedule, config: Config
) -> Tensor:
    """Pixels [B, T, 3, H, W] that a causal student generates from `prompts` as in inference."""
    session = StreamSession.from_config(config, Student(model), codec, text, schedule)
    chunks = session.geometry.num_chunks(config.video.num_latent_frames)
    seeds, parts = validation_seeds(config, len(prompts)), []
    for some in (slice(i, i + TOGETHER) for i in range(0, len(prompts), TOGETHER)):
        played = session.play(prompts[some], seeds[some], chunks)
        parts.append(torch.cat([result.wait().frames for result in played], dim=1))
    return torch.cat(parts).movedim(-1, 2).float() / 127.5 - 1


def write_sheet(prompts: list[str], frames: Tensor, sheet: Path) -> None:
    """A contact sheet of the first eight clips [B, T, 3, H, W] in [-1, 1], and their prompts beside it."""
    rows = frames[:8, :: max(1, frames.shape[1] // 9)]
    pixels = ((rows.flatten(0, 1).permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).byte().cpu().numpy()
    sheet.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(sheet) as aside:
        contact_sheet(pixels, columns=rows.shape[1]).save(aside)
    with atomic_path(sheet.with_suffix(".txt")) as aside:
        aside.write_text("\n".join(prompts[:8]) + "\n", encoding="utf-8")


def evaluate_clips(prompts: list[str], frames: Tensor, sheet: Path) -> dict[str, float]:
    """Share of clips with each attribute as in the caption; writes a contact sheet of the first eight."""
    write_sheet(prompts, frames, sheet)
    return {name: interval.value for name, interval in score_clips(prompts, frames).columns.items()}


class Validator:
    """Clips of the student's EMA on fixed prompts and seeds: written, and scored if they are of the tiny world.

    `<name>.mp4`: student on the left, teacher on the right, a row a prompt; `<name>.png`: a contact sheet.
    """

    def __init__(
        self, config: Config, text: TextEncoder, codec: Codec, geometry: Geometry, schedule: Schedule,
        prompts: list[str],
    ):  # fmt: skip
        self.config, self.text, self.codec = config, text, codec
        self.geometry, self.schedule = geometry, schedule
        d = config.training.distill
        self.scored, self.prompts = d.prompts is None, validation_prompts(config, prompts)
        self.shown = min(d.video_clips, len(self.prompts))
        self._teachers: Tensor | None = None

    @torch.no_grad()
    def __call__(
        self, model: CausalWanModel, teacher: ScoreModel, folder: Path, name: str, *, write: bool
    ) -> dict[str, float]:
        """Figures by name. `write`: whether this rank writes the files."""
        frames = causal_clips(model, self.codec, self.text, self.prompts, self.schedule, self.config)
        if self.shown:
            theirs = self._teacher_frames(teacher)
            if write:
                write_side_by_side(frames[: self.shown], theirs, folder / f"{name}.mp4", self.config.video.fps)
        if self.scored and write:
            return evaluate_clips(self.prompts, frames, folder / f"{name}.png")
        return {}

    def _teacher_frames(self, teacher: ScoreModel) -> Tensor:
        """Generated once: neither prompts nor teacher change."""
        if self._teachers is None:
            some = self.prompts[: self.shown]
            made = teacher_clips(teacher, self.codec, self.text, some, self.geometry, self.config)
            self._teachers = made.float().cpu()
        return self._teachers


def write_side_by_side(left: Tensor, right: Tensor, path: Path, fps: int) -> None:
    """A video of clips [N, T, 3, H, W] in [-1, 1], the student's `left` beside the teacher's `right`, a row a clip.

    A line above says which is which.
    """
    both = torch.cat([left.float().cpu(), right.float().cpu()], dim=-1)
    tall = torch.cat(list(both), dim=-2)  # [T, 3, N H, 2 W]
    frames = to_frames(tall[None])[0].numpy()
    head = np.broadcast_to(heading(("student", "teacher"), left.shape[-1]), (len(frames), LABEL, *frames.shape[2:]))
    frames = np.concatenate([head, frames], axis=1)
    with VideoWriter(path, fps, frames.shape[1:3]) as writer:
        writer.write(frames)


def heading(names: Sequence[str], width: int) -> np.ndarray:
    """Pixels [LABEL, len(names) * width, 3] with each name over its column, as large as there is room for."""
    line = Image.new("RGB", (width * len(names), LABEL))
    draw = ImageDraw.Draw(line)
    for i, name in enumerate(names):
        fonts = (ImageFont.load_default(size) for size in (13, 11, 9, 7))
        font = next((font for font in fonts if font.getlength(name) <= width - 4), ImageFont.load_default(7))
        draw.text((i * width + width / 2, LABEL / 2), name, "white", font, anchor="mm")
    return np.asarray(line)
