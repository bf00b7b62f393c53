"""Peak host memory of a block of code, without memory-mapped files, whose pages the kernel may drop."""

import threading
from pathlib import Path

PERIOD = 0.002  # seconds between samples


def resident() -> tuple[int, int]:
    """Resident bytes of this process: anonymous memory and memory-mapped files. Linux only."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, files, shared = (int(lines[name].split()[0]) << 10 for name in ("RssAnon", "RssFile", "RssShmem"))
    return own, files + shared


class HostPeak:
    """`with HostPeak() as peak:`; then `peak.own` and `peak.files` are the peak bytes beyond those at the start.

    A thread samples every 2 ms, so shorter peaks may be missed.
    """

    def __enter__(self) -> "HostPeak":
        self._start = resident()
        self.own = self.files = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(PERIOD):
            self._look()

    def _look(self) -> None:
        own, files = resident()
        self.own, self.files = max(self.own, own - self._start[0]), max(self.files, files - self._start[1])
