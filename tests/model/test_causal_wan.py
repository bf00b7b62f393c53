"""The causal student against diffusers' own Wan transformer, and its ways of seeing the past against each other."""

import pytest
import torch
from small_wan import CLOSE, NETWORK, build, by_chunk, inputs, sizes, stream_cache

from model.cache import GraphCache
from model.causal_wan import FrameRotary, chunk_causal_mask


def masks(geo, frames, device, kinds, teacher_forcing=True):
    return [chunk_causal_mask(geo, frames, device, teacher_forcing=teacher_forcing, kind=kind) for kind in kinds]


def gradients(kinds, device):
    """Of all parameters, by kind of mask, with teacher forcing."""
    model, geo = build(attention_head_dim=32)[0].to(device), sizes(3, 1, height=48, width=80)
    x, t, text = (y.to(device) for y in inputs(geo, 20))
    ids, gathered = torch.arange(10, device=device).repeat(2), []
    for mask in masks(geo, 10, device, kinds):
        model.zero_grad()
        model(x, t, text, frame_ids=ids, mask=mask).square().mean().backward()
        gathered.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return gathered


class TestAgainstDiffusers:
    @pytest.mark.parametrize(
        "changes, height, width, frames",
        [
            ({}, 32, 48, 3),
            ({"num_attention_heads": 3, "attention_head_dim": 16}, 64, 32, 5),
            ({"num_attention_heads": 1, "attention_head_dim": 128, "num_layers": 1}, 16, 16, 2),
            ({"in_channels": 4, "out_channels": 4, "cross_attn_norm": False}, 48, 80, 1),
        ],
    )
    @torch.no_grad()
    def test_whole_clip_at_one_timestep(self, changes, height, width, frames):
        ours, theirs = build(**changes)
        c = ours.config.in_channels
        x, text = torch.randn(2, frames, c, height // 8, width // 8), torch.randn(2, 5, NETWORK["text_dim"])
        t = torch.tensor([933.0629, 357.1429])
        expected = theirs(x.transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2)
        assert expected.abs().max() > 0.5
        assert torch.allclose(ours(x, t, text), expected, **CLOSE)
        assert torch.allclose(ours(x, t[:, None].expand(2, frames), text), expected, **CLOSE)

    def test_gradients_are_those_of_diffusers(self):
        ours, theirs = build()
        x, text = torch.randn(1, 3, 16, 4, 6), torch.randn(1, 5, NETWORK["text_dim"])
        t, weight = torch.tensor([733.0]), torch.randn(1, 3, 16, 4, 6)
        (ours(x, t, text) * weight).sum().backward()
        (theirs(x.transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2) * weight).sum().backward()
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, atol=1e-5 * q.grad.abs().max().item() + 1e-6, rtol=1e-4), name

class TestCache:
    @pytest.mark.parametrize("window, sink", [(0, 0), (1, 0), (2, 0), (2, 1), (3, 1), (4, 2), (9, 1)])
    @torch.no_grad()
    def test_chunk_by_chunk_is_one_block_causal_forward(self, window, sink):
        model, geo = build()[0], sizes(window, sink)
        x, t, text = inputs(geo, 14)
        stream = by_chunk(model, stream_cache(model, geo), geo, x, t, text)
        graph = by_chunk(model, GraphCache(geo, 3), geo, x, t, text)
        whole = model(x, t, text, mask=chunk_causal_mask(geo, 14, "cpu"))
        assert torch.equal(stream, graph), "both caches give the same bits"
        assert torch.allclose(stream, whole, **CLOSE)

    @pytest.mark.parametrize(
        "changes, chunk_frames, height, width",
        [
            ({"num_attention_heads": 3, "attention_head_dim": 16}, 1, 48, 32),
            ({"num_attention_heads": 1, "attention_head_dim": 32, "num_layers": 2}, 3, 16, 64),
        ],
    )
    @torch.no_grad()
    def test_other_heads_layers_and_resolutions(self, changes, chunk_frames, height, width):
        model, geo = build(**changes)[0], sizes(3, 1, chunk_frames, height, width)
        x, t, text = inputs(geo, 5 * chunk_frames)
        stream = by_chunk(model, stream_cache(model, geo), geo, x, t, text)
        assert torch.allclose(stream, model(x, t, text, mask=chunk_causal_mask(geo, 5 * chunk_frames, "cpu")), **CLOSE)

    @torch.no_grad()
    def test_the_window_matters(self):
        """The tests above would see a wrong window: windows differ by far more than their tolerance."""
        model = build()[0]
        x, t, text = inputs(sizes(0, 0), 14)
        masks = [chunk_causal_mask(sizes(w, s), 14, "cpu") for w, s in ((0, 0), (3, 0), (3, 1))]
        a, b, c = (model(x, t, text, mask=mask)[:, -2:] for mask in masks)
        assert min((a - b).abs().max(), (b - c).abs().max(), (a - c).abs().max()) > 1e-3

    @torch.no_grad()
    def test_steps_of_a_chunk_rewrite_its_keys(self):
        """What later chunks see of a chunk is its last forward, whatever came before."""
        model, geo = build()[0], sizes(3, 1)
        x, t, text = inputs(geo, 12)
        noise, other, _ = inputs(geo, 12, seed=2)
        direct = by_chunk(model, stream_cache(model, geo), geo, x, t, text)
        for cache in (stream_cache(model, geo), GraphCache(geo, 3)):
            stepped = []
            for k in range(6):
                s = geo.chunk(k)
                for latents, level in ((noise, other), (noise, t), (x, t)):
                    v = model(latents[:, s], level[:, s], text, view=cache.begin(k), start_frame=s.start)
                stepped.append(v)
            assert torch.equal(torch.cat(stepped, 1), direct)

    @torch.no_grad()
    def test_text_keys_computed_once_are_the_same(self):
        model, geo = build()[0], sizes(3, 1)
        x, t, text = inputs(geo, 8)
        raw = by_chunk(model, stream_cache(model, geo), geo, x, t, text)
        kept = by_chunk(model, stream_cache(model, geo), geo, x, t, model.text_kv(text))
        assert torch.equal(raw, kept)
        assert (raw - by_chunk(model, stream_cache(model, geo), geo, x, t, -text)).abs().max() > 1e-3

    def test_a_mask_beside_a_cache_is_refused(self):
        model, geo = build()[0], sizes(3, 1)
        x, t, text = inputs(geo, 2)
        with pytest.raises(AssertionError, match="mask"):
            model(x, t, text, view=GraphCache(geo, 3).begin(0), mask=chunk_causal_mask(geo, 2, "cpu"))


class TestMasks:
    @pytest.mark.parametrize("window, sink", [(0, 0), (2, 0), (3, 1)])
    @torch.no_grad()
    def test_teacher_forcing_is_noisy_chunks_over_cached_context(self, window, sink):
        model, geo, frames = build()[0], sizes(window, sink), 10
        x, t, text = inputs(geo, frames)
        context, level, _ = inputs(geo, frames, seed=2)
        mask = chunk_causal_mask(geo, frames, "cpu", teacher_forcing=True)
        ids = torch.arange(frames).repeat(2)
        joined = torch.cat([context, x], 1), torch.cat([level, t], 1)
        whole = model(*joined, text, mask=mask, frame_ids=ids)
        cache, noisy, clean = stream_cache(model, geo), [], []
        for k in range(geo.num_chunks(frames)):
            s = geo.chunk(k)
            noisy.append(model(x[:, s], t[:, s], text, view=cache.begin(k), start_frame=s.start))
            clean.append(model(context[:, s], level[:, s], text, view=cache.begin(k), start_frame=s.start))
        assert torch.allclose(whole, torch.cat([*clean, *noisy], 1), **CLOSE)

    def test_dense_mask_by_hand(self):
        geo = sizes(2, 1, chunk_frames=1, height=16, width=16)  # one token a chunk
        causal = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
        assert chunk_causal_mask(geo, 4, "cpu").int().tolist() == causal
        past = [[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
        forced = chunk_causal_mask(geo, 4, "cpu", teacher_forcing=True).int()
        assert forced[:4, :4].tolist() == causal and not forced[:4, 4:].any()
        assert forced[4:, :4].tolist() == past and torch.equal(forced[4:, 4:], torch.eye(4, dtype=torch.int32))

    @pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
    @pytest.mark.parametrize("teacher_forcing", [False, True])
    @torch.no_grad()
    def test_all_kinds_are_one_mask(self, teacher_forcing):
        model, geo, frames = build()[0], sizes(3, 1, height=48, width=80), 10
        x, t, text = inputs(geo, frames * (1 + teacher_forcing), batch=1)
        ids = torch.arange(frames).repeat(1 + teacher_forcing)
        dense, flex, chunks = (
            model(x, t, text, frame_ids=ids, mask=mask)
            for mask in masks(geo, frames, "cpu", ("dense", "flex", "chunks"), teacher_forcing)
        )
        assert torch.allclose(dense, flex, **CLOSE) and torch.allclose(dense, chunks, **CLOSE)

    def test_gradients_chunk_by_chunk_are_those_of_the_dense_mask(self):
        dense, chunks = gradients(("dense", "chunks"), "cpu")
        assert torch.allclose(dense, chunks, **CLOSE) and dense.abs().max() > 1e-2


class TestRotary:
    @pytest.mark.parametrize("first", [0, 900, 1500, 1_000_000, -7])
    def test_any_frame_index_against_complex_float64(self, first):
        rotary, ids = FrameRotary(24), torch.arange(first, first + 3)
        cos, sin = rotary(ids, 2, 3)
        assert cos.shape == (1, 18, 1, 12) and cos.dtype == torch.float32
        row = 0
        for f in ids.tolist():
            for h in range(2):
                for w in range(3):
                    angles = [
                        index / 10000 ** (2 * i / dim)
                        for index, dim in ((f, 8), (h, 8), (w, 8))
                        for i in range(dim // 2)
                    ]
                    turn = torch.exp(1j * torch.tensor(angles, dtype=torch.complex128))
                    assert torch.allclose(cos[0, row, 0].double(), turn.real, atol=1e-7)
                    assert torch.allclose(sin[0, row, 0].double(), turn.imag, atol=1e-7)
                    row += 1

    @torch.no_grad()
    def test_only_distances_matter_also_past_1024_frames(self):
        model, geo = build()[0], sizes(0, 0)
        x, t, text = inputs(geo, 4)
        near, far = model(x, t, text), model(x, t, text, start_frame=5000)
        assert torch.allclose(near, far, atol=1e-4)
        shuffled = model(x, t, text, frame_ids=torch.tensor([3, 0, -2, 9]))
        assert (near - shuffled).abs().max() > 1e-3

@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_cuda_cache_dense_and_compiled_flex_agree_without_a_sync():
    model, geo = build(attention_head_dim=32)[0].cuda(), sizes(3, 1, height=48, width=80)
    x, t, text = (y.cuda() for y in inputs(geo, 10))
    cache = stream_cache(model, geo, device="cuda")
    by_chunk(model, cache, geo, x, t, text)
    cache.reset()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stream = by_chunk(model, cache, geo, x, t, text)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    dense, flex = (model(x, t, text, mask=chunk_causal_mask(geo, 10, "cuda", kind=kind)) for kind in ("dense", "flex"))
    assert torch.allclose(stream, dense, atol=1e-4) and torch.allclose(dense, flex, atol=2e-3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gradients_of_all_kinds_are_those_of_the_dense_mask():
    dense, flex, chunks = gradients(("dense", "flex", "chunks"), "cuda")
    assert max(torch.linalg.norm(other - dense) for other in (flex, chunks)) < 2e-3 * torch.linalg.norm(dense)
