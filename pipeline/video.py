"""What `DiagonalPipeline` returns: videos that can be saved, shown in a notebook, and converted to diffusers' types."""

import base64
import html
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.video import VideoWriter

OUTPUT_TYPES = ("np", "pil", "pt", "latent")


@dataclass(frozen=True, eq=False, repr=False)
class Video:
    """One finished clip."""

    frames: np.ndarray  # uint8 [T, H, W, 3]
    fps: int
    prompt: str
    seed: int
    timings: list[dict[str, float]] = field(default_factory=list)  # a chunk: seconds by their use
    warnings: list[str] = field(default_factory=list)  # sentences: what the model may not do well here

    def save(self, path: str | os.PathLike) -> None:
        """Write .mp4 (H.264), .webm (VP9), .gif or .webp by the ending of `path`, whole or not at all.

        UserError for another ending, and for a path or disk that cannot take the file.
        """
        with VideoWriter(path, self.fps, self.frames.shape[1:3]) as video:
            video.write(self.frames)

    def __repr__(self) -> str:
        count, height, width = self.frames.shape[:3]
        prompt = self.prompt if len(self.prompt) <= 60 else f"{self.prompt[:57]}..."
        return f"Video({count} frames of {height}x{width}, {self.fps} fps, prompt={prompt!r}, seed={self.seed})"

    def _repr_html_(self) -> str:
        """A player with the video in it, as notebooks show it."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "video.mp4"
            self.save(path)
            content = base64.b64encode(path.read_bytes()).decode()
        title = html.escape(repr(self), quote=True)
        source = f"data:video/mp4;base64,{content}"
        return f'<video controls loop autoplay muted playsinline title="{title}" src="{source}"></video>'


@dataclass(frozen=True, eq=False, repr=False)
class DiagonalPipelineOutput:
    """The videos of one call: those of the first prompt first, then those of the next.

    videos: what can be saved and shown; none where only latents were asked for.
    """

    videos: list[Video]
    output_type: str = "np"
    latents: Sequence[Tensor] = ()  # of each video [C, F, h, w], for output_type="latent"

    @cached_property
    def frames(self) -> np.ndarray | Tensor | list:
        """The batch as diffusers has it; a list of videos where their lengths differ.

            np      float32 [B, T, H, W, 3] in [0, 1]
            pt      the same as a tensor [B, T, 3, H, W]
            pil     a list of PIL images for each video
            latent  [B, C, F, h, w], normalised: what the codec decodes
        """
        match self.output_type:
            case "latent":
                return _stacked(list(self.latents), torch.stack)
            case "pil":
                return [[Image.fromarray(frame) for frame in video.frames] for video in self.videos]
        clips = [video.frames / np.float32(255) for video in self.videos]
        if self.output_type == "np":
            return _stacked(clips, np.stack)
        return _stacked([torch.from_numpy(clip).movedim(-1, 1).contiguous() for clip in clips], torch.stack)

    def __repr__(self) -> str:
        return f"DiagonalPipelineOutput(output_type={self.output_type!r}, videos={self.videos})"

    def _repr_html_(self) -> str:
        return "\n".join(video._repr_html_() for video in self.videos) or html.escape(repr(self))


def _stacked(clips: list, stack):
    return stack(clips) if len({clip.shape for clip in clips}) == 1 else clips
