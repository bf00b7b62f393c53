"""A small, fast decoder in the layout of TAEHV (`taew2_1`): 2-D convolutions with one frame of memory.

    latents [B, F, 16, h, w], normalised, as the transformer makes them -> pixels [B, 1 + 4 (F - 1), 3, 8 h, 8 w]

Every memory block sees the current frame and the one before it (zeros before the first); temporal upsampling makes two
frames of one, twice. F latent frames thus become 4 F pixel frames, of which the first 3 lie before the clip's start and
are dropped. Frames are processed in parallel; the state between calls is the last input frame of each memory block.

Precision: with a student in half precision on a GPU it decodes in float16, whose 11 bits of precision give 17 dB more
than bfloat16's 8, unless activations come near its limit (`cast_to_best_dtype`). An overflow stays infinite through
ReLUs and skip connections, and the decoded pixels are NaN. On a CPU it runs in float32, since float16 is a hundred
times slower there without hardware support.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from configs.errors import UserError
from utils.logs import get_logger
from utils.seeds import generator

log = get_logger(__name__)

FRAMES_TO_TRIM = 3  # pixel frames before the clip starts
HALF_LIMIT = torch.finfo(torch.float16).max / 16  # of activations of probes; real latents may be 16 times as large


@dataclass(frozen=True, kw_only=True)
class TinyDecoderConfig:
    """Sizes of the decoder; the defaults are those of `taew2_1`."""

    latent_channels: int = 16
    widths: tuple[int, int, int, int] = (256, 128, 64, 64)  # channels of the three stages and of the last convolution
    growth: tuple[int, int, int] = (1, 2, 2)  # frames made of one at the end of each stage
    bias: bool = False  # of the convolutions between stages


class Clamp(nn.Module):
    """Soft limit: 3 tanh(x / 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """Residual block over the channels of this frame and the one before. `conv.{0,2,4}` are TAEHV's parameter names."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """`x` and `past` [N, C, H, W], frame n of `past` being the one before frame n of `x`."""
        return functional.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class TemporalUpsample(nn.Module):
    """`stride` frames from one, by a 1x1 convolution whose output channels are split into frames."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N stride, C, H, W]; frames stay next to each other."""
        y = self.conv(x)
        if self.stride > 1 and y.is_contiguous(memory_format=torch.channels_last):
            y = y.movedim(1, -1).unflatten(-1, (self.stride, -1)).movedim(-2, 1)  # [N, stride, H, W, C]
            return y.flatten(0, 1).movedim(-1, 1)  # a single copy, in channels-last layout
        return y.reshape(-1, *x.shape[1:])


class TinyDecoder(nn.Module):
    """The decoder as one nn.Sequential, so that its keys are `decoder.N...` as in TAEHV's files."""

    def __init__(self, config: TinyDecoderConfig | None = None):
        super().__init__()
        self.config = config or TinyDecoderConfig()
        widths, bias = self.config.widths, self.config.bias
        layers: list[nn.Module] = [
            Clamp(),
            nn.Conv2d(self.config.latent_channels, widths[0], 3, padding=1),
            nn.ReLU(inplace=True),
        ]
        for width, following, stride in zip(widths[:3], widths[1:], self.config.growth, strict=True):
            layers += [MemoryBlock(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), TemporalUpsample(width, stride)]
            layers += [nn.Conv2d(width, following, 3, padding=1, bias=bias)]
        layers += [nn.ReLU(inplace=True), nn.Conv2d(widths[3], 3, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder[1].weight.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder[1].weight.device

    def forward(self, latents: Tensor, memory: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Latents [B, F, C, h, w] -> all 4 F frames [B, 4 F, 3, 8 h, 8 w] in about [0, 1], and the memory after them.

        memory: the second result of the previous call; None at the start of a clip.
        """
        batch = latents.shape[0]
        x = latents.flatten(0, 1)
        after: list[Tensor] = []
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                if batch == 1:  # with four dimensions, which keep a layout of channels last
                    past = torch.cat([torch.zeros_like(x[:1]) if memory is None else memory[len(after)][0], x[:-1]])
                    after.append(x[-1:].clone()[None])
                else:
                    frames = x.unflatten(0, (batch, -1))
                    first = frames.new_zeros(frames[:, :1].shape) if memory is None else memory[len(after)]
                    past = torch.cat([first, frames[:, :-1]], dim=1).flatten(0, 1)
                    after.append(frames[:, -1:].clone())  # a copy: a view would keep all frames alive
                x = layer(x, past)
            else:
                x = layer(x)
        return x.unflatten(0, (batch, -1)), after


def cast_to_best_dtype(decoder: TinyDecoder, dtype: torch.dtype) -> TinyDecoder:
    """Cast `decoder`, which is float32, in place to the best dtype beside a student of `dtype` on its device."""
    if dtype == torch.float32 or decoder.device.type == "cpu":
        return decoder
    return decoder.to(best_half_dtype(decoder))


def best_half_dtype(decoder: TinyDecoder) -> torch.dtype:
    """float16, or bfloat16 if activations of `decoder` (float32) come too near to the limit of float16."""
    largest = max_activation(decoder)
    if largest <= HALF_LIMIT:
        return torch.float16
    log.warning("the tiny decoder's activations reach %.3g, too much for float16; it decodes in bfloat16", largest)
    return torch.bfloat16


@torch.no_grad()
def max_activation(decoder: TinyDecoder) -> float:
    """Largest |x| between layers, and of weights, for latents of 1 and 3 times their usual size, and saturated ones."""
    shape = (3, decoder.config.latent_channels, 12, 12)
    drawn = torch.randn(shape, generator=generator(0, "tiny decoder's range"))
    probes = torch.stack([drawn, 3 * drawn, 9 * drawn.sign()]).to(decoder.device, decoder.dtype)
    seen = [p.abs().amax() for p in decoder.parameters()]
    layers = [layer for layer in decoder.modules() if isinstance(layer, nn.Conv2d | MemoryBlock)]
    hooks = [layer.register_forward_hook(lambda _, __, y: seen.append(y.abs().amax())) for layer in layers]
    decoder(probes)
    for hook in hooks:
        hook.remove()
    return float(torch.stack(seen).amax())


class TinyDecoderCodec:
    """The tiny decoder as a `Codec` that can only decode."""

    decode_frames = 0  # latent frames decoded at once, at most; 0 = any number

    def __init__(self, decoder: TinyDecoder):
        self.decoder = decoder

    def encode(self, pixels: Tensor) -> Tensor:
        """Raises UserError: there is no encoder."""
        raise UserError("model.codec=taehv decodes only; set model.codec=wan to encode pixels")

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, F, C, h, w] -> float32 pixels [B, 1 + 4 (F - 1), 3, H, W] in [-1, 1]."""
        return self.stream().decode(latents)

    def stream(self) -> "TinyDecoderStream":
        return TinyDecoderStream(self.decoder, self.decode_frames)


class TinyDecoderStream:
    """Decoder of one clip. Its state is that of the memory blocks."""

    def __init__(self, decoder: TinyDecoder, decode_frames: int):
        self._decoder, self._decode_frames = decoder, decode_frames
        self._memory: list[Tensor] | None = None

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Next latents [B, f, C, h, w] -> float32 pixels [B, T, 3, H, W]; T = 1 + 4 (f - 1) at first, then 4 f.

        NaN where the decoder overflowed.
        """
        parts = latents.split(self._decode_frames or latents.shape[1], dim=1)
        return torch.cat([self._decode(part) for part in parts], dim=1)

    def _decode(self, latents: Tensor) -> Tensor:
        starts = self._memory is None
        frames, self._memory = self._decoder(latents.to(self._decoder.dtype), self._memory)
        if starts:
            frames = frames[:, FRAMES_TO_TRIM:]
        frames = frames.float()
        return frames.mul(2).sub(1).clamp(-1, 1).add(frames - frames)  # infinity becomes NaN, not white

    def snapshot(self) -> list[Tensor] | None:
        """The current state; its tensors are never written in place."""
        return self._memory

    def restore(self, snapshot: list[Tensor] | None) -> None:
        """Go back to where `snapshot` was taken."""
        self._memory = snapshot
