"""What ranks say to each other on the host, so that none of them waits for its GPU: agreement, and shared failure.

    team = Team(timeout_s=900)
    stopping, failing = team.each(asked, bad)     # true on all ranks if true on one
    team.together("saving", lambda: ...)          # fails on all ranks if it fails on one

A rank that has gone is noticed here, or in a collective of a step: at once by gloo, after `timeout_s` by NCCL.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from configs.errors import UserError
from utils.logs import get_logger

log = get_logger(__name__)

T = TypeVar("T")
LOST_RANK_MESSAGES = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out", "timed out", "NCCL")


class LostRank(UserError):
    """Another process of the run has ended, or does not answer."""


class FailedElsewhere(UserError):
    """What all ranks were doing has failed on another one."""


class ControlGroup:
    """All ranks of a run. One process is a team of its own."""

    def __init__(self, timeout_s: float = 900.0):
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if several else None
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

    def any(self, flag: bool) -> bool:
        """Whether any rank has it."""
        return self.each(flag)[0]

    def each(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag, whether any rank has it; in one message."""
        if self.group is None:
            return flags
        both = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        return tuple(bool(flag) for flag in both.tolist())

    def wait(self) -> None:
        """Until all ranks are here."""
        self.any(False)

    def gather(self, value: Any) -> list[Any]:
        """Small picklable values of all ranks, in their order, on every rank."""
        if self.group is None:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def run_on_all(self, what: str, work: Callable[[], T]) -> T:
        """`work()`, which has no collectives. If it fails on any rank, it fails on all, in a sentence of the first."""
        result, error = None, None
        try:
            result = work()
        except Exception as failure:
            error = failure
            if self.group is None:
                raise
        said = self.gather(None if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        if any(said):
            rank = next(i for i, text in enumerate(said) if text)
            raise FailedElsewhere(f"{what} failed on rank {rank}: {said[rank]}")
        return result


def is_lost_rank(error: BaseException) -> bool:
    """Whether an exception says that another rank has gone."""
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_RANK_MESSAGES)


@contextmanager
def explain_lost_rank(resume: str) -> Iterator[None]:
    """Turns the error of a collective whose other end has gone into one sentence; `resume` says how to go on."""
    try:
        yield
    except RuntimeError as error:
        several = dist.is_initialized() and dist.get_world_size() > 1
        if not several or not is_lost_rank(error):
            raise
        reason = str(error).splitlines()[0][:120]
        log.debug("collective failed", exc_info=error)
        raise LostRank(
            f"rank {dist.get_rank()} has lost another rank ({reason}), so the run has ended; look at that rank's last "
            f"lines for the cause, then {resume}"
        ) from error
