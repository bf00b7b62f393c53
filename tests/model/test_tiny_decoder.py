"""The tiny decoder against a per-frame twin written from the layout's description alone."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from configs.errors import UserError
from model.fast.codec import optimize_codec
from model.tiny_decoder import TinyDecoder, TinyDecoderCodec, TinyDecoderConfig, best_half_dtype, cast_to_best_dtype

SMALL = TinyDecoderConfig(latent_channels=4, widths=(12, 8, 6, 6))


@pytest.fixture(scope="module")
def decoder() -> TinyDecoder:
    torch.manual_seed(0)
    return TinyDecoder(SMALL).eval()


def latents(frames: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, frames, 4, 2, 3, generator=torch.Generator().manual_seed(1)) * 3


def twin(weights: dict[str, torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
    """One clip [F, C, h, w], one frame at a time, from the state dict: -> [4 F, 3, 8 h, 8 w], not trimmed."""

    def conv(x, index, name="", padding=1):
        key = f"decoder.{index}{name}"
        return F.conv2d(x, weights[f"{key}.weight"], weights.get(f"{key}.bias"), padding=padding)

    past: dict[int, torch.Tensor] = {}

    def memory(x, index):
        both = torch.cat([x, past.get(index, torch.zeros_like(x))], dim=1)
        past[index] = x
        h = F.relu(conv(both, index, ".conv.0"))
        h = F.relu(conv(h, index, ".conv.2"))
        return F.relu(conv(h, index, ".conv.4") + x)

    def stage(x, first, after):
        """Three memory blocks, twice the size, the frames that one becomes, a convolution; depth first."""
        for index in range(first, first + 3):
            x = memory(x, index)
        x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        grown = conv(x, first + 4, ".conv", padding=0)
        for frame in grown.split(x.shape[1], dim=1):
            yield from after(conv(frame, first + 5))

    def finish(x):
        yield conv(F.relu(x), 22)

    out = []
    for frame in latents:
        x = F.relu(conv(torch.tanh(frame[None] / 3) * 3, 1))
        out += stage(x, 3, lambda a: stage(a, 9, lambda b: stage(b, 15, finish)))
    return torch.cat(out)


def test_matches_per_frame_twin(decoder):
    x = latents(5)
    with torch.no_grad():
        every, _ = decoder(x)
        expected = torch.stack([twin(decoder.state_dict(), clip) for clip in x])
    assert every.shape == (2, 20, 3, 16, 24)
    torch.testing.assert_close(every, expected, rtol=0, atol=1e-6)
    pixels = TinyDecoderCodec(decoder).decode(x)
    torch.testing.assert_close(pixels, (expected[:, 3:] * 2 - 1).clamp(-1, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sizes", [(3, 3, 3), (1, 2, 5, 1)])
def test_streamed_equals_whole(decoder, sizes):
    x = latents(9)
    codec = TinyDecoderCodec(decoder)
    stream, other = codec.stream(), codec.stream()
    chunks = []
    for part in x.split(list(sizes), dim=1):
        chunks.append(stream.decode(part))
        other.decode(part.flip(1))  # another stream on the same weights disturbs nobody
    assert [c.shape[1] for c in chunks] == [4 * n - 3 * (i == 0) for i, n in enumerate(sizes)]
    torch.testing.assert_close(torch.cat(chunks, 1), codec.decode(x), rtol=0, atol=1e-6)


def test_a_stream_can_be_rewound(decoder):
    x = latents(6)
    stream = TinyDecoderCodec(decoder).stream()
    start = stream.snapshot()
    first = stream.decode(x[:, :3])
    mark = stream.snapshot()
    second = stream.decode(x[:, 3:])
    stream.restore(mark)
    torch.testing.assert_close(stream.decode(x[:, 3:]), second, rtol=0, atol=0)
    stream.restore(start)
    torch.testing.assert_close(stream.decode(x[:, :3]), first, rtol=0, atol=0)


@pytest.mark.parametrize("scale, expected", [(1, torch.float16), (1e4, torch.bfloat16)])
def test_float16_where_activations_leave_room(decoder, scale, expected, caplog):
    scaled = copy.deepcopy(decoder)
    with torch.no_grad():
        scaled.decoder[1].weight.mul_(scale)
    assert best_half_dtype(scaled) == expected
    assert bool(caplog.records) == (expected == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cpu_decodes_in_float32(dtype):
    assert cast_to_best_dtype(TinyDecoder(SMALL), dtype).dtype == torch.float32


def test_float16_is_nearer_to_float32(decoder):
    x = latents(3, batch=1)
    wanted = TinyDecoderCodec(decoder).decode(x)

    def decibels(dtype):
        error = TinyDecoderCodec(copy.deepcopy(decoder).to(dtype)).decode(x) - wanted
        return 10 * math.log10(4 / error.square().mean())

    assert decibels(torch.float16) > decibels(torch.bfloat16) + 12


@pytest.mark.parametrize("layer", [1, 3, 7, 8, 15, 22])
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_an_overflow_is_never_a_picture(decoder, layer, fast):
    """Wherever it happens: an infinity that a ReLU or the last clamp could make black or white is NaN at the end."""
    broken = copy.deepcopy(decoder)
    with torch.no_grad():
        for p in broken.decoder[layer].parameters():
            p.mul_(60_000 / p.abs().max().clamp_min(1e-3))  # finite in float16; what comes of it is not
    codec = TinyDecoderCodec(broken.half())
    if fast:
        codec = optimize_codec(codec, compiled=False)
    pixels = codec.decode(100 * latents(3, batch=1))
    assert not pixels.isfinite().all()
    assert codec.stream().decode(latents(3, batch=1) * torch.nan).isnan().any()


def test_public_layout():
    """Key names and shapes of `taew2_1`, written out by hand."""
    shapes = {name: tuple(value.shape) for name, value in TinyDecoder().state_dict().items()}
    expected = {
        "decoder.1.weight": (256, 16, 3, 3),
        "decoder.1.bias": (256,),
        "decoder.7.conv.weight": (256, 256, 1, 1),
        "decoder.8.weight": (128, 256, 3, 3),
        "decoder.13.conv.weight": (256, 128, 1, 1),
        "decoder.14.weight": (64, 128, 3, 3),
        "decoder.19.conv.weight": (128, 64, 1, 1),
        "decoder.20.weight": (64, 64, 3, 3),
        "decoder.22.weight": (3, 64, 3, 3),
        "decoder.22.bias": (3,),
    }
    for block, width in ((3, 256), (4, 256), (5, 256), (9, 128), (10, 128), (11, 128), (15, 64), (16, 64), (17, 64)):
        for conv, inputs in ((0, 2 * width), (2, width), (4, width)):
            expected[f"decoder.{block}.conv.{conv}.weight"] = (width, inputs, 3, 3)
            expected[f"decoder.{block}.conv.{conv}.bias"] = (width,)
    assert shapes == expected


def test_does_not_encode(decoder):
    with pytest.raises(UserError, match="model.codec=wan"):
        TinyDecoderCodec(decoder).encode(torch.zeros(1, 5, 3, 16, 16))
