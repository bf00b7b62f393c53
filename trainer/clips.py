"""What stages on clips have in common: which clips a batch takes, and clips encoded ahead."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from model.codec import WanCodec
from utils.files import atomic_path
from utils.seeds import generator


def draw(clips: int, count: int, seed: int, part: int, device: torch.device) -> Tensor:
    """Indices of the clips of one micro-batch: a function of (seed, part)."""
    rng = generator(seed, "batch", part, 0)
    return torch.randint(clips, (count,), generator=rng).to(device, non_blocking=True)


def encoded_clips(
    render: Callable[..., Tensor], codec: WanCodec, scenes: Sequence[object], frames: int, dtype: torch.dtype,
    cache: Path | None,
) -> Tensor:  # fmt: skip
    """float16 [N, F, C, h, w] of scenes, on the codec's device; read from `cache` if it was made before.

    render: called with some scenes, a number of frames and a device. What a scene is, its repr says.

    Every rank calls it; each encodes its share.
    """
    device = next(codec.vae.parameters()).device

    @torch.no_grad()
    def encode() -> Tensor:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        each, parts = -(-len(scenes) // world), []
        own = [scenes[i % len(scenes)] for i in range(rank * each, (rank + 1) * each)]
        for i in tqdm(range(0, each, 32), desc="encoding clips", leave=False, disable=rank > 0 or None):
            pixels = render(own[i : i + 32], frames, device=device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                parts.append(codec.encode(pixels).half())
        latents = torch.cat(parts)
        if world > 1:
            shares = [torch.empty_like(latents) for _ in range(world)]
            dist.all_gather(shares, latents)
            latents = torch.cat(shares)[: len(scenes)]
        return latents

    if cache is None:
        return encode()
    shown = render(scenes[:2], 5).numpy().tobytes()  # by the renderer as it is now
    digest = hashlib.sha256(_encoder_digest(codec, dtype) + repr((scenes, frames)).encode() + shown)
    return _kept(cache / f"latents_{digest.hexdigest()[:16]}.safetensors", encode).to(device)


def _encoder_digest(codec: WanCodec, dtype: torch.dtype) -> bytes:
    """A hash of everything that latents depend on besides pixels; the decoder is left out."""
    config = codec.vae.config
    digest = hashlib.sha256(repr((dtype, config.latents_mean, config.latents_std)).encode())
    for name, value in sorted(codec.vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.digest()


def _kept(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """The result of `make`, cached in a file."""
    if path.exists():
        return load_file(path)["latents"]
    latents = make()
    if dist.is_initialized() and dist.get_rank():  # the first one writes it
        return latents
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as aside:
        save_file({"latents": latents.cpu()}, aside)
    return latents
