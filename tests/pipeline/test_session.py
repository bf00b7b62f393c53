"""Sessions that are driven: new prompts, snapshots, branches, cancelling, endless positions."""

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import random_student
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from small_wan import stream_cache

from configs.errors import UserError
from configs.schema import ScheduleConfig, StreamConfig
from model.causal_wan import FrameRotary
from model.codec import WanCodec
from model.denoiser import Student
from model.schedule import Schedule
from pipeline.stream import StreamSession
from utils.device import side_thread

PROMPT, OTHER, THIRD = "a red circle moves right", "a blue square moves up", "a green triangle moves down slowly"


@pytest.fixture
def make(tiny_student, tiny_vae, tiny_text_encoder, tiny_geometry):
    """A session; keywords go to `stream` of the configuration, or to the session."""

    def session(student=tiny_student, geometry=tiny_geometry, switch="recache", **stream) -> StreamSession:
        schedule = Schedule.from_config(ScheduleConfig(steps="322"), StreamConfig(**stream))
        codec = WanCodec(tiny_vae)
        return StreamSession(student, codec, tiny_text_encoder, schedule, geometry, switch=switch)

    return session


def same(a, b) -> bool:
    return all(
        torch.equal(x.latents, y.latents) and torch.equal(x.frames, y.frames) and x.chunk == y.chunk
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("context", ["last_step", "clean", "renoise"])
@pytest.mark.parametrize("at", [2, 6])
def test_a_restored_stream_is_the_same_bit_by_bit(make, context, at):
    session = make(context=context, context_timestep=200.0)
    playing = session.play([PROMPT, OTHER], [3, 4])
    list(islice(playing, at - 1))
    session.set_prompt([None, THIRD], switch="blend")
    next(playing)  # the snapshot is taken in the middle of a blend
    here = session.snapshot("cpu")
    first = list(islice(playing, 4))
    session.restore(here)
    assert same(first, session.resume(4))
    session.restore(here)
    session.set_prompt(PROMPT)
    session.reseed(9)
    other = next(session.resume(1))
    assert not torch.equal(other.latents, first[0].latents), "another branch"
    session.restore(here)
    assert same(first, session.resume(4)), "a snapshot serves any number of times"


def test_a_snapshot_moves_to_a_fresh_session(make):
    session = make()
    playing = session.play(PROMPT, 1)
    list(islice(playing, 5))
    here = session.snapshot()
    assert same(list(islice(playing, 3)), resumed(make(), here, 3))


def resumed(session: StreamSession, snapshot, chunks: int) -> list:
    session.restore(snapshot)
    return list(session.resume(chunks))


def test_a_snapshot_of_another_model_is_refused(make, tiny_geometry):
    session = make()
    list(session.play(PROMPT, 0, 1))
    here = session.snapshot()
    wider = dataclasses.replace(tiny_geometry, width=64)
    for stranger in (make(student=random_student(seed=5)), make(geometry=wider)):
        with pytest.raises(UserError, match="another model or size"):
            stranger.restore(here)


@pytest.mark.parametrize("chunks", [2, 8])
def test_recaching_is_what_a_fresh_cache_fed_with_the_same_inputs_holds(make, chunks, tiny_geometry):
    session = make()
    list(session.play(PROMPT, 0, chunks))
    passes = sorted(session._recache_state.slots.values(), key=lambda p: p.chunk)
    assert [p.chunk for p in passes] == tiny_geometry.visible_chunks(chunks - 1)
    model, text = session.student.model, session._prompt_track._text_kv(session.text_encoder([OTHER]))
    naive = stream_cache(model, tiny_geometry, 1)
    for position, done in enumerate(passes):
        model(done.x_t, done.t, text, view=naive.begin(position), start_frame=3 * done.chunk)
    session.set_prompt(OTHER)
    session._text_of_next(session.student, _NoTimer())
    tokens = tiny_geometry.tokens_per_chunk
    for layer in range(model.config.num_layers):
        for i, done in session._recache_state.slots.items():
            position = passes.index(done)
            ours = session._cache._keys[layer][:, i * tokens : (i + 1) * tokens]
            assert torch.equal(ours, naive._keys[layer][:, position * tokens : (position + 1) * tokens])


class _NoTimer:
    def mark(self, name: str) -> None: ...


@pytest.mark.parametrize("chunks", [2, 4, 6])
def test_a_recached_window_leaves_the_sink_alone_and_sees_it(make, chunks):
    """Before and after the ring has rolled: the sink's keys are those of before, all others are made again."""
    session = make()
    list(session.play(PROMPT, 0, chunks))
    cache, tokens = session._cache, session.geometry.tokens_per_chunk
    sink = session.geometry.sink_chunks * tokens
    used = len(session.geometry.visible_chunks(chunks - 1)) * tokens
    before = [keys[:, :used].clone() for keys in cache._keys]
    text = session._prompt_track._text_kv(session.text_encoder([OTHER]))
    session._recache_state.recache(session.student, cache, text, keep_sink=True)
    for old, new in zip(before[1:], cache._keys[1:], strict=True):  # the first layer's know nothing of the text
        assert torch.equal(old[:, :sink], new[:, :sink])
        assert (old[:, sink:used] != new[:, sink:used]).any((0, 2, 3)).all()


def test_of_two_changes_before_a_chunk_the_more_thorough_recache_counts(make):
    def state(*said):
        session = make()
        next(session.play(PROMPT, 0, 3))
        for prompt, switch in zip((OTHER, THIRD), said, strict=False):
            session.set_prompt(prompt, switch=switch)
        state = session._prompt_track.advance(1)
        return state.needs_recache, state.keep_sink

    assert state("recache") == (True, False) and state("recache_window") == (True, True)
    assert state("recache", "recache_window") == state("recache_window", "recache") == (True, False)
    assert state("recache_window", "cut") == (True, True) and state("cut") == (False, False)


@pytest.mark.parametrize("switch", ["recache", "recache_window", "blend", "cut"])
def test_a_new_prompt_takes_effect_at_the_next_chunk_and_not_before(make, switch):
    plain = list(make().play(PROMPT, 2, 6))
    session = make(switch=switch)
    session.switch_chunks = 2
    playing = session.play(PROMPT, 2, 6)
    start = list(islice(playing, 3))
    session.set_prompt(OTHER)
    rest = list(playing)
    assert same(plain[:3], start)
    assert not torch.equal(rest[0].latents, plain[3].latents)
    assert [r.prompts for r in start + rest] == [(PROMPT,)] * 3 + [(OTHER,)] * 3
    assert torch.equal(session._prompt_track.state.embedding, session.text_encoder([OTHER])), "a blend arrives"


def test_a_blend_goes_in_equal_steps(make):
    session = make(switch="blend")
    playing = session.play(PROMPT, 2)
    next(playing)
    session.set_prompt(OTHER)
    a, b = session.text_encoder([PROMPT]), session.text_encoder([OTHER])
    for share in (1 / 3, 2 / 3, 1.0, 1.0):
        next(playing)
        assert torch.allclose(session._prompt_track.state.embedding, a + share * (b - a), atol=1e-6)


def test_streams_of_a_batch_change_one_by_one_and_as_they_would_alone(make):
    session = make()
    playing = session.play([PROMPT, PROMPT], [1, 2], 4)
    list(islice(playing, 2))
    session.set_prompt([None, OTHER])
    both = torch.cat([r.latents for r in playing], 1)
    for i, said in enumerate([None, OTHER]):
        alone = make()
        one = alone.play(PROMPT, i + 1, 4)
        list(islice(one, 2))
        if said:
            alone.set_prompt(said)
        assert torch.allclose(torch.cat([r.latents for r in one], 1)[0], both[i], atol=1e-4)


@pytest.mark.parametrize("bad", ["", "x\0y", ["a", "b", "c"], "y" * 20_000])
def test_a_bad_prompt_is_refused_and_the_stream_goes_on(make, bad):
    session = make()
    playing = session.play(PROMPT, 2, 3)
    first = [next(playing)]
    with pytest.raises(UserError):
        session.set_prompt(bad)
    with pytest.raises(UserError, match="switch=fade"):
        session.set_prompt(OTHER, switch="fade")
    assert same(first + list(playing), make().play(PROMPT, 2, 3))


class Counting(Student):
    """A student that cancels its session during pass number `at`."""

    def __init__(self, student: Student, at: int):
        super().__init__(student.model)
        self.student, self.at, self.calls, self.session = student, at, 0, None

    def x0(self, *args):
        self.calls += 1
        if self.calls == self.at:
            self.session.cancel()
        return self.student.x0(*args)


def test_wrong_calls_of_a_session_are_a_sentence_and_change_nothing(make):
    session = make()
    for early in (session.snapshot, session.resume, lambda: session.set_prompt("a"), lambda: session.reseed(1)):
        with pytest.raises(UserError, match="nothing has been played; call session.play first"):
            early()
    first = list(session.play("a", 3, 2))[-1].latents
    for wrong, words in (
        (lambda: session.reseed("b"), "seeds=b is str, not an integer"),
        (lambda: session.reseed(1.5), "seeds=1.5 is float"),
        (lambda: session.reseed([1, 2]), "2 seeds were given for 1 streams"),
        (lambda: session.play("a", [None]), "seeds=null is NoneType"),
        (lambda: session.restore(None), "snapshot=null is NoneType; give one of session.snapshot"),
    ):
        with pytest.raises(UserError, match=words):
            wrong()
    assert torch.equal(list(session.play("a", np.int64(3), np.int64(2)))[-1].latents, first)


@pytest.mark.parametrize("at", [1, 5, 14, 16])
def test_cancel_ends_before_the_next_step_and_the_chunk_can_be_made_again(make, tiny_student, at):
    plain = list(make().play(PROMPT, 0, 8))
    student = Counting(tiny_student, at)
    session = student.session = make(student=student)
    made = list(session.play(PROMPT, 0, 8))
    assert student.calls == at and len(made) < 8
    assert same(made + list(session.resume(8 - len(made))), plain)


def test_cancel_during_recaching_leaves_nothing_half_done(make, tiny_student):
    def play(session):
        playing = session.play(PROMPT, 0, 8)
        made = list(islice(playing, 6))
        session.set_prompt(OTHER)
        return made + list(playing)

    plain = play(make())
    student = Counting(tiny_student, 3 + 5 * 2 + 2)  # six chunks, then the second of four passes
    session = student.session = make(student=student)
    made = play(session)
    assert len(made) == 6
    assert same(made + list(session.resume(2)), plain)


def shares(session: StreamSession, chunks: int) -> list[float]:
    """How far from PROMPT to OTHER the text of each of the next chunks is."""
    a, b = session.text_encoder([PROMPT]), session.text_encoder([OTHER])
    texts = (session._prompt_track.state.embedding for _ in session.resume(chunks))
    return [round(float(((text - a) * (b - a)).sum() / (b - a).square().sum()), 3) for text in texts]


@pytest.mark.parametrize("said", ["before", "after"])
def test_a_blend_is_one_step_a_chunk_also_where_a_chunk_is_cancelled(make, tiny_student, said):
    student = Counting(tiny_student, 3 + 2 + 1)  # two chunks, then the first pass of the third
    session = student.session = make(student=student, switch="blend")
    playing = session.play(PROMPT, 0)
    list(islice(playing, 2))
    if said == "before":
        session.set_prompt(OTHER)
    assert not list(playing)
    here = session.snapshot()
    if said == "after":
        session.set_prompt(OTHER)
    assert shares(session, 4) == [0.333, 0.667, 1.0, 1.0]
    session.restore(here)
    assert shares(session, 4) == ([0.333, 0.667, 1.0, 1.0] if said == "before" else [0.0] * 4)


def test_a_stream_of_latents_alone_goes_on_from_a_snapshot(make):
    session = make()
    playing = session.play(PROMPT, 1, decode=False)
    list(islice(playing, 2))
    here = session.snapshot()
    first = list(islice(playing, 2))
    assert same(first, resumed(session, here, 2)) and not first[0].frames.numel()


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("left", ["at its end", "in the middle"])
def test_a_session_that_is_left_is_freed_at_once(make, left):
    """With its KV cache, which in a cycle would stay until a garbage collection, far later in a training."""
    with without_garbage_collection():
        session = make()
        playing = session.play([PROMPT, OTHER], [3, 4], 4)
        list(islice(playing, 2))
        session.set_prompt([None, THIRD], switch="blend")
        here = session.snapshot()
        if left == "at its end":
            list(playing)
            session.restore(here)
            list(session.resume(2))
        held = [weakref.ref(thing) for thing in (session, session._cache, session._decoder, session._prompt_track)]
        del session, playing, here
        side_thread("decoding").submit(int).result()  # after what it was decoding
        assert not [ref() for ref in held if ref()]


def test_what_a_long_stream_holds_does_not_grow(make):
    session = make()
    sizes = set()
    for i, _ in enumerate(islice(session.play(PROMPT, 0), 12)):
        if i >= 4:
            here = session.snapshot()
            sizes.add((here.cache.bytes, len(here.passes), sum(p.x_t.nbytes for p in here.passes.values())))
    assert len(sizes) == 1


def test_positions_are_the_base_tables_where_it_has_them():
    """Up to index 1,023 ours are diffusers' own angles."""
    theirs = WanRotaryPosEmbed(128, (1, 2, 2), 1024)
    cos, sin = theirs(torch.zeros(1, 16, 1024, 4, 4))
    ours = FrameRotary(128)(torch.arange(1024), 2, 2)
    for mine, base in zip(ours, (cos, sin), strict=True):
        assert torch.allclose(mine, base[..., ::2], atol=1e-6)


def test_streams_of_a_batch_have_their_own_lengths(make):
    prompts, seeds, lengths = [PROMPT, OTHER, THIRD], [1, 2, 3], [2, 6, 4]
    whole = list(make().play(prompts, seeds, 6))
    ours = list(make().play(prompts, seeds, lengths))
    assert same(whole, ours), "no stream depends on another's length, bit by bit"
    assert [r.active for r in ours] == [(True,) * 3] * 2 + [(False, True, True)] * 2 + [(False, True, False)] * 2
    for i, (prompt, seed, length) in enumerate(zip(prompts, seeds, lengths, strict=True)):
        alone = torch.cat([r.latents for r in make().play(prompt, seed, length)], 1)[0]
        batched = torch.cat([r.latents for r in ours if r.active[i]], 1)[i]
        torch.testing.assert_close(batched, alone, atol=1e-4, rtol=0)
    endless = make().play(prompts[:2], seeds[:2], [1, None])
    assert [r.active for r in islice(endless, 3)] == [(True, True)] + [(False, True)] * 2
