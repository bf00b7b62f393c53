"""Timing without synchronizing with the GPU."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import pairwise

import torch

POLL_S = 0.0005  # between two looks at whether a GPU is done


class SpanTimer:
    """Measures consecutive spans of time; each `mark` ends the span that began at the mark before it.

    On CUDA a mark is an event in the current stream, without synchronization; on other devices it reads the clock.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._names: list[str] = []
        self._marks = [self._now()]

    def mark(self, name: str) -> None:
        """End the current span, which is called `name`."""
        self._names.append(name)
        self._marks.append(self._now())

    def wait(self, check: Callable[[], None] | None = None) -> None:
        """Until everything before the last mark has happened. check: called meanwhile; may raise."""
        while self._cuda and check is not None and not self._marks[-1].query():
            check()
            time.sleep(POLL_S)
        if self._cuda:
            self._marks[-1].synchronize()

    def spans(self) -> dict[str, float]:
        """Seconds by name, in order; names marked several times add up. Waits as `wait` does."""
        self.wait()
        seconds: dict[str, float] = {}
        for name, (begin, end) in zip(self._names, pairwise(self._marks), strict=True):
            span = begin.elapsed_time(end) / 1000 if self._cuda else end - begin
            seconds[name] = seconds.get(name, 0.0) + span
        return seconds

    def _now(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class PhaseTimer:
    """Time and peak memory of nested phases; time in an inner phase does not count for the outer one.

    A phase is a block `with phases.of(name)`, or a method that is wrapped by `wrap`.
    """

    OUTSIDE = "outside"

    def __init__(self, device: torch.device):
        self.device, self._open = device, [self.OUTSIDE]
        self._cuda = device.type == "cuda"
        self.peaks: dict[str, int] = {}  # peak bytes in use by the allocator; GPUs only
        self.restart()

    def restart(self) -> None:
        """Reset all times."""
        self._timer = SpanTimer(self.device)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def wrap(self, owner: object, method: str, name: Callable[[], str]) -> None:
        """Count calls of a method of `owner` as the phase that `name` returns at each call."""
        inner = getattr(owner, method)

        @wraps(inner)
        def timed(*args, **kwargs):
            with self.of(name()):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)

    def spans(self) -> dict[str, float]:
        """Seconds by phase, in the order in which they first ended. Waits for the device."""
        self._mark()
        return self._timer.spans()

    def _mark(self) -> None:
        name = self._open[-1]
        self._timer.mark(name)
        if self._cuda:
            self.peaks[name] = max(self.peaks.get(name, 0), torch.cuda.max_memory_allocated(self.device))
            torch.cuda.reset_peak_memory_stats(self.device)
