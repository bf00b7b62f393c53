"""A server with a pool that pretends, for tests of the HTTP side: real sockets, real files, no model."""

import asyncio
import contextlib
import io
import threading
import time
from pathlib import Path

import numpy as np
import uvicorn
from PIL import Image

from configs.load import load_config
from server.access import AccessPolicy, Keys, bound_socket
from server.app import ServerOptions, create_app
from server.job_store import JobLimits, JobStore
from server.limits import Limits
from server.protocols import SOCKET
from utils.video import VideoWriter

PROMPT = "a red circle moves right"
ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
KEYS = Keys({"alice": ALICE, "bob": BOB})


class FakePool:
    """WorkerPool's methods. A job's frames are grey, and each chunk waits until `gate` is open."""

    def __init__(self, workers: int = 1):
        self.workers, self.state = workers, "warming"
        self.config, self.about, self.observe = load_config("configs/tiny.yaml"), None, None
        self.gate = threading.Event()
        self.gate.set()
        self.specs, self.faults, self.running = [], [], 0

    async def start(self) -> None:
        self.state = "ready"

    async def stop(self) -> None:
        self.state = "stopped"

    def status(self) -> list[dict]:
        one = {"state": self.state, "sessions": 0, "capacity": 2, "restarts": 0, "hangs": 0, "gpu_memory": 0}
        return [{"worker": number} | one for number in range(self.workers)]

    async def run_job(self, spec, output: Path):
        self.specs.append(spec)
        self.running += 1
        try:
            chunks = 4
            for chunk in range(1, chunks + 1):
                while not self.gate.is_set():
                    await asyncio.sleep(0.01)
                if self.faults:
                    raise self.faults.pop(0)
                yield {"type": "progress", "chunk": chunk, "chunks": chunks}
            with VideoWriter(output, 16, (64, 96)) as video:
                video.write(np.full((spec.frames, 64, 96, 3), 128, np.uint8))
            thumbnail = io.BytesIO()
            Image.new("RGB", (96, 64)).save(thumbnail, "jpeg")
            yield {"type": "done", "frames": spec.frames, "thumbnail": thumbnail.getvalue()}
        finally:
            self.running -= 1


class Running:
    """A server in a thread."""

    def __init__(
        self, folder: Path, pool=None, *, keys: Keys = KEYS, limits=None, grace: float = 5, store=None, **policy
    ):
        self.pool = pool or FakePool()
        store = store or JobStore(folder, limits or JobLimits())
        options = ServerOptions(live=Limits(max_seconds=60), grace_seconds=grace, loras=("cartoon",))
        self.app = create_app(self.pool, store, AccessPolicy(keys, True, **policy), options)
        self.listener = bound_socket("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(
            uvicorn.Config(self.app, log_config=None, timeout_graceful_shutdown=2, **SOCKET)
        )
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)

    def __enter__(self) -> "Running":
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        return self

    def __exit__(self, *exception) -> None:
        self.server.should_exit = True
        self.thread.join(120)
        assert not self.thread.is_alive()
        with contextlib.suppress(OSError):
            self.listener.close()


def until(condition, seconds: float = 120):
    """What `condition` gives, as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value
