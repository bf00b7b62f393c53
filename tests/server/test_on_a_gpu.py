"""serve.py with a worker on a GPU: streams through the client, what they leave, adapters by name, the encoder."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from api_case import PROMPT, until
from conftest import ROOT, reserved_port
from lora_case import visible_lora

from client import LiveClient
from server.encoding import HARDWARE, find_encoder
from utils.video import read_video

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def loras(tiny_assets, tiny_student) -> dict[str, Path]:
    return {
        name: visible_lora(tiny_student.model, tiny_assets / f"{name}.pt", seed)
        for seed, name in enumerate(("cartoon", "noir"))
    }


@pytest.fixture(scope="module")
def url(tiny_assets, tmp_path_factory, loras):
    held = reserved_port()
    port = held.getsockname()[1]
    command = [sys.executable, "serve.py", "--config_path", str(tiny_assets / "tiny.yaml"), "--port", str(port)]
    folder = tmp_path_factory.mktemp("jobs")
    given = [f"--lora={name}={path}" for name, path in loras.items()]
    log = folder / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--jobs_folder", str(folder), "--workers", "1", "--streams", "4", *given, f"device={DEVICE}"],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return httpx.get(f"{url}/health").json()["status"] == "ready"
        except httpx.HTTPError:
            return False

    try:
        assert until(ready, 300), log.read_text()
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0 and "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()
        held.close()


def gpu_bytes(url: str) -> int:
    return int(float(re.search(r"diagonal_gpu_memory_bytes{.*} (\S+)", httpx.get(f"{url}/metrics").text)[1]))


def test_streams_play_and_leave_the_memory_as_it_was(url):
    async def play(seed: int) -> tuple[str, list[int]]:
        async with LiveClient(url) as live:
            await live.open(PROMPT, seed=seed, seconds=4)
            chunks = [chunk async for chunk in live]
            return live.hello["device"], [chunk.frame for chunk in chunks]

    async def rounds(count: int) -> None:
        for seed in range(count):
            found = await asyncio.gather(*(play(seed) for _ in range(3)))
            assert all(device.startswith(DEVICE) for device, _ in found)
            assert all(frames == [0, *range(9, 64, 12)] for _, frames in found)

    asyncio.run(rounds(2))
    before = gpu_bytes(url)
    asyncio.run(rounds(5))
    assert before <= gpu_bytes(url) <= 1.02 * before + 2**20, "sessions are used again"
    assert until(lambda: 'diagonal_live_sessions{worker="0"} 0.0' in httpx.get(f"{url}/metrics").text)


def test_adapters_are_switched_by_name(url, tmp_path):
    """Each changes the video, and none leaves anything behind."""
    videos = {}
    for lora in (None, "cartoon", "noir", None, "noir", "cartoon"):
        asked = {"prompt": PROMPT, "seconds": 1, "seed": 5} | ({"lora": lora} if lora else {})
        job = httpx.post(f"{url}/v1/videos", json=asked).json()
        state = f"{url}/v1/videos/{job['id']}"
        assert until(lambda state=state: httpx.get(state).json()["status"] == "completed", 60), httpx.get(state).text
        (tmp_path / "x.mp4").write_bytes(httpx.get(f"{state}/content").content)
        frames = read_video(tmp_path / "x.mp4").astype(int)
        assert np.abs(videos.setdefault(lora, frames) - frames).mean() < 0.5, f"{lora} is not what it was"
    assert all(np.abs(a - b).mean() > 2 for a, b in combinations(videos.values(), 2))


def test_an_encoder_is_found_in_any_case(caplog):
    """Data-centre GPUs have none for H.264: then it is x264, and nothing is said."""
    find_encoder.cache_clear()
    name = find_encoder(16, (480, 832))
    print(f"video is encoded by {name}")
    assert name in (*HARDWARE, "libx264") and (name != "libx264" or not caplog.records)
