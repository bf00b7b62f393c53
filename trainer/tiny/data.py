"""Training data of the stages: clips of the tiny world, rendered ahead on the training device and drawn at random."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configs.geometry import latent_frames, pixel_frames
from model.codec import WanCodec
from model.text import TextEncoder
from trainer.clips import encoded_clips
from trainer.tiny.switch import render_switched, switched_scene
from trainer.tiny.world import TinyScene, TinyWorld, training_caption
from utils.seeds import generator, stable_hash


class PixelBank:
    """Clips as uint8, starting at random times of their scenes, so that edges are crossed, too.

    `pixels` [N, T, 3, H, W] on the training device; `scenes` as they are at frame 0.
    """

    def __init__(self, world: TinyWorld, clips: int, frames: int, seed: int, device: torch.device):
        self.world = world
        starts = torch.randint(0, 400, (clips,), generator=generator(seed, "clip start")).tolist()
        drawn = world.scenes(stable_hash(seed, "codec scenes"), clips)
        self.scenes = [world.continued(scene, start) for scene, start in zip(drawn, starts, strict=True)]
        self.pixels = torch.empty(clips, frames, 3, world.height, world.width, dtype=torch.uint8, device=device)
        for i in tqdm(range(0, clips, 32), desc="rendering", leave=False, disable=None):
            rendered = world.render(self.scenes[i : i + 32], frames, device=device)
            self.pixels[i : i + 32] = ((rendered + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def batch(self, index: Tensor, frames: int, crop: int, rng: torch.Generator) -> Tensor:
        """[B, frames, 3, h, w] in [-1, 1] of these clips: some frames in a row of each.

        crop: side of the square that is cut out near the subject, on the VAE's grid of 8 pixels; 0 = whole frames.
        rng: a generator on the CPU.
        """
        first = int(torch.randint(self.pixels.shape[1] - frames + 1, (), generator=rng))
        shown = self.pixels[:, first : first + frames]
        if not crop:
            return shown[index].float() / 127.5 - 1
        off = (torch.rand(len(index), 2, generator=rng) - 0.5) * 0.6 * crop
        parts = []
        for i, (dx, dy) in zip(index.tolist(), off.tolist(), strict=True):
            x, y = self.world.position(self.scenes[i], first + frames // 2)
            left = _on_grid(x + dx - crop / 2, self.world.width - crop)
            top = _on_grid(y + dy - crop / 2, self.world.height - crop)
            parts.append(shown[i, :, :, top : top + crop, left : left + crop])
        return torch.stack(parts).float() / 127.5 - 1


def _on_grid(position: float, most: int) -> int:
    """The multiple of 8 next to `position` in 0..most."""
    return min(max(round(position / 8) * 8, 0), most // 8 * 8)


class LatentBank:
    """Encoded clips with the embeddings of their captions, in memory.

    `latents` [N, F, C, h, w] and `text` [N, L, D] on the training device; `scenes` says what each clip shows and
    `starts` [N, 2] where its subject begins, (x, y) in pixels.
    cache: folder that stores latents for later runs with the same clips and VAE.
    """

    def __init__(
        self, world: TinyWorld, codec: WanCodec, text: TextEncoder, *, clips: int, frames: int, seed: int,
        dtype: torch.dtype = torch.float32, cache: Path | None = None, open_captions: float = 0.0,
    ):  # fmt: skip
        device = next(codec.vae.parameters()).device
        self.scenes = world.scenes(stable_hash(seed, "bank"), clips)
        self.starts = torch.tensor([(scene.x, scene.y) for scene in self.scenes], device=device)
        self.null = text([""])
        self.text = _captions(text, self.scenes, open_captions)
        self.latents = encoded_clips(world.render, codec, self.scenes, frames, dtype, cache)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, F, C, h, w] float32 and text [B, L, D] of these clips."""
        return self.latents[index].float(), self.text[index]

    def crops(self, index: Tensor, frames: int, side: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents [B, frames, C, side, side] around the subjects as these clips begin, and text [B, L, D].

        side: in latent cells of 8 pixels. Corners lie on even cells, where the transformer's patches begin.
        rng: a generator on the training device.
        """
        latents = self.latents[index, :frames]
        room = torch.tensor([latents.shape[-1] - side, latents.shape[-2] - side], device=index.device)
        off = (torch.rand(len(index), 2, generator=rng, device=index.device) - 0.5) * 0.6 * side
        corner = (((self.starts[index] / 8 + off - side / 2) / 2).round().long() * 2).clamp_min(0).minimum(room)
        inside = torch.arange(side, device=index.device)
        columns, rows = (corner[:, axis, None] + inside for axis in (0, 1))
        sample = torch.arange(len(index), device=index.device)[:, None, None]
        cut = latents[sample, :, :, rows[:, :, None], columns[:, None, :]]  # [B, side, side, frames, C]
        return cut.permute(0, 3, 4, 1, 2).float(), self.text[index]


class SwitchedBank:
    """Clips whose prompt changes at the border of a chunk: `latents` [N, F, C, h, w], `text` [N, L, D] of the later
    prompt, and `switch` [N], the latent frame with which it begins.

    This is a stream after the change: its context is recached under the new prompt (LongLive, arXiv 2509.22622).
    Appearance then follows the prompt, position the context.
    """

    def __init__(
        self, world: TinyWorld, codec: WanCodec, text: TextEncoder, *, clips: int, frames: int, chunk_frames: int,
        seed: int, dtype: torch.dtype = torch.float32, cache: Path | None = None,
    ):  # fmt: skip
        rng = np.random.default_rng(stable_hash(seed, "prompt changes"))
        borders = range(chunk_frames, latent_frames(frames), chunk_frames)
        at = rng.choice(borders, size=clips)
        scenes = [
            switched_scene(world, scene, pixel_frames(int(border)), rng)
            for scene, border in zip(world.scenes(stable_hash(seed, "switched bank"), clips), at, strict=True)
        ]
        self.text = _captions(text, [scene.after for scene in scenes])
        self.switch = torch.from_numpy(at).to(self.text.device)
        self.latents = encoded_clips(partial(render_switched, world), codec, scenes, frames, dtype, cache)


def _captions(text: TextEncoder, scenes: Sequence[TinyScene], open_share: float = 0.0) -> Tensor:
    """[N, L, D]: varied captions of the scenes."""
    captions = [training_caption(scene, open_share=open_share) for scene in scenes]
    return torch.cat([text(captions[i : i + 64]) for i in range(0, len(captions), 64)])
