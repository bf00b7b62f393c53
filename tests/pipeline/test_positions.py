"""Streams past the last rotary position: the sink moves up, nothing else changes, and a naive twin agrees."""

import dataclasses
from itertools import islice

import pytest
import torch
from small_wan import CLOSE, build, inputs, sizes, stream_cache
from test_session import OTHER, PROMPT, make, same  # noqa: F401  (fixture)

from configs.errors import UserError
from configs.schema import StreamConfig
from model.cache import GraphCache
from model.causal_wan import _rotate
from pipeline.positions import sink_offset
from pipeline.switch import CachedForward, RecacheState


def bounded(geometry, frames: int):
    return dataclasses.replace(geometry, position_frames=frames)


class Naive:
    """A cache that keeps every key un-rotated, and turns the whole window for each chunk by positions from the sink.

    positions: {chunk: its first position} of what the newest chunk sees, itself included, in float64.
    """

    def __init__(self, model, geometry):
        self.model, self.geometry, self.kept = model, geometry, {}

    def begin(self, chunk: int, origin: int):
        self.chunk, self.origin = chunk, origin
        return self

    def layer(self, index: int):
        self.index = index
        return self

    def put(self, k, v):
        geo, chunk = self.geometry, self.chunk
        self.kept[self.index, chunk] = (self.turn(k, -(chunk * geo.chunk_frames - self.origin)), v)
        keys, values = [], []
        for other in geo.visible_chunks(chunk):
            first = other * geo.chunk_frames - (0 if other < geo.sink_chunks else self.origin)
            k, v = self.kept[self.index, other]
            keys.append(self.turn(k, first))
            values.append(v)
            assert 0 <= first < geo.position_frames
        return (torch.cat(keys, 1), torch.cat(values, 1)), None

    def turn(self, k, frames: int):
        cos, sin = (part.double() for part in self.model.rope(torch.tensor([abs(frames)]), 1, 1))
        return _rotate(k.double(), (cos, sin if frames >= 0 else -sin)).float()


@torch.no_grad()
def stream(model, geo, chunks: int, cache, move: bool = True) -> torch.Tensor:
    """v of the first frame of every chunk, each given the same latents."""
    latents, _, text = inputs(geo, geo.chunk_frames, batch=1)
    kv, recache_state, out = model.text_kv(text), RecacheState(geo), []
    t = torch.tensor([400.0])
    for k in range(chunks):
        x = latents.roll(k, dims=-1) * (1 + 0.1 * (k % 7))
        if isinstance(cache, Naive):
            origin = sink_offset(geo, k)
            v = model(x, t, kv, view=cache.begin(k, origin), start_frame=k * geo.chunk_frames - origin)
        else:
            if move:
                recache_state.shift_sink(model, cache, k)
            v = model(x, t, kv, view=cache.begin(k), start_frame=k * geo.chunk_frames)
            recache_state.record(CachedForward(k, x, t))
        out.append(v)
    return torch.cat(out)


@pytest.mark.parametrize("kind, frames, chunks", [("stream", 1024, 560), ("stream", 11, 60), ("graph", 11, 60)])
def test_past_the_last_position_a_stream_is_what_a_naive_twin_makes_of_it(kind, frames, chunks):
    """1,120 latent frames: the default bound of 1,024 is passed once; a tight one many times."""
    model, _ = build(num_layers=2)
    geo = bounded(sizes(window=3, sink=1, height=16, width=16), frames)
    empty = {"stream": lambda: stream_cache(model, geo, 1), "graph": lambda: GraphCache(geo, 2)}[kind]
    ours = stream(model, geo, chunks, empty())
    torch.testing.assert_close(ours, stream(model, geo, chunks, Naive(model, geo)), **CLOSE)
    plain = stream(model, geo, chunks, empty(), move=False)
    limit = frames // 2
    assert torch.equal(ours[:limit], plain[:limit]), "until then the ordinary numbers, bit by bit"
    assert (ours[limit:] - plain[limit:]).abs().amax() > 1e-4, "from then on the sink is nearer"


@pytest.mark.parametrize("window, sink, limit", [(4, 1, 4), (4, 1, 7), (4, 2, 341), (3, 0, 9)])
def test_every_position_stays_in_range_and_no_move_is_for_nothing(window, sink, limit):
    geo = bounded(sizes(window, sink), 2 * limit + 1)
    moved = 0
    for chunk in range(1000):
        now = sink_offset(geo, chunk)
        newest = (chunk + 1) * 2 - now  # positions in use
        assert newest <= 2 * limit and now >= moved
        if now > moved:
            assert (chunk + 1) * 2 - moved > 2 * limit, "it was due"
            assert newest == 2 * window, "positions count the slots of the cache"
        moved = now
    assert moved
    for free in (bounded(geo, 0), bounded(sizes(0, 0), 10)):
        assert sink_offset(free, 10**6) == 0


def test_many_moves_round_little():
    """A thousand moves in bfloat16 (over a million latent frames at the default bound): the keys are theirs to 8%."""
    model, _ = build()
    keys = torch.randn(1, 8, 2, 24, generator=torch.Generator().manual_seed(0))
    rounded = keys.bfloat16()
    for _ in range(1000):
        rounded = model.shift_keys(rounded, 9)
    exact = model.shift_keys(keys.double(), 9000)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() / exact.norm() < 0.08


def test_a_session_moves_its_sink_and_keeps_its_promises(make, tiny_geometry):  # noqa: F811
    tight = bounded(tiny_geometry, 18)
    plain, session = list(make().play(PROMPT, 1, 16)), make(geometry=tight)
    ours = list(session.play(PROMPT, 1, 16))
    assert same(ours[:6], plain[:6]) and not torch.equal(ours[6].latents, plain[6].latents)
    playing = session.play(PROMPT, 1)
    list(islice(playing, 11))
    here = session.snapshot()
    rest = list(islice(playing, 5))
    assert same(ours[11:], rest)
    session.restore(here)
    assert same(rest, session.resume(5)), "a snapshot knows how far its sink has moved"
    session.restore(here)
    before = session.snapshot().cache.keys[0]
    session._recache_state.recache(session.student, session._cache, session._prompt_track.state.kv)
    tokens = tight.tokens_per_chunk
    torch.testing.assert_close(session._cache._keys[0][:, :tokens], before[:, :tokens], atol=1e-5, rtol=0)
    session.set_prompt(OTHER)
    assert len(list(session.resume(4))) == 4


def test_fewer_positions_than_the_window_are_refused():
    with pytest.raises(UserError, match="position_frames=9 is less than stream.window_frames=12"):
        StreamConfig(position_frames=9)
