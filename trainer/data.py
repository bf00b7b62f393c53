"""What the stages are fed: clips of the tiny world, made ahead on the training device and drawn at random."""

import torch
from torch import Tensor
from tqdm import tqdm

from model.codec import WanCodec
from model.text import TextEncoder
from utils.seeds import generator, stable_hash
from utils.tiny_world import TinyScene, TinyWorld, training_caption


def draw(clips: int, count: int, seed: int, step: int, rank: int, device: torch.device) -> Tensor:
    """Indices of the clips of one batch: a function of (seed, step, rank)."""
    rng = generator(seed, "batch", step, rank)
    return torch.randint(clips, (count,), generator=rng).to(device, non_blocking=True)


def pixel_bank(world: TinyWorld, clips: int, frames: int, seed: int, device: torch.device) -> Tensor:
    """uint8 [N, T, 3, H, W] clips that start anywhere in their scene's life, so that edges are crossed too."""
    bank = torch.empty(clips, frames, 3, world.height, world.width, dtype=torch.uint8, device=device)
    starts = torch.randint(0, 400, (clips,), generator=generator(seed, "clip start")).tolist()
    drawn = world.scenes(stable_hash(seed, "codec scenes"), clips)
    scenes = [world.continued(scene, start) for scene, start in zip(drawn, starts, strict=True)]
    for i in tqdm(range(0, clips, 128), desc="rendering", leave=False):
        pixels = world.render(scenes[i : i + 128], frames, device=device)
        bank[i : i + 128] = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return bank


class LatentBank:
    """Encoded clips with the embeddings of their captions, in memory.

    `latents` [N, F, C, h, w] and `text` [N, L, D] on the training device; `scenes` says what each clip shows.
    """

    def __init__(self, world: TinyWorld, codec: WanCodec, text: TextEncoder, *, clips: int, frames: int, seed: int):
        device = next(codec.vae.parameters()).device
        self.scenes = world.scenes(stable_hash(seed, "bank"), clips)
        self.captions = [training_caption(scene) for scene in self.scenes]
        self.null = text([""])
        self.latents, self.text = None, torch.empty(clips, *self.null.shape[1:], dtype=self.null.dtype, device=device)
        for i in tqdm(range(0, clips, 64), desc="encoding clips", leave=False):
            z = self._encode(world, codec, self.scenes[i : i + 64], frames, device)
            if self.latents is None:
                self.latents = torch.empty(clips, *z.shape[1:], dtype=torch.float16, device=device)
            self.latents[i : i + 64] = z
            self.text[i : i + 64] = text(self.captions[i : i + 64])

    @staticmethod
    @torch.no_grad()
    def _encode(world: TinyWorld, codec: WanCodec, scenes: list[TinyScene], frames: int, device) -> Tensor:
        pixels = world.render(scenes, frames, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return codec.encode(pixels)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [B, F, C, h, w] float32 and text [B, L, D] of these clips."""
        return self.latents[index].float(), self.text[index]
