"""What is left of jobs after a stop, a kill and a crash in between."""

import dataclasses
import resource
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from api_case import ALICE, PROMPT, FakePool, Running, until
from PIL import Image
from test_pictures import encoded

from configs.errors import UserError
from server import job_store, jobs
from server.errors import ApiError
from server.job_store import DONE, FAILED, QUEUED, RUNNING, THUMBNAIL, VIDEO, JobLimits, JobRequest, JobStore

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
REQUEST = JobRequest(prompt=PROMPT, seconds=5, num_frames=81, size=(64, 96), seed=1)


def videos(server: Running):
    return openai.OpenAI(api_key=ALICE, base_url=f"{server.url}/v1", max_retries=0, timeout=100).videos


@pytest.fixture
def store(tmp_path):
    store = JobStore(tmp_path, JobLimits())
    yield store
    store.close()


def reopened(store: JobStore) -> JobStore:
    """As after a kill: the process is gone, and its lock with it."""
    store.close()
    return JobStore(store.folder, store.limits)


def test_jobs_and_files_survive_a_restart_and_what_ran_is_made_again(tmp_path):
    with Running(tmp_path, grace=0.1) as first:
        done = videos(first).create_and_poll(prompt=PROMPT)
        content = videos(first).download_content(done.id).read()
        first.pool.gate.clear()
        running, waiting = (videos(first).create(prompt=f"{PROMPT} {i}") for i in range(2))
        assert until(lambda: first.pool.running)
    assert not first.pool.running and first.pool.state == "stopped"
    with Running(tmp_path) as second:
        assert videos(second).download_content(done.id).read() == content
        assert until(lambda: videos(second).retrieve(waiting.id).status == "completed")
        assert videos(second).retrieve(running.id).status == "completed"
        assert [spec.prompt for spec in second.pool.specs] == [f"{PROMPT} 0", f"{PROMPT} 1"], "in the old order"


def test_a_job_that_is_nearly_done_is_finished_before_the_server_ends(tmp_path):
    with Running(tmp_path, grace=100) as first:
        first.pool.gate.clear()
        job = videos(first).create(prompt=PROMPT)
        assert until(lambda: first.pool.running)
        first.server.should_exit = True
        time.sleep(0.2)
        assert first.thread.is_alive()
        first.pool.gate.set()
    with Running(tmp_path, FakePool(workers=0)) as second:
        assert videos(second).retrieve(job.id).status == "completed"


def test_after_a_kill_a_job_is_tried_again_once_and_files_without_a_row_go(store):
    job, new = store.add("alice", REQUEST, "digest", "key 1", b"png")
    assert new and store.begin(job.id) and not store.begin(job.id)
    strangers = ["notes.mp4", "video_x.mp4", f"video_{'a' * 32}.txt"]
    for name in (*strangers, f"video_{'a' * 32}.mp4"):
        (store.folder / name).write_bytes(b"x")
    again = reopened(store)
    again.recover()
    assert again.get("alice", job.id).status == QUEUED and again.path(job.id, ".png").read_bytes() == b"png"
    assert sorted(file.name for file in again.folder.glob("*") if file.suffix in (".mp4", ".txt")) == sorted(strangers)
    assert again.begin(job.id)
    again = reopened(again)
    again.recover()
    ended = again.get("alice", job.id)
    assert ended.status == FAILED and ended.error["code"] == "interrupted" and not again.path(job.id, ".png").exists()
    assert again.add("alice", REQUEST, "digest", "key 1", None)[0].id == job.id
    with pytest.raises(ApiError, match="another request"):
        again.add("alice", REQUEST, "other digest", "key 1", None)
    again.close()


def test_what_runs_is_not_taken_for_left_over_and_what_stopped_does_not_count(store):
    one, two = (store.add("alice", REQUEST, "", None, None)[0] for _ in range(2))
    for _ in range(5):
        store.begin(one.id)
        store.put_back(one.id, counted=False)
    store.begin(one.id), store.begin(two.id)
    store.recover({one.id})
    assert [store.get("alice", job.id).status for job in (one, two)] == [RUNNING, QUEUED]
    assert store.get("alice", one.id).attempts == 1


def test_an_end_is_an_end(store):
    """A cancel or a fault that comes after the end changes nothing and removes nothing."""
    job = store.add("alice", REQUEST, "", None, None)[0]
    store.begin(job.id)
    store.path(job.id, VIDEO).write_bytes(b"video")
    store.finish(job.id)
    store.finish(job.id, "cancelled", "too late")
    store.put_back(job.id, counted=True)
    assert store.get("alice", job.id).status == DONE and store.path(job.id, VIDEO).exists()


def test_finished_jobs_expire_with_their_files(tmp_path):
    store = JobStore(tmp_path, JobLimits(keep_hours=1))
    job, waits = (store.add("alice", REQUEST, "", None, None)[0] for _ in range(2))
    store.begin(job.id)
    for ending in (VIDEO, THUMBNAIL):
        store.path(job.id, ending).write_bytes(b"x")
    store.finish(job.id)
    assert store.expire() == 0 and store.get("alice", job.id).expires_at == pytest.approx(time.time() + 3600, abs=60)
    store._db.execute("UPDATE jobs SET expires_at = ? WHERE id = ?", (time.time() - 1, job.id))
    assert store.expire() == 1 and not list(tmp_path.glob("video_*")) and store.get("alice", waits.id)
    with pytest.raises(ApiError, match="expired"):
        store.get("alice", job.id)
    store.close()


@pytest.mark.parametrize("content", [b"no database at all, but long enough to be looked at" * 30, None])
def test_a_database_that_is_not_ours_is_a_sentence(tmp_path, content):
    path = tmp_path / "jobs.sqlite"
    if content:
        path.write_bytes(content)
    else:
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE photos (name TEXT)")
    before = path.read_bytes()
    with pytest.raises(UserError, match="--jobs_folder"):
        JobStore(tmp_path, JobLimits())
    assert content is None or path.read_bytes() == before


def test_a_folder_has_one_server(store, tmp_path):
    import subprocess
    import sys

    code = "import sys; from server.job_store import *; JobStore(sys.argv[1], JobLimits())"
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "in use by another process" in ended.stderr


def test_a_disk_that_is_full_is_told_and_waited_for(tmp_path, monkeypatch, caplog):
    with Running(tmp_path) as server:
        assert videos(server).create_and_poll(prompt=PROMPT).status == "completed"
        full = sqlite3.OperationalError("database or disk is full")

        def refuse(*arguments):
            raise full

        with monkeypatch.context() as patch:
            patch.setattr(JobStore, "add", refuse)
            with pytest.raises(openai.InternalServerError, match="disk is full") as refused:
                videos(server).create(prompt=PROMPT)
            assert refused.value.status_code == 503
        with monkeypatch.context() as patch:
            patch.setattr(JobStore, "heads", refuse)
            job = videos(server).create(prompt=PROMPT)
            assert until(lambda: "tried again" in caplog.text)
        assert until(lambda: videos(server).retrieve(job.id).status == "completed")


@contextmanager
def no_file_may_grow() -> Iterator[None]:
    """For this process, as on a full disk: SQLite's log and videos alike."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def health(server: Running) -> tuple[int, dict]:
    answer = httpx.get(f"{server.url}/health")
    return answer.status_code, answer.json()


def test_a_disk_that_fills_while_a_job_runs_is_survived(tmp_path):
    """The job fails with a sentence, waiting ones wait, finished ones are there, nothing is left of what was begun."""
    with Running(tmp_path) as server:
        done = videos(server).create_and_poll(prompt=PROMPT)
        content = videos(server).download_content(done.id).read()
        server.pool.gate.clear()
        runs, waits = (videos(server).create(prompt=f"{PROMPT} {i}") for i in range(2))
        assert until(lambda: server.pool.running)
        with no_file_may_grow():
            server.pool.gate.set()
            assert until(lambda: videos(server).retrieve(runs.id).status == "failed")
            error = videos(server).retrieve(runs.id).error
            assert error.code == "storage" and error.message.startswith("the server's disk is full")
            assert until(lambda: health(server)[0] == 503)
            state = health(server)[1]
            assert state["status"] == "unwritable" and "jobs cannot be stored" in state["detail"]
            for give_work in (lambda: videos(server).create(prompt=PROMPT), lambda: videos(server).delete(waits.id)):
                with pytest.raises(openai.InternalServerError, match="cannot be stored now") as refused:
                    give_work()
                assert refused.value.status_code == 503 and refused.value.code == "storage"
            assert videos(server).download_content(done.id).read() == content
            assert [v.status for v in videos(server).list().data] == ["queued", "failed", "completed"]
            assert not server.pool.running and len(server.pool.specs) == 2
        assert until(lambda: videos(server).retrieve(waits.id).status == "completed")
        assert health(server) == (200, {"status": "ready", "workers": {"ready": 1}})
        assert videos(server).create_and_poll(prompt=PROMPT).status == "completed"
    with Running(tmp_path) as again:
        assert videos(again).retrieve(runs.id).error.code == "storage", "it was stored as soon as there was room"
        assert videos(again).delete(done.id).deleted
    kept = {waits.id, videos_of(tmp_path)[-1]}
    assert {path.stem for path in tmp_path.glob("video_*")} == kept and not list(tmp_path.glob(".partial*"))


def videos_of(folder: Path) -> list[str]:
    """Ids of the finished jobs, oldest first."""
    store = JobStore(folder, JobLimits())
    jobs, _ = store.page("alice", None, 100, False)
    store.close()
    return [job.id for job in jobs if job.status == DONE]


def test_a_table_that_could_not_be_written_can_be_written_again(store):
    """Whether SQLite has rolled back by itself or not; nothing is left of what was not taken."""
    first = store.add("alice", REQUEST, "", None, None)[0]
    for image in (None, bytes(100)):
        with no_file_may_grow(), pytest.raises((sqlite3.Error, UserError)):
            store.add("alice", REQUEST, "", None, image)
    assert store.add("alice", REQUEST, "", None, bytes(100))[1]
    assert len(store.page("alice", None, 9, False)[0]) == 2 and len(list(store.folder.glob("video_*"))) == 1
    store.begin(first.id)
    for ending in (VIDEO, THUMBNAIL):
        store.path(first.id, ending).write_bytes(b"x")
    store.finish(first.id)
    with no_file_may_grow(), pytest.raises(sqlite3.Error):
        store.remove(first.id)
    assert not store.path(first.id, VIDEO).exists(), "to make room"
    store.remove(first.id)
    with pytest.raises(ApiError, match="deleted"):
        store.get("alice", first.id)


def test_jobs_are_not_begun_where_hardly_any_room_is_left(tmp_path, monkeypatch):
    free = [10**9]
    monkeypatch.setattr(job_store, "free_space", lambda folder: free[0])
    monkeypatch.setattr(jobs, "LOOK_AT_DISK_SECONDS", 0.0)
    with Running(tmp_path) as server:
        server.pool.gate.clear()
        one, two = (videos(server).create(prompt=PROMPT) for _ in range(2))
        assert until(lambda: server.pool.running)
        free[0] = 1_000_000
        assert until(lambda: health(server)[1]["status"] == "unwritable")
        assert "the disk is full: 1 MB are free" in health(server)[1]["detail"]
        with pytest.raises(openai.InternalServerError, match="the disk is full: 1 MB are free"):
            videos(server).create(prompt=PROMPT)
        server.pool.gate.set()
        assert until(lambda: videos(server).retrieve(one.id).status == "completed")
        assert videos(server).retrieve(two.id).status == "queued"
        free[0] = 10**9
        assert until(lambda: videos(server).retrieve(two.id).status == "completed")
        assert health(server)[0] == 200


def test_a_server_starts_on_a_full_disk_and_goes_on_when_there_is_room(tmp_path):
    store = JobStore(tmp_path, JobLimits())
    job = store.add("alice", REQUEST, "", None, None)[0]
    store.begin(job.id)
    with no_file_may_grow():
        with Running(tmp_path, store=store) as server:
            assert until(lambda: health(server)[1]["status"] == "unwritable")
            assert videos(server).retrieve(job.id).status == "in_progress"
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
            assert until(lambda: videos(server).retrieve(job.id).status == "completed")


def test_an_upload_needs_no_folder_for_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    noise = np.random.default_rng(0).integers(0, 256, (800, 900, 3), dtype=np.uint8)
    picture = encoded(Image.fromarray(noise))
    assert len(picture) > 2**21
    with Running(tmp_path) as server:
        job = videos(server).create(prompt=PROMPT, input_reference=picture)
        assert until(lambda: videos(server).retrieve(job.id).status == "completed")


def test_a_job_of_another_size_is_not_made_at_this_one(tmp_path):
    store = JobStore(tmp_path, JobLimits())
    old = dataclasses.replace(REQUEST, size=(480, 832))
    job = store.add("alice", old, "", None, None)[0]
    store.close()
    with Running(tmp_path) as server:
        assert until(lambda: videos(server).retrieve(job.id).status == "failed")
        assert "96x64" in videos(server).retrieve(job.id).error.message and not server.pool.specs
