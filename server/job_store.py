"""Jobs and their files on disk, which outlive the server.

    jobs.sqlite                 a row a job; SQLite with a write-ahead log
    video_<32 digits>.mp4       the finished video      .jpg   its thumbnail      .png   the picture that it begins with

A file is written under a temporary name and renamed before its row is updated; a row is deleted before its files. Rows
therefore never refer to missing files (but for a crash while the disk is full, when files are deleted first). After a
crash, `recover` repeats the jobs that were running and removes files without rows. Only one process uses a folder at a
time.
"""

import errno
import json
import re
import secrets
import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

from configs.errors import UserError
from configs.validate import check_bounds, number
from server.errors import ApiError
from utils.files import atomic_path, check_writable, exclusive_use, temporary_path
from utils.machine import free_space

VERSION = 1  # of the table
QUEUED, RUNNING, DONE, FAILED = "queued", "in_progress", "completed", "failed"
FILE = re.compile(r"(video_[0-9a-f]{32})\.(mp4|jpg|png)")
ID = re.compile(r"video_[0-9a-f]{32}")
VIDEO, THUMBNAIL, IMAGE = ".mp4", ".jpg", ".png"
LEAST_FREE = 16 * 2**20  # bytes of the disk; with less, no job is taken or begun
PROBE = 2**16  # bytes of a file that is written to see whether one can be
MAX_ATTEMPTS = 2  # runs of a job that a crash, of the server or of its worker, may end
TABLE = """
CREATE TABLE jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    status TEXT NOT NULL,
    created_at REAL NOT NULL,
    completed_at REAL,
    expires_at REAL,
    attempts INTEGER NOT NULL DEFAULT 0,
    request TEXT NOT NULL,
    error TEXT,
    idempotency_key TEXT,
    digest TEXT NOT NULL,
    UNIQUE (owner, idempotency_key)
);
CREATE INDEX jobs_by_status ON jobs (status, owner, number);
CREATE INDEX jobs_by_owner ON jobs (owner, number);
"""
COLUMNS = "number, id, owner, status, created_at, completed_at, expires_at, attempts, request, error"


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """The checked parameters of a video."""

    prompt: str
    seconds: float
    num_frames: int  # pixel frames
    size: tuple[int, int]  # height, width in pixels
    seed: int
    schedule: str | None = None  # name of a preset; None = the configured schedule
    lora: str | None = None  # name of a configured adapter
    image: bool = False  # whether it begins with a picture


@dataclass(frozen=True, kw_only=True)
class Job:
    number: int  # order of creation
    id: str
    owner: str
    status: str
    created_at: float  # Unix time, as all times here
    completed_at: float | None
    expires_at: float | None
    attempts: int
    request: JobRequest
    error: Mapping[str, str] | None  # code, message


@dataclass(frozen=True, kw_only=True)
class JobLimits:
    """Limits of the queue and of stored jobs; options of serve.py."""

    queue: int = number(100, 1, 100_000)  # jobs that wait, of all keys
    queue_per_key: int = number(20, 1, 100_000)  # jobs of a key that wait or run
    kept_per_key: int = number(1_000, 1, 1_000_000)  # jobs of a key in all, finished ones included
    keep_hours: float = number(24.0, 0.001, 100_000)  # until a finished job is deleted, with its files

    def __post_init__(self):
        check_bounds("", self)


class JobStore:
    """Table and files of jobs. Not thread-safe."""

    def __init__(self, folder: Path, limits: JobLimits):
        """Raises UserError if the folder is in use, not writable, or has the database of another program."""
        self.folder, self.limits = Path(folder), limits
        check_writable(self.folder, "--jobs_folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(exclusive_use(self.folder, "--jobs_folder"))
            self._db = self._opened()
            stack.callback(self._db.close)
            self._held = stack.pop_all()

    def _opened(self) -> sqlite3.Connection:
        path = self.folder / "jobs.sqlite"
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)  # transactions are explicit
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")  # a confirmed write survives a power failure
            version = db.execute("PRAGMA user_version").fetchone()[0]
            empty = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if version != VERSION and not (version == 0 and empty):
                raise UserError(f"{path} is of another version of this program; give another --jobs_folder")
            if empty:
                db.executescript(f"BEGIN; {TABLE} PRAGMA user_version = {VERSION}; COMMIT;")
        except sqlite3.DatabaseError as error:
            db.close()
            raise UserError(f"{path} cannot be used ({error}); move it away, or give another --jobs_folder") from error
        except UserError:
            db.close()
            raise
        return db

    def close(self) -> None:
        self._held.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # on a full disk SQLite may have rolled it back
                self._db.execute("ROLLBACK")
            raise

    def check_room(self, *, table: bool) -> None:
        """Raise OSError, UserError or sqlite3.Error if nothing can be stored, on a full disk for example.

        table: whether to write to the table, too, which waits for the disk.
        """
        free = free_space(self.folder)
        if free < LEAST_FREE:
            raise OSError(errno.ENOSPC, f"the disk is full: {free / 1e6:.0f} MB are free")
        with temporary_path(self.folder / "probe", "probe") as probe:
            probe.write_bytes(bytes(PROBE))
        if table:
            self._db.execute(f"PRAGMA user_version = {VERSION}")

    def _jobs(self, rest: str, *values: Any) -> list[Job]:
        rows = self._db.execute(f"SELECT {COLUMNS} FROM jobs {rest}", values).fetchall()
        return [_job(row) for row in rows]

    def path(self, id: str, ending: str) -> Path:
        """Path of a file of a job, which may not exist."""
        assert ID.fullmatch(id) and ending in (VIDEO, THUMBNAIL, IMAGE)
        return self.folder / f"{id}{ending}"

    def add(
        self, owner: str, request: JobRequest, digest: str, idempotency_key: str | None, image: bytes | None
    ) -> tuple[Job, bool]:
        """Create a job; returns it and True, or for a repeated idempotency key the earlier job and False.

        digest: of the request, compared if a key is used again. image: a PNG file.
        Raises ApiError if a limit is reached, or if the key was used for another request.
        """
        limits, id = self.limits, f"video_{secrets.token_hex(16)}"
        with self._transaction() as db:
            if idempotency_key is not None:
                query = "SELECT id, digest FROM jobs WHERE owner = ? AND idempotency_key = ?"
                if (row := db.execute(query, (owner, idempotency_key)).fetchone()) is not None:
                    if row[1] != digest:
                        sentence = "this Idempotency-Key was used for another request; use a new one"
                        raise ApiError(422, sentence, code="idempotency_key_reused")
                    return self._jobs("WHERE id = ?", row[0])[0], False
            query = "SELECT count(*), coalesce(sum(status IN (?, ?)), 0) FROM jobs WHERE owner = ?"
            kept, unfinished = db.execute(query, (QUEUED, RUNNING, owner)).fetchone()
            waiting = db.execute("SELECT count(*) FROM jobs WHERE status = ?", (QUEUED,)).fetchone()[0]
            if kept >= limits.kept_per_key:
                _full(f"this key has {kept} videos, which is the most; delete some", "too_many_videos")
            if unfinished >= limits.queue_per_key:
                _full(f"this key has {unfinished} videos in work, which is the most; wait for one", "too_many_requests")
            if waiting >= limits.queue:
                _full(f"{waiting} videos are waiting, which is the most; try again later", "queue_full")
            query = (
                "INSERT INTO jobs (id, owner, status, created_at, request, idempotency_key, digest) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)"
            )
            text = json.dumps(asdict(request))
            db.execute(query, (id, owner, QUEUED, time.time(), text, idempotency_key, digest))
            if image is not None:
                with atomic_path(self.path(id, IMAGE)) as temporary:
                    temporary.write_bytes(image)
        return self._jobs("WHERE id = ?", id)[0], True

    def get(self, owner: str, id: str) -> Job:
        """A job of an owner. Raises ApiError if there is none."""
        jobs = self._jobs("WHERE id = ? AND owner = ?", id, owner)
        if not jobs:
            raise ApiError(404, f"there is no video {id[:50]}; it may be deleted or expired", code="video_not_found")
        return jobs[0]

    def page(self, owner: str, after: str | None, limit: int, newest_first: bool) -> tuple[list[Job], bool]:
        """At most `limit` jobs after the job `after`, and whether there are more."""
        order, compare = ("DESC", "<") if newest_first else ("ASC", ">")
        place, values = "", []
        if after is not None:
            place, values = f"AND number {compare} ?", [self.get(owner, after).number]
        jobs = self._jobs(f"WHERE owner = ? {place} ORDER BY number {order} LIMIT ?", owner, *values, limit + 1)
        return jobs[:limit], len(jobs) > limit

    def heads(self) -> dict[str, Job]:
        """The oldest waiting job of each owner."""
        jobs = self._jobs(
            "WHERE number IN (SELECT min(number) FROM jobs WHERE status = ? GROUP BY owner)", QUEUED
        )
        return {job.owner: job for job in jobs}

    def counts(self) -> dict[str, int]:
        """Jobs by status."""
        return dict(self._db.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall())

    def begin(self, id: str) -> bool:
        """Mark a job as running; False if it is not waiting any more."""
        query = "UPDATE jobs SET status = ?, attempts = attempts + 1 WHERE id = ? AND status = ?"
        return bool(self._db.execute(query, (RUNNING, id, QUEUED)).rowcount)

    def put_back(self, id: str, *, counted: bool) -> None:
        """Return a running job to its place in the queue. counted: the run counts towards MAX_ATTEMPTS."""
        query = "UPDATE jobs SET status = ?, attempts = attempts - ? WHERE id = ? AND status = ?"
        self._db.execute(query, (QUEUED, int(not counted), id, RUNNING))

    def finish(self, id: str, code: str | None = None, message: str = "") -> None:
        """Mark a waiting or running job as completed; with `code`, as failed, and remove its files."""
        now = time.time()
        error = None if code is None else json.dumps({"code": code, "message": message})
        query = (
            "UPDATE jobs SET status = ?, completed_at = ?, expires_at = ?, error = ? WHERE id = ? AND status IN (?, ?)"
        )
        values = (FAILED if error else DONE, now, now + self.limits.keep_hours * 3600, error, id, QUEUED, RUNNING)
        if self._db.execute(query, values).rowcount:  # otherwise it had ended before
            self._remove_files(id, (IMAGE,) if code is None else (IMAGE, VIDEO, THUMBNAIL))

    def remove(self, id: str) -> None:
        query = "DELETE FROM jobs WHERE id = ?"
        try:
            self._db.execute(query, (id,))
        except sqlite3.OperationalError:  # on a full disk there is room for it once the video is gone
            self._remove_files(id, (VIDEO, THUMBNAIL))
            self._db.execute(query, (id,))
        self._remove_files(id)

    def _remove_files(self, id: str, endings: Sequence[str] = (VIDEO, THUMBNAIL, IMAGE)) -> None:
        for ending in endings:
            self.path(id, ending).unlink(missing_ok=True)

    def expire(self) -> int:
        """Remove expired jobs; returns their number."""
        old = self._db.execute("SELECT id FROM jobs WHERE expires_at < ?", (time.time(),)).fetchall()
        for (id,) in old:
            self.remove(id)
        return len(old)

    def recover(self, running: Collection[str] = ()) -> None:
        """Repeat, or mark as failed, jobs that are marked as running but do not run; remove files without a job.

        running: ids of the running jobs.
        """
        for job in self._jobs("WHERE status = ?", RUNNING):
            if job.id in running:
                continue
            if job.attempts < MAX_ATTEMPTS:
                self.put_back(job.id, counted=True)
            else:
                message = f"the server stopped {job.attempts} times while it made this video; it is not tried again"
                self.finish(job.id, "interrupted", message)
        for file in self.folder.iterdir():
            match = FILE.fullmatch(file.name)
            query = "SELECT 1 FROM jobs WHERE id = ? AND status != ?"
            known = match and self._db.execute(query, (match[1], FAILED)).fetchone()
            if match and not known:
                file.unlink(missing_ok=True)


def digest_of(values: Mapping[str, Any], image: bytes | None) -> str:
    """Digest of a request."""
    text = json.dumps(values, sort_keys=True, default=str)
    return sha256(text.encode() + b"\0" + (image or b"")).hexdigest()


def _full(sentence: str, code: str) -> NoReturn:
    raise ApiError(429, sentence, code=code, headers={"Retry-After": "10"})


def _job(row: tuple) -> Job:
    number, id, owner, status, created, completed, expires, attempts, request, error = row
    values = json.loads(request)
    return Job(
        number=number, id=id, owner=owner, status=status, created_at=created, completed_at=completed,
        expires_at=expires, attempts=attempts, request=JobRequest(**values | {"size": tuple(values["size"])}),
        error=None if error is None else json.loads(error),
    )  # fmt: skip
