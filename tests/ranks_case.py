"""A few steps of a distillation on several processes, with something that happens to one of them.

    run_ranks(assets, out, 2, "training.sharding=full", event=Event("kill", step=2, rank=1)) -> [Outcome, Outcome]

Processes are forked from one that has imported everything, so that starting them costs little. As a program it is what
one process of torchrun does. With DRILLS_GPUS=N ranks have a GPU each, and networks full width, in one layer.
"""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import reserved_port
from distill_case import BASE, distill_config, distill_settings

from scripts.bench.random_prompts import random_prompts
from trainer.loop import run
from trainer.parallel.apply import local
from trainer.registry import build_stage
from utils import exits
from utils.distributed import Ranks, process_group

LIMIT_S = 900  # of a test's processes, on a machine that is busy
GPUS = int(os.environ.get("DRILLS_GPUS", "0"))
FULL_WIDTH = (
    "device=cuda", "training.precision=float32", "video.height=480", "video.width=832",
    "training.init={student: random:1.3B/1, teacher: random:1.3B/1, critic: random:1.3B/1}",
)  # fmt: skip


class Event(NamedTuple):
    what: str  # kill, hang, nan, full disk, term
    step: int  # while this step (from 0) is made; of a term: between its generator's and its critic's update
    rank: int


class Outcome(NamedTuple):
    ended: str  # done, stopped, or the name of an exception
    said: str  # its message
    seconds: float  # from the start to the end
    exit_code: int | None


BEGUN, HAPPENED = "first_step", "event"  # files in the run's folder, written then


def make_happen(stage, event: Event, out: Path) -> None:
    """Let `event` come over this process."""
    update, parts = stage.update, {"kill": signal.SIGKILL, "term": signal.SIGTERM, "hang": signal.SIGSTOP}
    critic = stage.critic_backward.run

    def disturbed(step: int):
        if step == event.step and event.what not in parts:
            (out / HAPPENED).touch()
        if step == event.step and event.what == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        return update(step)

    def critic_disturbed(plan, batches, between):
        if stage.current == event.step and event.what in parts:
            (out / HAPPENED).touch()
            os.kill(os.getpid(), parts[event.what])
        logs = critic(plan, batches, between)
        if stage.current == event.step and event.what == "nan":
            grads = [local(p.grad) for p in stage.train_states["critic"].parameters]
            next(g for g in grads if g.numel()).view(-1)[0] = float("nan")
        return logs

    def counted(step: int):
        stage.current = step
        return disturbed(step)

    stage.update, stage.critic_backward.run = counted, critic_disturbed


def work(assets: str, out: str, overrides: tuple[str, ...], event: Event | None) -> bool:
    """A run; whether its end was reached."""
    config = distill_config(Path(assets), *overrides)
    with group(config.training.timeout_s) as ranks:
        device = torch.device("cuda", ranks.local_rank) if GPUS else torch.device("cpu")
        stage = build_stage(config, device, ranks)
        if event is not None and event.rank == ranks.rank:
            make_happen(stage, event, Path(out))
        update = stage.update

        def noted(step: int):
            values = update(step)
            if ranks.first and not (Path(out) / BEGUN).exists():
                (Path(out) / BEGUN).touch()
            return values

        stage.update = noted
        return run(stage, Path(out))


@contextmanager
def group(timeout_s: float = LIMIT_S) -> Iterator[Ranks]:
    torch.set_num_threads(1)
    ranks = Ranks.from_env()
    device = torch.device("cuda", ranks.local_rank) if GPUS else torch.device("cpu")
    with process_group(ranks, device, timeout_s):
        yield ranks


def _child(pipe: Connection, env: dict[str, str], job: Callable[..., bool], arguments: tuple) -> None:
    os.environ |= env
    start = time.perf_counter()
    try:
        assert "ranks_server" in sys.modules, "each rank imports everything by itself"
        ended, said = "done" if job(*arguments) else "stopped", ""
    except Exception as error:  # what it is, is what the test asks
        ended, said = type(error).__name__, str(error)
        raise
    finally:
        pipe.send((ended, said, time.perf_counter() - start))
        pipe.close()


def full_width(assets: Path) -> list[str]:
    """Settings of a run on GPUs; its prompts are made when they are first asked for."""
    folder = assets / "full_width"
    if not folder.exists():
        folder.mkdir()
        named = random_prompts(BASE, [*distill_settings(assets), *FULL_WIDTH], folder, 4096)
        (folder / "settings.json").write_text(json.dumps([*FULL_WIDTH, *named]))
    return json.loads((folder / "settings.json").read_text())


def run_ranks(
    assets: Path, out: Path, world: int, *overrides: str, event: Event | None = None, torchrun: bool = False
) -> list[Outcome]:
    """Run a distillation; a process that does not end in time is killed, and its outcome says so.

    torchrun: by the real program in place of processes of our own; one outcome, of all that was said.
    """
    settings, what = (*overrides, *(full_width(assets) if GPUS else ())), "start"
    if list(out.glob("checkpoint_*")):
        what = "resume"
    for name in (BEGUN, HAPPENED):
        (out / name).unlink(missing_ok=True)
    began = time.time()
    if torchrun:
        outcomes = [_torchrun(world, str(assets), str(out), settings, event)]
    else:
        outcomes = on_ranks(world, work, str(assets), str(out), settings, event)
    end = time.time()
    begun, happened = (file.stat().st_mtime if file.exists() else None for file in (out / BEGUN, out / HAPPENED))
    said = [f"first step after {begun - began:.1f} s"] if begun else []
    said += [f"ended {end - happened:.1f} s after: {event.what}"] if happened else []
    print(f"\n{what} on {world} rank{'s' * (world > 1)}: {', '.join(said)}", flush=True)  # seen by who asks for it
    return outcomes


def _torchrun(world: int, assets: str, out: str, settings: tuple[str, ...], event: Event | None) -> Outcome:
    env = os.environ | {"RANKS_EVENT": json.dumps(event), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", __file__]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *program, assets, out, *settings], env=env, timeout=LIMIT_S,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    return Outcome("ended", done.stdout, time.perf_counter() - began, done.returncode)


def _fork_server() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks_server"])
    with pytest.MonkeyPatch.context() as patch:  # up to Python 3.12 the server is not given sys.path
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        patch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # is_available() of an import would bar ranks from CUDA
        forkserver.ensure_running()
    return context


def on_ranks(world: int, job: Callable[..., bool], *arguments) -> list[Outcome]:
    """Call `job`, a function of a module of the tests, on so many processes and wait for them."""
    context = _fork_server()
    held = reserved_port()
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1]), "WORLD_SIZE": str(world)}
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
    held.close()
    aborted = any(outcome.exit_code == -signal.SIGABRT for outcome in outcomes)
    assert GPUS or not aborted, f"a rank was ended by SIGABRT: {outcomes}"
    return outcomes


if __name__ == "__main__":
    said = json.loads(os.environ.get("RANKS_EVENT", "null"))
    exits.run(lambda: work(sys.argv[1], sys.argv[2], tuple(sys.argv[3:]), said and Event(*said)) and 0)
