"""One stream on several GPUs: `inference.sequence_parallel` ranks share each chunk's tokens (model/sequence.py).

    rank 0       this process: sessions, text encoder, noise, decoder, and its share of the student's work
    rank 1, ...  a process and a GPU each (pipeline/sequence_rank.py): the student, and a cache of its own heads

Rank 0 sends its calls of student and caches to the other ranks through pipes, and they make the same calls in the same
order; tensors are sent through the process group. No rank waits for a GPU. Each rank keeps its part of a snapshot.

If a rank dies, a thread ends the other ranks and aborts pending collectives, and the stream raises a UserError. The
other ranks end with this process in any case.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import UserError
from configs.geometry import Geometry
from configs.validate import check_shares
from model.cache import CacheState, StreamCache, StreamView, View
from model.causal_wan import CausalWanModel, TextKV
from model.denoiser import Student, as_timestep
from model.fast.student import FastPlan, FastStudent
from model.sequence import SequenceGroup
from utils.logs import get_logger

log = get_logger(__name__)
SETTING = "inference.sequence_parallel"
START_S = 300  # seconds until a rank must have been started
TIMEOUT = timedelta(minutes=10)  # of a collective: a rank may be compiling
GRACE_S = 5  # seconds that ending a rank, or hearing of its end, may take


def rank_devices(device: torch.device, size: int) -> list[torch.device]:
    """Devices of the ranks, rank 0's first: as many GPUs from `device` on, or the CPU for all."""
    if device.type != "cuda":
        return [device] * size
    last, visible = device.index + size - 1, torch.cuda.device_count()
    if last >= visible:
        raise UserError(
            f"{SETTING}={size} needs the GPUs {device.index} to {last} and {visible} are visible; lower it, or start "
            "fewer processes on this machine"
        )
    return [torch.device("cuda", device.index + rank) for rank in range(size)]


@dataclass(frozen=True, kw_only=True)
class RankSetup:
    """Settings that a rank is started with; weights are broadcast through the process group."""

    rank: int
    size: int
    port: int  # of the store by which ranks find each other, on this machine
    device: torch.device
    threads: int  # of torch on a CPU
    network: dict[str, Any]  # config of the student
    weights: list[tuple[str, torch.dtype]]  # its parameters
    attention: str | None  # kernel where `plan` does not apply
    plan: FastPlan | None  # None = no optimization


def join(setup: RankSetup, listener: socket.socket | None = None) -> SequenceGroup:
    """The group of all ranks; returns once each of them has called it. listener: socket of the store, on rank 0."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast, which brings nothing here
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # or torch ends this process where a rank is lost
    listening = {} if listener is None else {"master_listen_fd": listener.detach()}
    store = dist.TCPStore(
        "127.0.0.1", setup.port, setup.size, setup.rank == 0, wait_for_workers=False,
        timeout=timedelta(seconds=START_S), **listening,
    )  # fmt: skip
    gpu = setup.device.type == "cuda"
    if gpu:
        torch.cuda.set_device(setup.device)
    dist.init_process_group(
        "nccl" if gpu else "gloo", store=store, rank=setup.rank, world_size=setup.size, timeout=TIMEOUT,
        device_id=setup.device if gpu else None,
    )  # fmt: skip
    return SequenceGroup(dist.group.WORLD)


class SequenceRanks:
    """The other ranks, as controlled by rank 0. `model` is sent to them before it is optimized, and shares its tokens.

    Raises UserError if heads cannot be divided among the ranks, or if ranks do not start.
    """

    def __init__(
        self, model: CausalWanModel, devices: Sequence[torch.device], plan: FastPlan | None, attention: str | None
    ):
        size, weights = len(devices), dict(model.named_parameters())
        check_shares(SETTING, size, model.config.num_attention_heads, "attention heads of the student")
        if dist.is_initialized():
            raise UserError(f"{SETTING}={size}: this process is in a process group; close the other pipeline first")
        self.size = size
        self.failure: str | None = None
        self.newest: StreamView | None = None  # of all caches
        self.release: Callable[[], None] = lambda: None  # frees CUDA graphs, for which NCCL would wait
        self._closing, self._names, self._dropped = False, count(), deque()
        self._processes: list[subprocess.Popen] = []
        self._pipes: list[Connection] = []
        listener = socket.create_server(("127.0.0.1", 0))
        setups = [
            RankSetup(
                rank=rank, size=size, port=listener.getsockname()[1], device=device, threads=torch.get_num_threads(),
                network=dict(model.config), weights=[(name, p.dtype) for name, p in weights.items()],
                attention=attention, plan=plan,
            )
            for rank, device in enumerate(devices)
        ]  # fmt: skip
        self._gpu = devices[0].type == "cuda"
        try:
            for setup in setups[1:]:
                self._start(setup)
            for rank in range(1, size):
                self._await_start(rank)
            self._watcher = threading.Thread(target=self._watch, name="sequence ranks", daemon=True)
            self._watcher.start()
            self.group = join(setups[0], listener)
            with self.step():
                for weight in weights.values():
                    dist.broadcast(weight.data, 0)
        except BaseException:
            self.close()
            raise
        model.share_tokens(self.group)
        log.info("%d ranks share each chunk's tokens: %s", size, ", ".join(str(device) for device in devices))

    def _start(self, setup: RankSetup) -> None:
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).resolve().parents[1])
        env = os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)])}
        program = [sys.executable, "-m", "pipeline.sequence_rank", str(theirs.fileno())]
        # standard output may be a video; a process group of its own, since Ctrl-C is for this process
        process = subprocess.Popen(
            program, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2, env=env, process_group=0
        )
        theirs.close()
        self._processes.append(process)
        self._pipes.append(Connection(ours.detach()))
        self._pipes[-1].send(setup)

    def _await_start(self, rank: int) -> None:
        pipe = self._pipes[rank - 1]
        try:
            if not pipe.poll(START_S):
                raise UserError(f"{SETTING}: rank {rank} has not started within {START_S} s")
            said = pipe.recv()
        except (EOFError, OSError) as error:
            raise UserError(self._ended(rank)) from error
        if said:
            raise UserError(f"{SETTING}: rank {rank} could not start: {said}")

    def name(self, thing: object) -> int:
        """A number that identifies `thing` on the other ranks, which drop it when it is deleted here."""
        name = next(self._names)
        weakref.finalize(thing, self._dropped.append, name).atexit = False
        return name

    def tell(self, *message: Any) -> None:
        """Send a call to the other ranks; its name is a key of `FOLLOWS` in pipeline/sequence_rank.py."""
        self.check()
        gone = [self._dropped.popleft() for _ in range(len(self._dropped))]
        try:
            for pipe in self._pipes:
                if gone:
                    pipe.send(("drop", gone))
                pipe.send(message)
        except OSError as error:
            self._await_failure()
            raise UserError(self.failure or f"{SETTING}: a rank cannot be reached") from error

    @contextmanager
    def step(self) -> Iterator[None]:
        """Work of all ranks. If it fails here, the other ranks would wait for ever, so they are ended."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, RuntimeError):  # from gloo, if a rank is gone
                self._await_failure()
            failure = self.failure
            self.failure = failure or f"{SETTING}: a step was broken off, and the ranks ended; make the pipeline again"
            self.close()
            if failure is not None and isinstance(error, RuntimeError):
                raise UserError(failure) from error
            raise

    def check(self) -> None:
        """Raise a UserError if a rank is gone."""
        if self.failure is not None:
            raise UserError(self.failure)

    def _await_failure(self) -> None:
        end = time.monotonic() + GRACE_S
        while self.failure is None and time.monotonic() < end:
            time.sleep(0.01)

    def _watch(self) -> None:
        """Wait until a rank ends; then end all."""
        wait(self._pipes)
        if self._closing:
            return
        time.sleep(0.1)  # a rank that lost another's connection may be heard of first
        ready = wait(self._pipes, 0)
        heard = {}
        for pipe in ready:
            try:
                heard[1 + self._pipes.index(pipe)] = pipe.recv()
            except (EOFError, OSError):
                heard[1 + self._pipes.index(pipe)] = ""
        rank = min(heard, key=lambda rank: (bool(heard[rank]), rank))  # who says nothing was killed: it comes first
        self.failure = self._ended(rank, heard[rank])
        log.error(self.failure)
        self._kill()
        self._abort()

    def _ended(self, rank: int, said: str = "") -> str:
        """The message for a rank that has ended. said: the last message of the rank."""
        process = self._processes[rank - 1]
        if not said:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(GRACE_S)
                said = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"rank {rank} of the {self.size} that share a stream has ended ({said}); start the program again"

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()

    def _abort(self) -> None:
        """Abort collectives that wait on this rank's GPU. Those on a CPU have raised already."""
        if self._gpu and dist.is_initialized():
            dist.group.WORLD.abort()

    def close(self) -> None:
        """End the other ranks and leave the process group."""
        if self._closing:
            return
        self._closing = True
        self.failure = self.failure or f"{SETTING}: this pipeline is closed"
        self._kill()
        for process in self._processes:
            process.wait()
        self.release()
        if dist.is_initialized():
            leave = threading.Thread(target=self._leave, daemon=True)
            leave.start()
            leave.join(GRACE_S)

    def _leave(self) -> None:
        self._abort()
        dist.destroy_process_group()


class SharedText(list):
    """Keys and values of a prompt, with the number that identifies them on the other ranks."""

    def __init__(self, kv: TextKV):
        super().__init__(kv)
        self.name = -1


class ParallelStudent(Student):
    """The student on rank 0, whose calls are made on all ranks. own: the student that computes this rank's share."""

    def __init__(self, own: Student, ranks: SequenceRanks):
        super().__init__(own.model)
        self.own, self.ranks = own, ranks
        self.cache_dtype = own.cache_dtype
        if isinstance(own, FastStudent):
            ranks.release = own.release_graphs
        self.check = ranks.check
        self.close: Callable[[], None] = weakref.finalize(self, ranks.close)

    @torch.no_grad()
    def text_kv(self, text: Tensor) -> TextKV:
        kv = SharedText([])
        kv.name = self.ranks.name(kv)
        with self.ranks.step():
            self.ranks.tell("text", kv.name, tuple(text.shape), text.dtype)
            kv.extend(self.own.text_kv(self.ranks.group.broadcast(text)))
        return kv

    def new_cache(
        self, geometry: Geometry, batch: int, max_chunks: int | None = None, dtype: torch.dtype | None = None
    ) -> "SharedCache":
        geometry.check_shares(SETTING, self.ranks.size)
        cache = SharedCache(self.own.new_cache(geometry, batch, max_chunks, dtype), self.ranks)
        self.ranks.tell("cache", cache.name, geometry, batch, max_chunks, dtype)
        return cache

    def x0(
        self, x_t: Tensor, t: float | Tensor, text: TextKV | Tensor, view: View | None = None, start_frame: int = 0
    ) -> Tensor:
        """x0 = x_t - sigma v of a chunk of a stream. text: of this student's `text_kv`; view: the newest."""
        assert isinstance(text, SharedText) and view is self.ranks.newest
        t = as_timestep(t, x_t)
        with self.ranks.step():
            self.ranks.tell("x0", text.name, start_frame, tuple(x_t.shape), x_t.dtype, tuple(t.shape))
            self.ranks.group.broadcast(x_t)
            self.ranks.group.broadcast(t)
            return self.own.x0(x_t, t, text, view, start_frame)


@dataclass(frozen=True, eq=False)
class SharedState:
    """A snapshot of a SharedCache: this rank's part, and the number of the parts of the other ranks."""

    own: CacheState
    ranks: SequenceRanks
    name: int


class SharedCache:
    """A KV cache whose heads are divided among the ranks; its calls are made on all of them. own: this rank's."""

    def __init__(self, own: StreamCache, ranks: SequenceRanks):
        self.own, self.ranks, self.name = own, ranks, ranks.name(self)

    def begin(self, chunk: int) -> StreamView:
        self.ranks.newest = self._on_all("begin", chunk)
        return self.ranks.newest

    def rewrite(self, position: int) -> StreamView:
        self.ranks.newest = self._on_all("rewrite", position)
        return self.ranks.newest

    def reset(self) -> None:
        self._on_all("reset")

    def permute(self, order: Sequence[int]) -> None:
        self._on_all("permute", list(order))

    def _on_all(self, method: str, *arguments: Any) -> Any:
        """Call a method of StreamCache on every rank; returns what it gives here."""
        result = getattr(self.own, method)(*arguments)
        self.ranks.tell("on_cache", self.name, method, *arguments)
        return result

    def shift_keys(self, position: int, frames: int, shift: Callable[[Tensor, int], Tensor]) -> None:
        """As `StreamCache.shift_keys`; the other ranks use their student's own `shift_keys`."""
        self.own.shift_keys(position, frames, shift)
        self.ranks.tell("shift_keys", self.name, position, frames)

    def snapshot(self, device: torch.device | str | None = None) -> SharedState:
        """A copy on each rank: on the host if `device` is the CPU, else where the cache is."""
        state = self.own.snapshot(device)
        name = self.ranks.name(state)
        self.ranks.tell("snapshot", self.name, name, device is not None and torch.device(device).type == "cpu")
        return SharedState(state, self.ranks, name)

    def restore(self, state: SharedState) -> None:
        if not isinstance(state, SharedState) or state.ranks is not self.ranks:
            raise UserError("the snapshot was taken by another pipeline; restore it in that which took it")
        self.own.restore(state.own)
        self.ranks.tell("restore", self.name, state.name)

    @property
    def capacity(self) -> int:
        return self.own.capacity

    @property
    def dtype(self) -> torch.dtype:
        return self.own.dtype

    @property
    def bytes(self) -> int:
        """Bytes held by all ranks."""
        return self.ranks.size * self.own.bytes
