"""Training data of the moving world: clips, rendered ahead on the training device and drawn at random."""

import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from model.codec import WanCodec
from model.text import TextEncoder
from trainer.clips import encoded_clips
from trainer.world.render import kind, render
from trainer.world.scene import CLIP_FRAMES, World, poses, training_caption
from utils.logs import get_logger
from utils.seeds import stable_hash

log = get_logger(__name__)

TOGETHER = 32  # clips that are rendered, and encoded, at once


class Pixels:
    """Clips as uint8 on the training device, each some frames of a scene's endless video.

    `pixels` [N, T, 3, H, W]; `middles` [N, T, 2] where the subject is.
    """

    def __init__(self, world: World, clips: int, frames: int, seed: int, device: torch.device):
        scenes = sorted(world.scenes(stable_hash(seed, "codec scenes"), clips), key=kind)  # few kinds at a time
        self.pixels = torch.empty(clips, frames, 3, world.height, world.width, dtype=torch.uint8, device=device)
        for i in tqdm(range(0, clips, TOGETHER), desc="rendering", leave=False, disable=None):
            self.pixels[i : i + TOGETHER] = render(world, scenes[i : i + TOGETHER], frames, device, torch.uint8)
        pose = poses(scenes, range(frames))
        self.middles = torch.stack([torch.from_numpy(pose.x), torch.from_numpy(pose.y)], dim=2)

    def batch(self, index: Tensor, frames: int, crop: int, rng: torch.Generator) -> Tensor:
        """[B, frames, 3, h, w] in [-1, 1] of these clips: some frames in a row of each.

        crop: side of the square that is cut out near the subject, on the VAE's grid of 8 pixels; 0 = whole frames.
        index, rng: on the CPU, so that no step waits for the GPU.
        """
        first = int(torch.randint(self.pixels.shape[1] - frames + 1, (), generator=rng))
        place = {"device": self.pixels.device, "non_blocking": True}
        shown, clip = self.pixels[:, first : first + frames], index.to(**place)
        if not crop:
            return shown[clip].float() / 127.5 - 1
        height, width = shown.shape[-2:]
        off = (torch.rand(len(index), 2, generator=rng) - 0.5) * 0.8 * crop
        corner = self.middles[index, first + frames // 2] + off - crop / 2
        most = torch.tensor([width - crop, height - crop])
        corner = ((corner / 8).round().long() * 8).clamp_min(0).minimum(most // 8 * 8)
        columns, rows = ((corner[:, i, None] + torch.arange(crop)).to(**place) for i in (0, 1))
        parts = shown[clip[:, None, None], :, :, rows[:, :, None], columns[:, None, :]]  # [B, h, w, frames, 3]
        return parts.permute(0, 3, 4, 1, 2).float() / 127.5 - 1


class Latents:
    """Encoded clips with the embeddings of their captions, in memory: `latents` float16 [N, F, C, h, w] and `text`
    [N, L, D] on the training device, `null` [1, L, D] of no caption.

    cache: folder in which latents are kept for later runs that want the same clips through the same VAE.
    """

    def __init__(
        self, codec: WanCodec, text: TextEncoder, *, clips: int, frames: int, seed: int, dtype: torch.dtype,
        cache: Path | None,
    ):  # fmt: skip
        world, start = World(), time.monotonic()
        scenes = sorted(world.trained_scenes(stable_hash(seed, "bank"), clips), key=kind)
        self.scenes, captions = scenes, [training_caption(scene) for scene in scenes]
        self.null = text([""])
        self.text = torch.cat([text(captions[i : i + 64]) for i in range(0, clips, 64)])
        self.latents = encoded_clips(partial(render, world), codec, scenes, frames, dtype, cache)
        log.info("latents of %d clips: %.0f s", clips, time.monotonic() - start)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, F, C, h, w] float32 and text [B, L, D] of these clips."""
        return self.latents[index].float(), self.text[index]


def validation_clips(world: World, count: int, seed: int, device: torch.device) -> Tensor:
    """Unseen clips [count, CLIP_FRAMES, 3, H, W] in [-1, 1]."""
    return render(world, world.scenes(stable_hash(seed, "validation"), count), CLIP_FRAMES, device)
