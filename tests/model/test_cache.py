"""Chunk caches against a naive twin that keeps everything and joins what the geometry says is visible."""

import random

import pytest
import torch

from configs.geometry import Geometry
from model.cache import GraphCache, StreamCache, slot, visible_slots

LAYERS, BATCH, HEADS, DIM = 3, 2, 2, 4


def geometry(window: int, sink: int, chunk_frames: int = 1) -> Geometry:
    """Sizes in chunks; 2 tokens a frame."""
    return Geometry(
        height=16,
        width=32,
        chunk_frames=chunk_frames,
        window_frames=window * chunk_frames,
        sink_frames=sink * chunk_frames,
    )


def stream(geo: Geometry, **options) -> StreamCache:
    return StreamCache(LAYERS, BATCH, HEADS, DIM, geo, device="cpu", dtype=torch.float32, **options)


def chunk_kv(geo: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, BATCH, geo.tokens_per_chunk, HEADS, DIM))


def write(cache, chunk: int, kvs) -> list:
    view = cache.begin(chunk)
    return [view.put(i, *kv) for i, kv in enumerate(kvs)]


class NaiveTwin:
    """Keeps every chunk's newest keys and values for ever."""

    def __init__(self, geo: Geometry):
        self.geo, self.chunks = geo, {}

    def put(self, chunk: int, layer: int, k, v):
        self.chunks[layer, chunk] = (k, v)
        seen = [self.chunks[layer, c] for c in self.geo.visible_chunks(chunk)]
        return torch.cat([k for k, _ in seen], 1), torch.cat([v for _, v in seen], 1)


def as_set(x: torch.Tensor, tokens: int) -> list:
    """Chunks of [B, L, heads, head_dim] in an order that depends on their content alone."""
    return sorted(part.flatten().tolist() for part in x.split(tokens, dim=1))


@pytest.mark.parametrize("seed", range(12))
def test_random_rollouts_see_what_the_naive_twin_sees(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    window = rng.choice([0, 1, 2, 3, 4, 5])
    geo = geometry(window, rng.randint(0, max(window - 1, 0)), rng.choice([1, 2]))
    caches, twin = [stream(geo), GraphCache(geo, LAYERS)], NaiveTwin(geo)
    for chunk in range(14):
        for _ in range(rng.randint(1, 3)):  # denoising steps rewrite the chunk
            views = [cache.begin(chunk) for cache in caches]
            for layer in range(LAYERS):
                k, v = chunk_kv(geo)
                naive = twin.put(chunk, layer, k, v)
                ring, graph = (view.put(layer, k, v) for view in views)
                for x, y, z in zip(ring, graph, naive, strict=True):
                    assert torch.equal(x, y), "both caches agree, order included"
                    assert x.shape == z.shape
                    assert as_set(x, geo.tokens_per_chunk) == as_set(z, geo.tokens_per_chunk)


@pytest.mark.parametrize("window, sink", [(1, 0), (4, 1), (5, 3), (0, 0)])
def test_slots_are_those_of_the_drawing(window, sink):
    geo = geometry(window, sink)
    held = {}
    for chunk in range(20):
        held[slot(geo, chunk)] = chunk
        prefix = [held[i] for i in range(visible_slots(geo, chunk))]
        assert sorted(prefix) == geo.visible_chunks(chunk)
        assert prefix[:sink] == list(range(min(sink, chunk + 1)))


@pytest.mark.parametrize("make", [stream, lambda geo: GraphCache(geo, LAYERS)], ids=["stream", "graph"])
class TestOrder:
    def test_a_gap_is_refused(self, make):
        cache = make(geo := geometry(3, 1))
        with pytest.raises(AssertionError, match="chunk 1 cannot follow chunk -1"):
            cache.begin(1)
        write(cache, 0, [chunk_kv(geo)] * LAYERS)
        with pytest.raises(AssertionError, match="chunk 2 cannot follow chunk 0"):
            cache.begin(2)

    def test_going_back_is_refused(self, make):
        cache = make(geo := geometry(3, 1))
        for chunk in range(3):
            write(cache, chunk, [chunk_kv(geo)] * LAYERS)
        for chunk in (0, 1):
            with pytest.raises(AssertionError, match="cannot follow"):
                cache.begin(chunk)

    def test_a_half_written_chunk_is_refused(self, make):
        cache = make(geo := geometry(3, 1))
        write(cache, 0, [chunk_kv(geo)] * (LAYERS - 1))
        with pytest.raises(AssertionError, match="wrote 2 of 3 layers"):
            cache.begin(1)
        write(cache, 0, [chunk_kv(geo)] * LAYERS)
        cache.begin(1)

    def test_an_old_view_cannot_write(self, make):
        cache = make(geo := geometry(3, 1))
        old = cache.begin(0)
        write(cache, 0, [chunk_kv(geo)] * LAYERS)
        cache.begin(1)
        with pytest.raises(AssertionError, match="view of chunk 0"):
            old.put(0, *chunk_kv(geo))

    def test_another_number_of_tokens_is_refused(self, make):
        cache = make(geo := geometry(3, 1))
        k, v = chunk_kv(geo)
        with pytest.raises(AssertionError, match="1 tokens for a slot of 2"):
            cache.begin(0).put(0, k[:, :1], v[:, :1])


def test_reset_starts_over():
    cache = stream(geo := geometry(3, 1))
    for chunk in range(5):
        write(cache, chunk, [chunk_kv(geo)] * LAYERS)
    cache.reset()
    k, v = chunk_kv(geo)
    seen, _ = cache.begin(0).put(0, k, v)
    assert torch.equal(seen, k)


def test_stream_memory_is_that_of_the_window_and_stays():
    geo = geometry(4, 1)
    cache = stream(geo)
    expected = 2 * LAYERS * BATCH * 4 * geo.tokens_per_chunk * HEADS * DIM * 4
    pointers = [k.data_ptr() for k in cache._keys]
    for chunk in range(12):
        write(cache, chunk, [chunk_kv(geo)] * LAYERS)
        assert cache.bytes == expected
    assert pointers == [k.data_ptr() for k in cache._keys], "written in place"


def test_a_graph_cache_stores_no_more_than_the_window():
    geo = geometry(3, 1)
    cache = GraphCache(geo, LAYERS)
    for chunk in range(6):
        write(cache, chunk, [chunk_kv(geo)] * LAYERS)
        assert [len(slots) for slots in cache._slots] == [min(chunk + 1, 3)] * LAYERS


def test_max_chunks_makes_the_room_of_an_unbounded_window_at_once():
    geo = geometry(0, 0)
    cache = stream(geo, max_chunks=11)
    before = cache.bytes
    for chunk in range(11):
        write(cache, chunk, [chunk_kv(geo)] * LAYERS)
    assert cache.bytes == before
    write(cache, 11, [chunk_kv(geo)] * LAYERS)
    assert cache.bytes == 2 * before


def test_stream_refuses_to_lose_a_graph():
    geo = geometry(2, 0)
    k, v = chunk_kv(geo)
    with pytest.raises(AssertionError, match="GraphCache"):
        stream(geo).begin(0).put(0, k.requires_grad_(), v)


def test_what_a_graph_view_returned_survives_later_writes():
    geo = geometry(2, 0)
    cache = GraphCache(geo, LAYERS)
    returned = []
    for chunk in range(6):
        for seen in write(cache, chunk, [chunk_kv(geo) for _ in range(LAYERS)]):
            returned += [(x, x.clone()) for x in seen]
    assert all(torch.equal(x, copy) for x, copy in returned)


def test_a_graph_view_reads_the_same_when_it_is_replayed_after_eviction():
    geo = geometry(2, 0)
    cache = GraphCache(geo, LAYERS)
    write(cache, 0, [chunk_kv(geo)] * LAYERS)
    kvs = [chunk_kv(geo) for _ in range(LAYERS)]
    view = cache.begin(1)
    first = [view.put(i, *kv) for i, kv in enumerate(kvs)]
    for chunk in range(2, 6):
        write(cache, chunk, [chunk_kv(geo)] * LAYERS)
    stored = [dict(slots) for slots in cache._slots]
    for i, kv in enumerate(kvs):
        replayed, _ = view.layer(i).put(*kv)
        assert all(torch.equal(x, y) for x, y in zip(first[i], replayed, strict=True))
    assert stored == cache._slots, "and changes nothing"


def test_gradients_reach_visible_chunks_alone_and_detach_cuts_them():
    geo = geometry(2, 0)
    for cut in (False, True):
        cache = GraphCache(geo, 1)
        keys = [chunk_kv(geo)[0].requires_grad_() for _ in range(4)]
        for chunk, k in enumerate(keys):
            if cut and chunk == 3:
                cache.detach()
            seen, _ = cache.begin(chunk).put(0, k, k.detach())
        seen.sum().backward()
        reached = [k.grad is not None for k in keys]
        assert reached == ([False, False, False, True] if cut else [False, False, True, True])
