"""A few steps of a distillation on several processes, with something that happens to one of them.

    run_ranks(assets, out, 2, "training.sharding=full", event=Event("kill", step=2, rank=1)) -> [Outcome, Outcome]

Processes are forked from one that has imported everything, so that starting them costs little. As a program it is what
one process of torchrun does.
"""

import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from distill_case import distill_stage

from trainer.loop import run
from trainer.parallel.apply import local
from utils.distributed import Ranks, process_group

LIMIT_S = 900  # of a test's processes, on a machine that is busy


class Event(NamedTuple):
    what: str  # kill, nan, full disk, term
    step: int  # while this step (from 0) is made; of a term: between its generator's and its critic's update
    rank: int


class Outcome(NamedTuple):
    ended: str  # done, stopped, or the name of an exception
    said: str  # its message
    seconds: float  # from the event, or the start, to the end
    exit_code: int | None


def make_happen(stage, event: Event) -> None:
    """Let `event` come over this process."""
    update, parts = stage.update, {"kill": signal.SIGKILL, "term": signal.SIGTERM}
    critic = stage.critic_backward.run

    def disturbed(step: int):
        if step == event.step and event.what == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        return update(step)

    def critic_disturbed(plan, batches, between):
        if stage.current == event.step and event.what in parts:
            os.kill(os.getpid(), parts[event.what])
        logs = critic(plan, batches, between)
        if stage.current == event.step and event.what == "nan":
            grads = [local(p.grad) for p in stage.players["critic"].parameters]
            next(g for g in grads if g.numel()).view(-1)[0] = float("nan")
        return logs

    def counted(step: int):
        stage.current = step
        return disturbed(step)

    stage.update, stage.critic_backward.run = counted, critic_disturbed


def work(assets: str, out: str, overrides: tuple[str, ...], event: Event | None) -> bool:
    """A run; whether its end was reached."""
    with group() as ranks:
        stage = distill_stage(Path(assets), *overrides, ranks=ranks)
        if event is not None and event.rank == ranks.rank:
            make_happen(stage, event)
        return run(stage, Path(out))


@contextmanager
def group() -> Iterator[Ranks]:
    torch.set_num_threads(1)
    ranks = Ranks.from_env()
    with process_group(ranks, torch.device("cpu"), timeout_s=LIMIT_S):
        yield ranks


def _child(pipe: Connection, env: dict[str, str], job: Callable[..., bool], arguments: tuple) -> None:
    os.environ |= env
    start = time.perf_counter()
    try:
        ended, said = "done" if job(*arguments) else "stopped", ""
    except Exception as error:  # what it is, is what the test asks
        ended, said = type(error).__name__, str(error)
        raise
    finally:
        pipe.send((ended, said, time.perf_counter() - start))
        pipe.close()


def run_ranks(assets: Path, out: Path, world: int, *overrides: str, event: Event | None = None) -> list[Outcome]:
    """Run a distillation; a process that does not end in time is killed, and its outcome says so."""
    return on_ranks(world, work, str(assets), str(out), overrides, event)


def on_ranks(world: int, job: Callable[..., bool], *arguments) -> list[Outcome]:
    """Call `job`, a function of a module of the tests, on so many processes and wait for them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks_case"])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    started = []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        own = env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
        process = context.Process(target=_child, args=(theirs, own, job, arguments))
        process.start()
        theirs.close()
        started.append((process, ours))
    outcomes, end = [], time.monotonic() + LIMIT_S
    for process, pipe in started:
        process.join(max(0.1, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
        try:
            told = pipe.recv() if pipe.poll() else ("killed", "", 0.0)
        except EOFError:
            told = ("killed", "", 0.0)
        outcomes.append(Outcome(*told, process.exitcode))
    assert all(outcome.exit_code != -signal.SIGABRT for outcome in outcomes), f"a rank was ended by SIGABRT: {outcomes}"
    return outcomes


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], tuple(sys.argv[3:]), None)
