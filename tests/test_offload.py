"""What takes less memory gives the same video."""

import pytest
import torch

from model.codec import WanCodec
from model.offload import HostTextEncoder, SmallSteps
from pipeline import DiagonalPipeline
from pipeline.cli import LOW_MEMORY, parse

PROMPTS = ["a red circle moves right", "a blue square"]


@pytest.mark.parametrize("stream", [False, True])
def test_text_encoder_on_the_host(tiny_text_encoder, stream):
    from conftest import random_text_encoder

    hosted = HostTextEncoder(random_text_encoder(), "cpu", stream=stream)
    for _ in range(2):
        assert torch.equal(hosted(PROMPTS), tiny_text_encoder(PROMPTS))
    assert hosted.dim == tiny_text_encoder.dim


def test_weights_come_back_when_encoding_fails(monkeypatch):
    from conftest import random_text_encoder

    hosted = HostTextEncoder(random_text_encoder(), "cpu", stream=False)

    def fail(*_):
        for parameter in hosted.encoder.parameters():
            parameter.data = parameter.data.clone()  # as if they were elsewhere
        raise KeyboardInterrupt

    before = [p.data_ptr() for p in hosted.encoder.parameters()]
    monkeypatch.setattr(hosted, "embed", fail)
    with pytest.raises(KeyboardInterrupt):
        hosted(PROMPTS)
    assert [p.data_ptr() for p in hosted.encoder.parameters()] == before


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_decoder_in_small_steps(tiny_vae, frames):
    latents = torch.randn(2, 6, 16, 4, 6)
    codec = WanCodec(tiny_vae)
    small = SmallSteps(codec, frames)
    torch.testing.assert_close(small.decode(latents), codec.decode(latents), rtol=0, atol=1e-5)
    stream, twin = small.stream(), codec.stream()
    for part in latents.split(3, dim=1):
        kept = stream.snapshot()
        first = stream.decode(part)
        torch.testing.assert_close(first, twin.decode(part), rtol=0, atol=1e-5)
        stream.restore(kept)
        assert torch.equal(stream.decode(part), first)
    assert small.latent_channels == 16 and small.encode(torch.zeros(1, 5, 3, 32, 48)).shape[1] == 2


@pytest.mark.parametrize("place", ["after_use", "stream"])
def test_pipeline(tiny_assets, place):
    def frames(*overrides):
        return DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", *overrides)(PROMPTS[0]).frames

    small = frames(f"inference.text_encoder={place}", "inference.decode_frames=1")
    assert abs(small.astype(int) - frames().astype(int)).max() <= 1


def test_flag():
    assert parse(["--low_memory", "seed=3"]).overrides == [*LOW_MEMORY, "seed=3"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stream", [False, True])
def test_text_encoder_leaves_the_gpu(stream):
    from conftest import random_text_encoder

    plain = random_text_encoder().to("cuda")
    expected = plain(PROMPTS)
    hosted = HostTextEncoder(random_text_encoder(), "cuda", stream=stream)
    del plain
    torch.cuda.empty_cache()
    for _ in range(2):
        out = hosted(PROMPTS)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert {p.device.type for p in hosted.encoder.parameters()} == {"cpu"}
