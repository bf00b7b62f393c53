"""What /metrics says, in Prometheus' format."""

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

JOB_SECONDS = (0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800, 3600)
FRAME_SECONDS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2.5, 5, 10, 30)
CHUNK_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2.5, 5, 10)
WORKER_STATES = ("warming", "ready", "restarting", "stopped")
JOB_STATES = ("queued", "in_progress", "completed", "failed")


class Metrics:
    """Counters that the server adds to, and gauges that `text` fills in."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self):
        self._registry = registry = CollectorRegistry()

        def gauge(name: str, help: str, *labels: str) -> Gauge:
            return Gauge(f"diagonal_{name}", help, labels, registry=registry)

        def histogram(name: str, help: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"diagonal_{name}_seconds", help, buckets=buckets, registry=registry)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"diagonal_{name}", help, labels, registry=registry)

        self.jobs_finished = counter("jobs_finished", "Jobs that have ended, by outcome", "outcome")
        self.job_wait = histogram("job_wait", "From the creation of a job to its start", JOB_SECONDS)
        self.job_run = histogram("job_run", "From the start of a job to its finished video", JOB_SECONDS)
        self.first_frame = histogram("first_frame", "From opening a live session to its first frame", FRAME_SECONDS)
        self.chunk = histogram("chunk", "Time that a chunk of a live session takes", CHUNK_SECONDS)
        self.missed_deadlines = counter("missed_deadlines", "Chunks that came after the time at which they were due")
        self._jobs = gauge("jobs", "Jobs that are kept, by status", "status")
        self._workers = gauge("workers", "Worker processes, by state", "state")
        self._restarts = gauge("worker_restarts", "How often a worker was started again", "worker")
        self._hangs = gauge("worker_hangs", "How often of these because it hung, and was killed", "worker")
        self._sessions = gauge("live_sessions", "Live sessions of a worker", "worker")
        self._capacity = gauge("live_capacity", "Live sessions that a worker can hold at their rate", "worker")
        self._memory = gauge("gpu_memory_bytes", "GPU memory that a worker holds", "worker")

    def observe(self, name: str, worker: int, value: float) -> None:
        """For WorkerPool.observe: what making a chunk of a live session has shown, seconds."""
        match name:
            case "first_frame_seconds":
                self.first_frame.observe(value)
            case "chunk_seconds":
                self.chunk.observe(value)
            case "late_seconds":
                self.missed_deadlines.inc()

    def text(self, jobs: Mapping[str, int], workers: Sequence[Mapping[str, Any]]) -> bytes:
        """jobs: by status; workers: as WorkerPool.status() has them."""
        for status in JOB_STATES:
            self._jobs.labels(status).set(jobs.get(status, 0))
        for state in WORKER_STATES:
            self._workers.labels(state).set(sum(worker["state"] == state for worker in workers))
        shown = ((self._restarts, "restarts"), (self._hangs, "hangs"), (self._sessions, "sessions"),
                 (self._capacity, "capacity"), (self._memory, "gpu_memory"))  # fmt: skip
        for gauge, key in shown:
            gauge.clear()
            for worker in workers:
                gauge.labels(str(worker["worker"])).set(worker[key])
        return generate_latest(self._registry)
