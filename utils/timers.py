"""Timing without synchronizing with the GPU."""

import time
from collections.abc import Callable
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
