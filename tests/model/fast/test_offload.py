"""What takes less memory gives the same video."""

import copy
import gc

import pytest
import torch
from small_wan import build, by_chunk, inputs, sizes, stream_cache

from configs.errors import UserError
from configs.schema import InferenceConfig
from model.codec import WanCodec
from model.fast.int8 import Int8Linear, quantize_linears
from model.fast.offload import BlockOffload, OffloadedTextEncoder
from model.fast.student import FastPlan
from pipeline import DiagonalPipeline
from pipeline.cli import LOW_MEMORY

PROMPTS = ["a red circle moves right", "a blue square"]


@pytest.mark.parametrize("stream", [False, True])
def test_text_encoder_on_the_host(tiny_text_encoder, stream):
    from conftest import random_text_encoder

    hosted = OffloadedTextEncoder(random_text_encoder(), "cpu", stream=stream)
    for _ in range(2):
        assert torch.equal(hosted(PROMPTS), tiny_text_encoder(PROMPTS))
    assert hosted.dim == tiny_text_encoder.dim


def test_weights_come_back_when_encoding_fails(monkeypatch):
    from conftest import random_text_encoder

    hosted = OffloadedTextEncoder(random_text_encoder(), "cpu", stream=False)

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
    codec, small = WanCodec(tiny_vae), WanCodec(tiny_vae)
    small.decode_frames = frames
    torch.testing.assert_close(small.decode(latents), codec.decode(latents), rtol=0, atol=1e-5)
    stream, twin = small.stream(), codec.stream()
    for part in latents.split(3, dim=1):
        kept = stream.snapshot()
        first = stream.decode(part)
        torch.testing.assert_close(first, twin.decode(part), rtol=0, atol=1e-5)
        stream.restore(kept)
        assert torch.equal(stream.decode(part), first)


class TestBlocksOnTheHost:
    """On a CPU host and device are one, and slots and their reuse are what they are on a GPU."""

    @pytest.mark.parametrize("layers", [1, 2, 5])
    @torch.no_grad()
    def test_streamed_blocks_give_the_same_bits(self, layers):
        model, geo = build(num_layers=layers)[0], sizes(3, 1)
        x, t, text = inputs(geo, 10)
        expected = by_chunk(model, stream_cache(model, geo), geo, x, t, model.text_kv(text))
        before = copy.deepcopy(model.state_dict())
        stream = BlockOffload(model, "cpu")
        for _ in range(2):
            assert torch.equal(by_chunk(model, stream_cache(model, geo), geo, x, t, model.text_kv(text)), expected)
        assert torch.equal(by_chunk(model, stream_cache(model, geo), geo, x, t, text), expected), "text within a block"
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        size = sum(p.nbytes for p in model.blocks[0].parameters())
        assert 2 * size <= stream.bytes < 2 * size + 2 * 256 * len([*model.blocks[0].parameters()])

    @torch.no_grad()
    def test_it_is_the_slots_that_are_read(self):
        """Without a copy to them the result is another: the block does not work on the host's tensors."""
        model, geo = build()[0], sizes(3, 1)
        x, t, text = inputs(geo, 2)
        expected = model(x, t, text)
        stream = BlockOffload(model, "cpu")
        for slot in stream._slots:
            slot.zero_()
        stream._fetch = lambda i: setattr(stream, "_prefetched", (i, [torch.zeros_like(x) for x in stream._blocks[i]]))
        assert not torch.allclose(model(x, t, text), expected, atol=1e-3)

    @torch.no_grad()
    def test_changed_blocks_and_broken_passes(self, monkeypatch):
        """A pass that ends in its middle leaves nothing behind, and weights may be changed between passes."""
        model, geo = build()[0], sizes(3, 1)
        x, t, text = inputs(geo, 2)
        twin = copy.deepcopy(model)
        BlockOffload(model, "cpu")
        with monkeypatch.context() as patch:
            patch.setattr(model.blocks[1].ffn, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                model(x, t, text)
        for network in (model, twin):
            for block in network.blocks:
                block.ffn.net[2].weight.data += 0.1
                block.attn1.to_q.weight.data = block.attn1.to_q.weight.data * 1.1
        assert torch.equal(model(x, t, text), twin(x, t, text))

    @pytest.mark.parametrize(
        "setting", [{"precision": "fp8"}, {"precision": "fp8_attention"}, {"compile": "blocks"}, {"cuda_graphs": "on"}]
    )
    def test_what_does_not_go_with_it(self, monkeypatch, setting):
        monkeypatch.setattr("model.fast.student.attention_support", lambda _: ((9, 0), ["sdpa"]))
        with pytest.raises(UserError, match=r"does not go with inference\.student=stream"):
            InferenceConfig(student="stream", **setting)
        assert FastPlan.from_config(InferenceConfig(student="stream"), torch.device("cuda:0")).is_noop


class TestInt8:
    def test_linear_against_its_definition(self):
        torch.manual_seed(0)
        linear, x = torch.nn.Linear(50, 7), torch.randn(3, 4, 50)
        ours = Int8Linear(linear, "cpu", "cpu")
        rows = linear.weight.detach().double()
        steps = rows.abs().max(1, keepdim=True).values / 127
        assert ours.weight.dtype == torch.int8 and ours.weight.abs().amax(1).tolist() == [127] * 7
        assert ((ours.weight.double() * steps - rows).abs() <= steps * 0.5001).all()
        expected = x.double() @ (ours.weight.double() * steps).T + linear.bias.detach().double()
        torch.testing.assert_close(ours(x).double(), expected, rtol=0, atol=1e-5)

    def test_row_of_zeros(self):
        linear = torch.nn.Linear(4, 2, bias=False)
        linear.weight.data.zero_()
        assert not Int8Linear(linear, "cpu", "cpu")(torch.ones(1, 4)).any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("place", ["keep", "stream", "after_use"])
    def test_text_encoder(self, tiny_text_encoder, dtype, place):
        """Half the bytes, and an embedding whose direction is nearly the same."""
        from conftest import random_text_encoder

        text = random_text_encoder().to(dtype)
        linears = sum(m.weight.nbytes for m in text.encoder.modules() if isinstance(m, torch.nn.Linear))
        before = sum(x.nbytes for x in text.encoder.state_dict().values())
        assert quantize_linears(text.encoder.encoder, "cpu", "cpu") == 14
        after = sum(x.nbytes for x in text.encoder.state_dict().values())
        share = torch.int8.itemsize / dtype.itemsize
        assert after - before == pytest.approx((share - 1) * linears, rel=0.05)
        hosted = text if place == "keep" else OffloadedTextEncoder(text, "cpu", stream=place == "stream")
        out, exact = hosted(PROMPTS).double(), tiny_text_encoder(PROMPTS).double()
        assert 0 < (out - exact).norm() / exact.norm() < 0.02


def test_a_pipeline_in_little_memory_gives_the_same_frames(tiny_assets):
    def frames(*overrides):
        pipe = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", *overrides)
        return pipe(PROMPTS[0]).videos[0].frames.astype(int)

    whole = frames()
    for settings in (["inference.text_encoder=after_use", "inference.decode_frames=1"], LOW_MEMORY):
        assert abs(frames(*settings) - whole).max() <= 1
    for place in ("keep", "after_use", "stream"):
        assert 0 < abs(frames("inference.text_int8=true", f"inference.text_encoder={place}") - whole).mean() < 3


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stream", [False, True])
def test_text_encoder_leaves_the_gpu(stream):
    from conftest import random_text_encoder

    plain = random_text_encoder().to("cuda")
    expected = plain(PROMPTS)
    hosted = OffloadedTextEncoder(random_text_encoder(), "cuda", stream=stream)
    del plain
    torch.cuda.empty_cache()
    for _ in range(2):
        out = hosted(PROMPTS)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert {p.device.type for p in hosted.encoder.parameters()} == {"cpu"}


def requested() -> int:
    """Bytes of the tensors on the GPU, without what the allocator adds: up to 1 MiB for one of 27 MiB."""
    gc.collect()
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_blocks_come_to_the_gpu_and_go():
    """Many layers, wide enough for copies to take longer than a block: a race would show as other numbers."""
    wide = dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=6)
    model, geo = build(**wide)[0].bfloat16(), sizes(3, 1)
    x, t, text = inputs(geo, 10)
    x, t, text = x.cuda(), t.cuda(), text.cuda()
    twin = copy.deepcopy(model).cuda()
    expected = by_chunk(twin, stream_cache(twin, geo, device="cuda"), geo, x, t, twin.text_kv(text))
    del twin
    torch.cuda.empty_cache()
    held = requested()
    stream = BlockOffload(model, "cuda")
    rest = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("blocks."))
    taken = requested() - held
    assert taken <= stream.bytes + rest, f"{taken} bytes taken, for slots of {stream.bytes} and {rest} of the rest"
    for _ in range(5):
        out = by_chunk(model, stream_cache(model, geo, device="cuda"), geo, x, t, model.text_kv(text))
        assert torch.equal(out, expected)
    assert {p.device.type for p in model.blocks.parameters()} == {"cpu"}
