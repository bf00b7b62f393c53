"""Encoding and decoding of video: the interface `Codec`, and the Wan VAE.

    pixels   [B, T, 3, H, W]      float in [-1, 1], T = 1 + 4 (F - 1)
    latents  [B, F, C, H/8, W/8]  normalised: (posterior mean - latents_mean) / latents_std

The Wan VAE is causal in time: a frame depends only on earlier frames. Each of its 3-D convolutions needs the last two
frames of its input, which diffusers passes in a list (`feat_cache`). Here each stream owns such a list, not the module,
so that any number of streams can share one VAE. Its tensors are never written in place, so that gradients flow and a
snapshot of a stream is a shallow copy.

The first latent frame is decoded by itself, since it becomes 1 pixel frame instead of 4. Later frames may be decoded
together: a call with n frames gives the same result as n calls with one frame (tests/model/test_codec.py), and takes n
times the memory.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanRMS_norm
from torch import Tensor

from configs.errors import UserError
from configs.geometry import TEMPORAL_STRIDE, latent_frames

# Latent positions x base channels of one call of encoder or decoder: on a GPU 3 latent frames of 480x832 with 96 base
# channels; on a CPU what fits into its cache.
WORK_PER_CALL = {"cuda": 2_000_000, "cpu": 10_000}


class DecoderStream(Protocol):
    """Decodes the latents of one stream chunk by chunk."""

    def decode(self, latents: Tensor) -> Tensor:
        """The next latents [B, f, C, h, w] -> pixels: 1 + 4 (f - 1) frames from the first call, 4 f later."""

    def snapshot(self) -> Any:
        """The state of the stream; it stays valid when the stream continues."""

    def restore(self, snapshot: Any) -> None:
        """Go back to where `snapshot` was taken."""


class Codec(Protocol):
    """The interface of codecs that the pipeline and the trainer use."""

    decode_frames: int  # latent frames decoded at once, at most; 0 = any number

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, T, 3, H, W] in [-1, 1] -> latents [B, F, C, h, w]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, F, C, h, w] -> [B, 1 + 4 (F - 1), 3, H, W] in [-1, 1]."""

    def stream(self) -> DecoderStream:
        """A decoder at the start of a clip."""


class Posterior(NamedTuple):
    """Diagonal Gaussian over unnormalized latents; mean and log variance [B, F, C, h, w]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """KL divergence from the standard normal, in nats, summed over all but the batch: [B]."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)


class _FastCausalConv3d(WanCausalConv3d):
    """The same convolution, 5 times as fast for one clip on a CPU.

    Unless the batch or the clip is large, torch uses a fallback kernel (`slow_conv3d`) there; this class calls oneDNN.
    That call has no gradient, so training uses the base class's.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if (
            x.is_cpu
            and x.dtype == torch.float32
            and not torch.is_grad_enabled()
            and torch.backends.mkldnn.is_available()
        ):
            return torch.mkldnn_convolution(x, weight, bias, self.padding, self.stride, self.dilation, self.groups)
        return super()._conv_forward(x, weight, bias)


class _FastNorm(WanRMS_norm):
    """The same norm x / |x| over channels, up to rounding, without torch's slow reduction on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu:
            return super().forward(x)
        whole = x.float()
        inverse = whole.square().sum(1, keepdim=True).clamp_min(1e-24).rsqrt()
        return (whole * (inverse * self.scale) * self.gamma + self.bias).to(x.dtype)


def _slots(module: torch.nn.Module) -> int:
    return sum(isinstance(part, WanCausalConv3d) for part in module.modules())


class WanCodec:
    """The Wan 2.1 VAE. Weights, device and dtype are those of `vae`; latent statistics are float32.

    `encode`, `decode` and `stream` build no autograd graph; `posterior` and `decode_latents` do, for training.
    Raises UserError for a Wan 2.2 VAE.
    """

    decode_frames = 0  # latent frames decoded at once, at most; 0 = as many as WORK_PER_CALL allows

    def __init__(self, vae: AutoencoderKLWan):
        if vae.config.is_residual or vae.config.patch_size is not None:
            raise UserError("model.vae is a Wan 2.2 VAE, which this codec does not read; use Wan2.1_VAE.pth")
        self.vae = vae
        for part in vae.modules():
            if isinstance(part, WanCausalConv3d):
                part.__class__ = _FastCausalConv3d  # same parameters and result
            elif isinstance(part, WanRMS_norm):
                part.__class__ = _FastNorm
        self._encoder_slots, self._decoder_slots = _slots(vae.encoder), _slots(vae.decoder)
        shape, place = (1, 1, vae.config.z_dim, 1, 1), {"dtype": torch.float32, "device": vae.device}
        self._mean, self._std = (
            torch.tensor(values, **place).view(shape) for values in (vae.config.latents_mean, vae.config.latents_std)
        )

    @property
    def latent_channels(self) -> int:
        return self.vae.config.z_dim

    def normalize(self, z: Tensor) -> Tensor:
        """Latents of the VAE [B, F, C, h, w] -> latents of the transformer, float32."""
        return (z.float() - self._mean) / self._std

    def denormalize(self, latents: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        return latents.float() * self._std + self._mean

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, T, 3, H, W] in [-1, 1], T = 1 + 4 n -> float32 latents [B, F, C, h, w] of the posterior mean."""
        return self.normalize(self.posterior(pixels).mean)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, F, C, h, w] -> float32 pixels [B, 1 + 4 (F - 1), 3, H, W] in [-1, 1]."""
        return self.decode_latents(self.denormalize(latents)).float().clamp_(-1, 1)

    def stream(self) -> "WanDecoderStream":
        return WanDecoderStream(self)

    def posterior(self, pixels: Tensor) -> Posterior:
        """[B, T, 3, H, W] -> mean and log variance [B, F, C, h, w] of unnormalized latents, with a graph."""
        latent_frames(pixels.shape[1])  # refuses T that is not 1 + 4 n
        x = pixels.to(self.vae.dtype).transpose(1, 2)
        cache: list[Any] = [None] * self._encoder_slots
        cells = x.shape[0] * (x.shape[3] // 8) * (x.shape[4] // 8) * self.vae.config.base_dim
        parts = [
            self.vae.encoder(x[:, :, frames], feat_cache=cache, feat_idx=[0])
            for frames in _calls(x.shape[2], TEMPORAL_STRIDE, cells, x.device.type)
        ]
        mean, logvar = self.vae.quant_conv(torch.cat(parts, dim=2)).transpose(1, 2).chunk(2, dim=2)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode_latents(self, z: Tensor) -> Tensor:
        """Unnormalized z [B, F, C, h, w] -> pixels [B, T, 3, H, W], not clamped, with a graph."""
        return self._decode(z, [None] * self._decoder_slots, first=True)

    def _decode(self, z: Tensor, cache: list[Any], first: bool) -> Tensor:
        """Decode the next frames of a clip; reads and updates `cache`."""
        x = self.vae.post_quant_conv(z.to(self.vae.dtype).transpose(1, 2))
        cells = x.shape[0] * x.shape[3] * x.shape[4] * (self.vae.config.decoder_base_dim or self.vae.config.base_dim)
        parts = [
            self.vae.decoder(x[:, :, frames], feat_cache=cache, feat_idx=[0])
            for frames in _calls(x.shape[2], 1, cells, x.device.type, first=first, most=self.decode_frames)
        ]
        return torch.cat(parts, dim=2).transpose(1, 2)


def _calls(frames: int, stride: int, cells: int, device: str, first: bool = True, most: int = 0) -> Iterator[slice]:
    """Split `frames` into calls: the clip's first frame alone, then as many groups of `stride` as WORK_PER_CALL allows.

    most: at most so many groups; 0 = any number.

    Depends only on shapes and the type of device, so that a clip is always split the same way.
    """
    start = 0
    if first:
        yield slice(0, 1)
        start = 1
    groups = max(1, WORK_PER_CALL.get(device, WORK_PER_CALL["cuda"]) // cells)
    step = stride * min(groups, most or groups)
    for begin in range(start, frames, step):
        yield slice(begin, min(begin + step, frames))


class WanDecoderStream:
    """Decoder of one clip. Its state is the last frames of every convolution's input."""

    def __init__(self, codec: WanCodec):
        self._codec = codec
        self._cache: list[Any] = [None] * codec._decoder_slots
        self._frames = 0  # latent frames decoded so far

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Next latents [B, f, C, h, w] -> float32 pixels [B, T, 3, H, W]; T = 1 + 4 (f - 1) at first, then 4 f."""
        pixels = self._codec._decode(self._codec.denormalize(latents), self._cache, first=self._frames == 0)
        self._frames += latents.shape[1]
        return pixels.float().clamp_(-1, 1)

    def snapshot(self) -> tuple[list[Any], int]:
        """The current state. It shares tensors with the stream, which never writes them in place."""
        return list(self._cache), self._frames

    def restore(self, snapshot: tuple[list[Any], int]) -> None:
        """Go back to where `snapshot` was taken."""
        cache, self._frames = snapshot
        self._cache = list(cache)
