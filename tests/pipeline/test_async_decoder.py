"""On a CPU another thread decodes, beside the denoising of the next chunk: same frames, errors, one thread for all."""

import os
import signal
import threading
import time
from collections.abc import Callable
from itertools import islice

import pytest
import torch
from test_session import OTHER, PROMPT, make, same  # noqa: F401  a fixture

from model.codec import WanCodec
from pipeline import DiagonalPipeline, async_decoder
from pipeline.async_decoder import AsyncDecoder, prefetch, to_frames
from pipeline.stream import StreamSession
from utils.device import side_thread

CPU = torch.device("cpu")
START = torch.randn(1, 1, 16, 4, 6, generator=torch.Generator().manual_seed(5))  # latents that a video begins with


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(async_decoder, "available_cpus", lambda: 2)


@pytest.fixture
def alone(make):  # noqa: F811
    """A session that decodes before it goes on."""

    def session(**settings) -> StreamSession:
        one = make(**settings)
        one.async_decoder = AsyncDecoder(CPU, overlap=False)
        return one

    return session


class Decoder:
    """A decoder that says where it decodes, waits for `go`, and breaks in call number `breaks`."""

    def __init__(self, codec: WanCodec, breaks: int | None = None):
        self.inner, self.breaks, self.calls = codec.stream(), breaks, []
        self.go = threading.Event()
        self.go.set()
        self.snapshot, self.restore = self.inner.snapshot, self.inner.restore

    def decode(self, latents):
        assert self.go.wait(60)
        self.calls.append((threading.current_thread(), torch.get_num_threads(), torch.is_grad_enabled()))
        if len(self.calls) - 1 == self.breaks:
            raise MemoryError("no room for pixels")
        return self.inner.decode(latents)


def played(session: StreamSession) -> list:
    """Six chunks of two streams that begin with a picture, another prompt in the middle, on from a snapshot."""
    playing = session.play([PROMPT, OTHER], [3, 4], None, START)
    made = list(islice(playing, 2))
    session.set_prompt([OTHER, None])
    made += islice(playing, 2)
    here = session.snapshot()
    next(playing)
    session.restore(here)
    session.reseed(8)
    return made + list(session.resume(2))


def test_frames_are_those_of_decoding_chunk_by_chunk_bit_by_bit(make, alone, tiny_vae):  # noqa: F811
    session, sequential = make(), alone()
    assert session.async_decoder.overlap and not sequential.async_decoder.overlap
    ours, theirs = played(session), played(sequential)
    assert same(ours, theirs)
    decoder = WanCodec(tiny_vae).stream()
    assert all(torch.equal(result.frames, to_frames(decoder.decode(result.latents))) for result in ours)
    assert all("queue" in result.timings for result in ours) and "queue" not in theirs[0].timings


@pytest.mark.parametrize("threads", [1, 2])
def test_the_other_thread_computes_as_the_caller_does(make, tiny_vae, threads):  # noqa: F811
    """Sums of more threads may round differently, and torch keeps its number for each thread that calls it."""
    session, before = make(), torch.get_num_threads()
    session.play(PROMPT)
    session._decoder = decoder = Decoder(WanCodec(tiny_vae))
    torch.set_num_threads(threads)
    try:
        [result.wait() for result in session.resume(2)]
    finally:
        torch.set_num_threads(before)
    assert all(thread is not threading.current_thread() for thread, *_ in decoder.calls)
    assert [call[1:] for call in decoder.calls] == [(threads, False)] * 2


def test_the_next_chunk_and_a_snapshot_do_not_wait_for_decoding(make, alone, tiny_vae):  # noqa: F811
    session, sequential = make(), alone()
    playing = session.play(PROMPT, 1)
    session._decoder = decoder = Decoder(WanCodec(tiny_vae))
    decoder.go.clear()
    first = list(islice(playing, 3))
    here = session.snapshot()
    later = next(playing)
    assert session.chunk == 4 and not decoder.calls
    decoder.go.set()
    plain = list(sequential.play(PROMPT, 1, 5))
    assert same([*first, later], plain[:4])
    fresh = make()
    fresh.restore(here)
    assert same(fresh.resume(2), plain[3:]), "the snapshot is of its time"


def test_an_error_of_the_decoder_is_raised_where_its_chunk_is_waited_for(make, alone, tiny_vae):  # noqa: F811
    session = make()
    session.play(PROMPT, 1)
    session._decoder = Decoder(WanCodec(tiny_vae), breaks=1)
    results = prefetch(session.resume(), 1)
    next(results).wait()
    broken = next(results)
    for read in (broken.wait, lambda: broken.frames, lambda: broken.timings):
        with pytest.raises(MemoryError, match="no room for pixels"):
            read()
    assert same(session.play(PROMPT, 1, 3), alone().play(PROMPT, 1, 3)), "the session can play again"


def test_a_pipeline_raises_it_and_plays_again(tiny_assets, monkeypatch):
    pipe = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml")
    codec, wanted = pipe.session.codec, pipe(PROMPT).videos[0].frames
    with monkeypatch.context() as broken:
        broken.setattr(codec, "stream", lambda: Decoder(WanCodec(codec.vae), breaks=0))
        with pytest.raises(MemoryError, match="no room for pixels"):
            pipe(PROMPT)
    assert (pipe(PROMPT).videos[0].frames == wanted).all()


def test_all_sessions_share_one_thread(make):  # noqa: F811
    next(make().play(PROMPT)).wait()
    before = threading.enumerate()
    for seed in range(3):
        [result.wait() for result in make().play(PROMPT, seed, 2)]
    assert set(threading.enumerate()) <= set(before), "those of other tests may end meanwhile"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_plays_with_a_session_of_its_parent(make):  # noqa: F811
    session = make()
    wanted = [result.wait() for result in session.play(PROMPT, 1, 2)]
    assert alike_in_a_fork(lambda: same(session.play(PROMPT, 1, 2), wanted))
    assert same(session.play(PROMPT, 1, 2), wanted)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_amid_decoding_loses_no_chunk_of_parent_or_child(make):  # noqa: F811
    session = make()
    wanted = [result.wait() for result in session.play(PROMPT, 1, 4)]
    session.async_decoder.to_frames = lambda pixels: time.sleep(0.2) or to_frames(pixels)
    playing = session.play(PROMPT, 1, 4)
    begun = list(islice(playing, 2))  # chunk 0 is in the making, and chunk 1 waits for it
    assert alike_in_a_fork(lambda: same([*begun, *playing], wanted))
    assert same([*begun, *playing], wanted)


def test_the_decoding_thread_itself_can_fork():
    assert side_thread("decoding").submit(alike_in_a_fork, lambda: True).result(20)


def alike_in_a_fork(check: Callable[[], bool]) -> bool:
    """What `check` gives in a forked process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's own threads are lost in a fork, too
    try:
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # ends a child that waits for a thread that it does not have
            alike = False
            try:
                alike = check()
            finally:
                os._exit(not alike)
    finally:
        torch.set_num_threads(before)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_one_core_decodes_before_it_goes_on(monkeypatch):
    assert not AsyncDecoder(CPU, overlap=False).overlap
    monkeypatch.setattr(async_decoder, "available_cpus", lambda: 1)
    assert not AsyncDecoder(CPU).overlap
