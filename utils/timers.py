"""Where the time goes, measured without making the GPU wait."""

import time
from itertools import pairwise

import torch


class SpanTimer:
    """Named spans of time, one after another: each `mark` ends the span that began at the mark before it.

    On CUDA a mark is an event in the current stream and costs no synchronisation; on other devices it reads the clock.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._names: list[str] = []
        self._marks = [self._now()]

    def mark(self, name: str) -> None:
        """End the running span and call it `name`."""
        self._names.append(name)
        self._marks.append(self._now())

    def wait(self) -> None:
        """Until everything before the last mark has happened."""
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
