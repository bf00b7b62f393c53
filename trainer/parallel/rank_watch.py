"""Whether the other ranks are still there, asked on a thread of its own: the main thread may be waiting for its GPU,
which waits for a message of a rank that has gone.

Every BEAT_S seconds each rank counts up in the store that torchrun (or rank 0) serves. A rank has gone if it fails and
says so, if its process, on this machine, has ended, or if it has not counted for `timeout_s`. The first rank to notice
tells the others, so that all name the same one.
"""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from configs.errors import UserError
from trainer.parallel.control_group import ControlGroup, is_lost_rank
from utils.exits import end_now
from utils.logs import get_logger

log = get_logger(__name__)

BEAT_S = 2.0
GRACE_S = 15.0  # for the main thread to end by itself; torchrun kills 30 s after a rank has ended
ENDED, LOST = "ended", "lost"


class LostRank(UserError):
    """Another process of the run has ended, or does not answer."""


class RankWatch:
    """A context manager; every rank of the run enters and leaves it.

    on_loss: called on the thread, with the number of the rank that has gone, if the block has not been left GRACE_S
    after that was noticed.
    """

    def __init__(self, control: ControlGroup, timeout_s: float, on_loss: Callable[[int], None]):
        self.rank, self.timeout_s, self.on_loss = control.rank, timeout_s, on_loss
        self.control, own = control, _own_process()
        self.processes = control.gather(own)
        here = [rank for rank, process in enumerate(self.processes) if process[0] == own[0]]
        self.here = [rank for rank in here if not _has_ended(self.processes[rank])]  # those that can be seen
        run = control.gather(uuid.uuid4().hex)[0]
        # a connection of its own, because a call in the process group's may have to wait for another one
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        server = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=30))
        self.store = dist.PrefixStore(f"rank_watch/{run}", server)
        self._lost: int | None = None
        self._known, self._leaving = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def lost(self, wait_s: float) -> int | None:
        """The lost rank, if it becomes known within `wait_s` seconds."""
        self._known.wait(wait_s)
        return self._lost

    def __enter__(self) -> "RankWatch":
        self._tell(str(self.rank), "0")
        self.control.wait()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        self._leaving.set()
        self._thread.join()
        with suppress(RuntimeError):  # the store has gone, with the launcher or with rank 0
            if kind is None:
                self._tell(str(self.rank), ENDED)
            elif self._lost is None:
                self._tell(LOST, str(self.rank))

    def _tell(self, key: str, value: str) -> None:
        self.store.set(key, value)

    def _watch(self) -> None:
        counts, count = _Counts(len(self.processes)), 0
        while not self._leaving.wait(BEAT_S):
            count += 1
            try:
                self._tell(str(self.rank), str(count))
                self._lost = self._look(counts)
                if self._lost is not None:
                    self._tell(LOST, str(self._lost))
            except RuntimeError:  # likewise; then NCCL and gloo notice, later
                return
            if self._lost is not None:
                self._known.set()
                if not self._leaving.wait(GRACE_S):
                    self.on_loss(self._lost)
                return

    def _look(self, counts: "_Counts") -> int | None:
        if self.store.check([LOST]):
            return int(self.store.get(LOST))
        gone = [rank for rank in self.here if _has_ended(self.processes[rank])]  # asked before what it has said
        said = [value.decode() for value in self.store.multi_get([str(rank) for rank in range(len(self.processes))])]
        silent = counts.silent(said, self.timeout_s)
        return next((rank for rank in (*gone, *silent) if said[rank] != ENDED), None)


class _Counts:
    """Since when each rank has said what it says."""

    def __init__(self, world: int):
        self.said, self.since = [""] * world, [time.monotonic()] * world

    def silent(self, said: Sequence[str], limit_s: float) -> list[int]:
        now = time.monotonic()
        for rank, value in enumerate(said):
            if value != self.said[rank]:
                self.said[rank], self.since[rank] = value, now
        return [rank for rank, since in enumerate(self.since) if now - since > limit_s]


Process = tuple[str, int, str]  # machine and PID namespace, PID, time of start


def _own_process() -> Process:
    try:
        where = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:  # it cannot be told which ranks are here
        where = uuid.uuid4().hex
    return where, os.getpid(), _state(os.getpid())[1]


def _state(number: int) -> tuple[str, str]:
    """State and time of start of a process of this machine; empty if there is none."""
    try:
        text = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return "", ""
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]


def _has_ended(process: Process) -> bool:
    """Of a process of this machine."""
    _, number, began = process
    state, start = _state(number)
    return state in ("", "Z", "X") or start != began


@contextmanager
def explain_lost_rank(control: ControlGroup, resume: str, timeout_s: float) -> Iterator[None]:
    """Ends the run with one message when another rank is lost; `resume` tells how to resume. Every rank calls it.

    What the block raises for that reason becomes LostRank. Where it raises nothing, because it waits for a GPU that
    waits for that rank, the process ends.
    """
    if control.world == 1:
        yield
        return
    rank = control.rank

    def sentence(lost: int | None, reason: str) -> LostRank:
        which = "another rank" if lost in (None, rank) else f"rank {lost}"
        return LostRank(
            f"rank {rank} has lost {which} ({reason}), so the run has ended; look at that rank's last lines for the "
            f"cause, then {resume}"
        )

    watch, silent = None, "it has ended, or does not answer"
    try:
        with RankWatch(control, timeout_s, lambda lost: end_now(sentence(lost, silent))) as watch:
            try:
                yield
            except RuntimeError as error:
                if is_lost_rank(error):
                    watch.lost(wait_s=3 * BEAT_S)  # before the others are told that this rank leaves
                raise
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        log.debug("collective failed", exc_info=error)
        lost = None if watch is None else watch.lost(wait_s=0)
        raise sentence(lost, str(error).splitlines()[0][:120]) from error
