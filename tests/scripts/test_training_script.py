"""training.sh on several ranks: what it does with signals, and that failures stay failures."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import SEVERAL_RANKS

from configs.load import CHECKOUT
from utils.logs import read_jsonl

pytestmark = [SEVERAL_RANKS, pytest.mark.slow]
SETTINGS = (
    "device=cpu", "training.sharding=full", "training.steps=100000", "training.global_batch=2",
    "training.micro_batch=1", "training.validation_clips=0", "training.image_start=0", "training.log_every=1",
    "training.checkpoint_every=0", "training.distill.critic_warmup=0", "training.bank_clips=8",
    "video={height: 32, width: 48, num_latent_frames: 6}", "training.timeout_s=900",
    "training.init={student: random:tiny/1, teacher: random:tiny/1, critic: random:tiny/1}",
)  # fmt: skip


@contextmanager
def started(logdir: Path, *settings: str) -> Iterator[subprocess.Popen]:
    """Two ranks, in a session of their own as a terminal's foreground is."""
    given = {"CUDA_VISIBLE_DEVICES": "0,1", "DIAGONAL_NO_VENV": "1", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(CHECKOUT / "training.sh"), "--logdir", str(logdir), "--disable-wandb", *SETTINGS, *settings]
    with (logdir.parent / "said.txt").open("wb") as said:
        process = subprocess.Popen(
            command, env=os.environ | given, stdout=said, stderr=said, start_new_session=True, cwd=logdir.parent
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(300)


def steps(logdir: Path) -> list[int]:
    file = logdir / "metrics.jsonl"
    return [row["step"] for row in read_jsonl(file) if "critic_loss" in row] if file.exists() else []


def wait_for(condition, process: subprocess.Popen, seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.poll()
        time.sleep(0.1)


@pytest.mark.parametrize("who", ["the script", "everybody in the foreground"])
def test_a_signal_saves_and_ends_well(tmp_path, who):
    logdir = tmp_path / "run"
    with started(logdir) as process:
        wait_for(lambda: len(steps(logdir)) > 1, process)
        if who == "the script":
            process.send_signal(signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGINT)
        assert process.wait(300) == 0, (tmp_path / "said.txt").read_text()
    (folder,) = logdir.glob("checkpoint_*")
    assert int(folder.name.rpartition("_")[2]) >= steps(logdir)[-1] - 1 > 0
    assert "the same command resumes" in (tmp_path / "said.txt").read_text()


def test_bad_input_is_one_sentence_and_no_success(tmp_path):
    with started(tmp_path / "run", "training.global_batch=3", "training.micro_batch=2") as process:
        assert process.wait(600) != 0
    said = (tmp_path / "said.txt").read_text()
    assert len(set(re.findall(r"error: training\.global_batch=3 .*", said))) == 1, said
