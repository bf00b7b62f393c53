"""serve.py as it is started: a real front, a real worker with the tiny model, keys, jobs, a live stream, signals."""

import asyncio
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import av
import numpy as np
import openai
import pytest
from api_case import ALICE, PROMPT, FakePool, until
from conftest import ROOT, reserved_port
from lora_case import visible_lora
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

import serve
from configs.errors import UserError
from pipeline import DiagonalPipeline
from server.adapters import Adapters
from utils.video import VideoWriter

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.slow]


class Served:
    """serve.py in a process of its own."""

    def __init__(self, assets: Path, folder: Path, *options: str):
        self.held = reserved_port()
        self.port = self.held.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "serve.py", "--config_path", str(assets / "tiny.yaml"), "--port", str(self.port)]
        environ = os.environ | {"DIAGONAL_API_KEYS": f"alice {ALICE}", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [*command, "--jobs_folder", str(folder), *options], cwd=ROOT, env=environ, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.videos = openai.OpenAI(api_key=ALICE, base_url=f"{self.url}/v1", max_retries=0, timeout=100).videos

    def get(self, path: str) -> str:
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {ALICE}"})
        with urllib.request.urlopen(request, timeout=100) as answer:
            return answer.read().decode()

    def health(self) -> str:
        try:
            return json.loads(self.get("/health"))["status"]
        except OSError:
            return "no answer"

    def stop(self, number: int = signal.SIGTERM) -> str:
        """What it has said until this signal ended it."""
        self.process.send_signal(number)
        said = self.process.communicate(timeout=200)[0]
        self.held.close()
        assert self.process.returncode == 0, said
        return said


@pytest.fixture(scope="module")
def lora(tiny_assets, tiny_student):
    return visible_lora(tiny_student.model, tiny_assets / "cartoon.pt")


@pytest.fixture(scope="module")
def server(tiny_assets, tmp_path_factory, lora):
    served = Served(tiny_assets, tmp_path_factory.mktemp("jobs"), "--lora", f"cartoon={lora}", "--grace_seconds", "0")
    assert until(lambda: served.health() == "ready", 300)
    yield served
    if served.process.poll() is None:
        served.process.kill()
        served.process.communicate()


def test_an_adapter_that_is_not_served_any_more_is_a_sentence(tiny_assets):
    with pytest.raises(UserError, match="--lora cartoon=FILE"):
        Adapters(DiagonalPipeline.from_config(tiny_assets / "tiny.yaml"), {}).use("cartoon")


def decoded(content: bytes) -> np.ndarray:
    with av.open(io.BytesIO(content)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def test_a_job_is_the_video_that_inference_makes_with_and_without_an_adapter(server, tiny_assets, lora, tmp_path):
    """Before, after and between, so that what an adapter changes is gone with it."""
    made = {}
    for name in (None, "cartoon", None):
        extra = {"seed": 5} | ({"lora": name} if name else {})
        job = server.videos.create_and_poll(prompt=PROMPT, seconds="1", extra_body=extra)
        assert job.status == "completed", job.error
        content = server.videos.download_content(job.id).read()
        assert made.setdefault(name, content) == content
    for name, overrides in ((None, []), ("cartoon", [f"model.lora=[{lora}]"])):
        pipe = DiagonalPipeline.from_config(tiny_assets / "tiny.yaml", *overrides)
        frames = np.concatenate(list(pipe.stream(PROMPT, 5, 21)))
        with VideoWriter(tmp_path / "own.mp4", pipe.config.video.fps, frames.shape[1:3]) as video:
            video.write(frames)
        assert (tmp_path / "own.mp4").read_bytes() == made[name]
    assert not np.array_equal(decoded(made[None]), decoded(made["cartoon"]))


def test_a_live_stream_plays_beside_a_job_and_needs_the_key(server):
    async def play(headers: dict[str, str]) -> list[str]:
        heard = []
        async with connect(f"ws://127.0.0.1:{server.port}/v1/live", additional_headers=headers, max_size=None) as line:
            with contextlib.suppress(ConnectionClosed):
                await line.send(json.dumps({"type": "open", "id": 1, "prompt": PROMPT, "seconds": 2}))
                while "ended" not in heard:
                    data = await line.recv()
                    heard.append(json.loads(data)["type"] if isinstance(data, str) else "video")
            return heard or [line.close_reason]

    job = server.videos.create(prompt=PROMPT, seconds="10", extra_body={"lora": "cartoon"})
    heard = asyncio.run(play({"Authorization": f"Bearer {ALICE}"}))
    assert {"hello", "ack", "take", "video", "applied", "ended"} <= set(heard)
    assert asyncio.run(play({}))[0].startswith("the API key is missing")
    foreign = {"Authorization": f"Bearer {ALICE}", "Origin": "http://evil.example"}
    assert asyncio.run(play(foreign))[0].startswith("another site's page")
    assert until(lambda: server.videos.retrieve(job.id).status == "completed")
    metrics = server.get("/metrics")
    assert "diagonal_first_frame_seconds_count 1.0" in metrics and 'diagonal_workers{state="ready"} 1.0' in metrics


def test_a_stop_in_the_middle_and_a_new_start(server, tiny_assets, tmp_path):
    """Exit code 0, nothing in the log, and what ran is made by the next server."""
    folder = Path(server.process.args[server.process.args.index("--jobs_folder") + 1])
    done = server.videos.list().data[0]
    job = server.videos.create(prompt=PROMPT, seconds="30")
    assert until(lambda: server.videos.retrieve(job.id).progress > 0)
    said = server.stop()
    assert ALICE not in said and "Traceback" not in said and said.count("\n") < 20, said
    again = Served(tiny_assets, folder)
    try:
        assert until(lambda: again.health() != "no answer", 300)
        assert again.videos.retrieve(done.id).status == "completed"
        assert until(lambda: again.videos.retrieve(job.id).status == "completed", 300)
        assert len(decoded(again.videos.download_content(job.id).read())) == job.model_extra["frames"]
        assert "Traceback" not in again.stop(signal.SIGHUP)
    finally:
        again.process.kill()
    assert not [file for file in folder.iterdir() if file.name.startswith(".partial")]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--visitors", "0"], "--visitors=0 "), (["--idle_seconds", "nan"], "idle_seconds: invalid"),
        (["--max_seconds", "-1"], "--max_seconds=-1.0 "), (["--port", "99999"], "--port=99999 "),
        (["--host", "0.0.0.0"], "--keys_file"), (["--allow_origin", "https://a.example"], "--keys_file"),
        (["--keys_file", "/nonexistent"], "does not exist"), (["--workers", "65"], "--workers=65"),
        (["--queue", "0"], "--queue=0"), (["--keep_hours", "0"], "--keep_hours=0"),
        (["--grace_seconds", "-1"], "grace"),
        (["--lora", "cartoon"], "NAME=FILE"), (["--lora", "a=b", "--lora", "a=c"], "--lora=a=c has the name"),
        (["--lora", "a=/gone.pt"], "--lora a=/gone.pt does not exist"), (["model.vae=/gone"], "model.vae=/gone "),
        (["--jobs_folder", "/dev/null"], "--jobs_folder"), (["video.fsp=3"], "video.fsp"),
        (["--token", "secret"], "--token"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_sentence(arguments, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["serve.py", "--jobs_folder", str(tmp_path), *arguments])
    monkeypatch.setattr("uvicorn.Server.run", lambda *ignored: pytest.fail("it was started"))
    with pytest.raises(SystemExit) as stop:
        serve.exits.run(serve.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1


def test_a_model_that_cannot_be_loaded_ends_the_server_with_a_sentence(monkeypatch, capsys, tmp_path):
    class Faulty(FakePool):
        def __init__(self, *ignored):
            super().__init__()

        async def start(self) -> None:
            raise UserError("model.student=x does not exist; fetch it")

    monkeypatch.setattr("server.command.WorkerPool", Faulty)
    monkeypatch.setattr("sys.argv", ["serve.py", "--jobs_folder", str(tmp_path), "--port", "0"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.raises(SystemExit) as stop:
            serve.exits.run(serve.main)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: model.student=x does not exist; fetch it\n"
