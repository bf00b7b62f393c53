"""Time and memory of nested phases of a program."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch

from utils.timers import SpanTimer


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
