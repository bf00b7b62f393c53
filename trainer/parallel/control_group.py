"""Communication of ranks on the host (gloo), without waiting for a GPU: agreement, and failing together.

    control = ControlGroup(timeout_s=900)
    stopping, failing = control.each(asked, bad)  # true on all ranks if true on one
    control.run_on_all("saving", lambda: ...)     # fails on all ranks if it fails on one

A lost rank is noticed here, in a collective of a step, or by trainer/parallel/rank_watch.py.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from configs.errors import UserError

T = TypeVar("T")
LOST_RANK_MESSAGES = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out", "timed out", "NCCL")


class FailedElsewhere(UserError):
    """A joint operation has failed on another rank."""


class ControlGroup:
    """All ranks of a run (possibly one)."""

    def __init__(self, timeout_s: float = 900.0):
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if several else None
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return self.each(flag)[0]

    def each(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on any rank; one message."""
        if self.group is None:
            return flags
        both = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        return tuple(bool(flag) for flag in both.tolist())

    def wait(self) -> None:
        """Barrier of all ranks."""
        self.any(False)

    def gather(self, value: Any) -> list[Any]:
        """Small picklable values of all ranks in rank order, on every rank."""
        if self.group is None:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def run_on_all(self, what: str, work: Callable[[], T]) -> T:
        """Call `work`, which has no collectives. A failure on one rank fails all, with its message."""
        result, error = None, None
        try:
            result = work()
        except Exception as failure:
            error = failure
            if self.group is None:
                raise
        errors = self.gather(None if error is None else str(error) or type(error).__name__)
        if error is not None:
            raise error
        if any(errors):
            rank = next(i for i, text in enumerate(errors) if text)
            raise FailedElsewhere(f"{what} failed on rank {rank}: {errors[rank]}")
        return result


def is_lost_rank(error: BaseException) -> bool:
    """Whether an exception means that another rank is gone."""
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_RANK_MESSAGES)
