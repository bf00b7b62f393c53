"""Decoders in their fast form give what they gave; delivery keeps order and asks ahead."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from model.codec import WanCodec
from model.fast import tiny_decoder as fast_tiny_decoder
from model.fast.codec import optimize_codec
from model.tiny_decoder import TinyDecoder, TinyDecoderCodec, TinyDecoderConfig
from pipeline.async_decoder import AsyncDecoder, prefetch, to_frames
from pipeline.noise import NoiseSource
from utils.timers import SpanTimer


def tiny_codec() -> TinyDecoderCodec:
    torch.manual_seed(0)
    return TinyDecoderCodec(TinyDecoder(TinyDecoderConfig(widths=(16, 8, 8, 8))).eval().requires_grad_(False))


def in_steps(codec, frames: int):
    codec.decode_frames = frames
    return codec


def stream(codec, latents) -> torch.Tensor:
    decoder = codec.stream()
    return torch.cat([decoder.decode(part) for part in latents.split(3, dim=1)], dim=1)


@pytest.mark.parametrize("kind", ["tiny", "wan", "small steps"])
def test_the_same_pixels(kind, tiny_vae):
    torch.manual_seed(1)
    latents = torch.randn(1, 6, 16, 4, 6)
    make = {
        "tiny": tiny_codec,
        "wan": lambda: WanCodec(copy.deepcopy(tiny_vae)),
        "small steps": lambda: in_steps(WanCodec(copy.deepcopy(tiny_vae)), 2),
    }[kind]
    torch.testing.assert_close(
        stream(optimize_codec(make(), compiled=False), latents), stream(make(), latents), atol=2e-5, rtol=0
    )


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("growth", [(1, 2, 2), (2, 1, 2), (2, 2, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_merged_convolutions_are_the_plain_ones(batch, growth, bias):
    """In double precision, where only a mistake can make a difference; borders, odd sizes and memory included."""
    torch.manual_seed(2)
    config = TinyDecoderConfig(latent_channels=4, widths=(12, 10, 6, 8), growth=growth, bias=bias)
    decoder = TinyDecoder(config).double().eval().requires_grad_(False)
    latents = torch.randn(batch, 5, 4, 3, 5, dtype=torch.float64) * 2
    fast = optimize_codec(TinyDecoderCodec(copy.deepcopy(decoder)), compiled=False).decoder
    memories = [None, None]
    for part in latents.split((2, 3), dim=1):
        wanted, memories[0] = decoder(part, memories[0])
        got, memories[1] = fast(part, memories[1])
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


def test_a_snapshot_of_either_form_is_one_of_the_other():
    latents = torch.randn(2, 9, 16, 4, 6, generator=torch.Generator().manual_seed(4))
    forms = {"plain": tiny_codec(), "fast": optimize_codec(tiny_codec(), compiled=False)}
    wanted = stream(forms["plain"], latents)
    for before, after in (("plain", "fast"), ("fast", "plain"), ("fast", "fast")):
        one, two = forms[before].stream(), forms[after].stream()
        begin = one.decode(latents[:, :3])
        two.restore(one.snapshot())
        for part in latents[:, 3:].split(2, dim=1):
            begin = torch.cat([begin, two.decode(part)], dim=1)
        torch.testing.assert_close(begin, wanted, atol=2e-5, rtol=0)


def test_no_shape_of_the_tiny_decoder_is_left_uncompiled():
    """Parts of 2 and 1 latent frames, three batch sizes, two decoders: dynamo's own limit would be 8 in all."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(2):
            counter = CompileCounterWithBackend("aot_eager")
            fast = in_steps(optimize_codec(tiny_codec(), compiled=True, backend=counter), 2)
            for batch in (1, 2, 3):
                latents = torch.randn(batch, 6, 16, 4, 6)
                torch.testing.assert_close(stream(fast, latents), stream(tiny_codec(), latents), atol=1e-5, rtol=0)
                made = counter.frame_count
                stream(fast, latents)
                assert counter.frame_count == made, "a second video compiles nothing"
                assert counter.frame_count <= 16 * batch, "8 functions, 2 numbers of frames, once a batch size"
    torch._dynamo.reset()


def test_reading_the_last_stage_writes_it_once():
    """Compiled, what is made of the kinds is one tensor, and they are left as they are: they are large."""
    torch._dynamo.reset()
    kinds = torch.randn(2, 5, 7, 2 * 4 * 8)
    before = kinds.clone()
    made, (code, *_) = run_and_get_code(torch.compile(fast_tiny_decoder._inside, dynamic=False), kinds, None, 2)
    assert torch.equal(kinds, before) and torch.equal(made, fast_tiny_decoder._inside(before, None, 2))
    assert code.count("out_ptr") and "out_ptr1" not in code
    torch._dynamo.reset()


def test_what_was_merged_cannot_be_cast():
    fast = optimize_codec(tiny_codec(), compiled=False)
    with pytest.raises(AssertionError, match="was moved"):
        fast.decoder.to(torch.bfloat16)
        fast.decode(torch.randn(1, 3, 16, 4, 6))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiny_decoder_on_a_gpu(compiled, dtype):
    """cuDNN's convolutions with a ReLU, in half precision: no further from float32 than plain ones are."""
    torch.manual_seed(3)
    decoder = TinyDecoder().cuda().eval().requires_grad_(False)
    latents = torch.randn(1, 6, 16, 8, 12, device="cuda")
    wanted = stream(TinyDecoderCodec(decoder), latents)
    half = copy.deepcopy(decoder).to(dtype)
    plain = stream(TinyDecoderCodec(half), latents)
    fast = stream(optimize_codec(TinyDecoderCodec(copy.deepcopy(half)), compiled=compiled), latents)
    assert (fast - wanted).norm() < 1.5 * (plain - wanted).norm() + 1e-6


def test_wan_is_compiled_once_for_each_width(tiny_vae):
    """Not for frames, chunks or resolutions: those would pass the limit of compilations, and then nothing is."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    latents = torch.randn(1, 9, 16, 4, 6)
    plain = stream(WanCodec(copy.deepcopy(tiny_vae)), latents)
    fast = optimize_codec(WanCodec(copy.deepcopy(tiny_vae)), compiled=True, backend=counter)
    torch.testing.assert_close(stream(fast, latents), plain, atol=2e-5, rtol=0)
    made = counter.frame_count
    assert 0 < made <= 11  # 4 functions, 3 widths; nothing is added up at the last width
    stream(fast, latents[:, :7])
    stream(fast, torch.randn(1, 6, 16, 6, 4))
    assert counter.frame_count == made
    torch._dynamo.reset()


def test_delivery_gives_the_decoders_frames():
    codec, latents = tiny_codec(), torch.randn(2, 3, 16, 4, 6)
    timer = SpanTimer(torch.device("cpu"))
    frames, finite = AsyncDecoder(torch.device("cpu"), overlap=False).decode(codec.stream(), latents, timer)()
    assert torch.equal(frames, to_frames(codec.decode(latents))) and finite.tolist() == [[True] * 2] * 2
    assert list(timer.spans()) == ["decode"]


def test_ahead_asks_for_one_more_than_it_gives():
    asked = []

    def items():
        for i in range(4):
            asked.append(i)
            yield i

    seen = [(i, len(asked)) for i in prefetch(items(), 1)]
    assert seen == [(0, 2), (1, 3), (2, 4), (3, 4)]
    assert list(prefetch(iter(()), 1)) == []


def test_noise_drawn_ahead_is_the_noise(tiny_geometry):
    plain = NoiseSource([3, 4], tiny_geometry, "cpu", torch.float32)
    early = NoiseSource([3, 4], tiny_geometry, "cpu", torch.float32)
    early._ahead = (1, early._on_host("initial", 1))
    assert torch.equal(early.initial(0), plain.initial(0))
    assert torch.equal(early.initial(1), plain.initial(1))
