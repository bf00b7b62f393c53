"""Videos that grow: writers, stories, endless streams to a pipe."""

import io
import json
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import ROOT

from configs.errors import UserError
from configs.load import load_config
from pipeline.live import plan_live
from pipeline.story import Story, holds_stories, latent_frame_at, read_stories
from utils.video import read_video
from utils.video_live import LiveWriter

A, B, C = "a red circle moves right", "a blue square moves up", "a green triangle moves left"


def numbered(n: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames that say their own number in grey."""
    return np.stack([np.full((height, width, 3), 20 + 3 * i, np.uint8) for i in range(n)])


def test_a_fragmented_file_plays_though_its_writer_was_killed(tmp_path):
    code = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}, {str(Path(__file__).parent)!r}]
from test_live import numbered
from utils.video_live import LiveWriter
writer = LiveWriter("dead.mp4", 4, (32, 48)).__enter__()
writer.write(numbered(30))
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == -9
    frames = read_video(tmp_path / "dead.mp4")
    assert len(frames) >= 24, "all but the last fragment"
    assert np.abs(frames.mean((1, 2, 3)) - numbered(30)[: len(frames)].mean((1, 2, 3))).max() < 4


@pytest.mark.parametrize("kind", ["fmp4", "y4m"])
def test_what_is_written_to_a_pipe_is_what_is_read(kind):
    out, frames = io.BytesIO(), numbered(20)
    out.seekable = lambda: False
    with LiveWriter(out, 16, (32, 48), kind) as writer:
        writer.write(frames[:9])
        assert len(out.getvalue()) > 100, "it is there at once"
        writer.write(frames[9:])
    out.seek(0)
    with av.open(io.BytesIO(out.getvalue()), format="mp4" if kind == "fmp4" else "yuv4mpegpipe") as file:
        assert file.streams.video[0].average_rate == 16
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    assert read.shape == frames.shape
    assert np.abs(read.mean((1, 2, 3)) - frames.mean((1, 2, 3))).max() < 4


@pytest.mark.parametrize("size, red, blue", [((32, 48), 0.299, 0.114), ((720, 1280), 0.2126, 0.0722)])
def test_y4m_has_the_colours_that_players_assume(size, red, blue):
    """A y4m header names no matrix. BT.601 is assumed up to 576 lines, as for DVDs, and BT.709 above."""
    out, colour = io.BytesIO(), (200, 30, 60)
    with LiveWriter(out, 16, size, "y4m") as writer:
        writer.write(np.full((1, *size, 3), colour, np.uint8))
    planes = np.frombuffer(out.getvalue().split(b"FRAME\n", 1)[1], np.uint8)
    pixels = size[0] * size[1]
    y, u, v = (float(np.median(part)) for part in np.split(planes, [pixels, pixels * 5 // 4]))
    y, u, v = (y - 16) / 219, (u - 128) / 224, (v - 128) / 224
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    g = (y - red * r - blue * b) / (1 - red - blue)
    assert np.abs(np.array([r, g, b]) * 255 - colour).max() < 3


def test_raw_is_the_pixels():
    out = io.BytesIO()
    with LiveWriter(out, 16, (32, 48), "raw") as writer:
        writer.write(numbered(3))
    assert out.getvalue() == numbered(3).tobytes()


def write(path: Path, *lines) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_both_formats_of_a_story(tmp_path):
    path = write(tmp_path / "s.jsonl", {"prompts": [A, B, C]}, {"prompts": [A, B], "switch_frame_indices": 6})
    with pytest.raises(UserError, match="entry 2 has 1|entry 1 has 1"):
        read_stories(path, 16, 21, indices="9")
    write(path, {"prompts": [A, B, C]}, {"prompts": [A, B, C], "switch_frame_indices": "6, 13"})
    assert read_stories(path, 16, 21) == [Story((A, B, C), (0, 7, 14)), Story((A, B, C), (0, 6, 13))]
    assert read_stories(path, 16, 21)[1].chunk_prompts(3) == {0: A, 2: B, 5: C}
    write(path, {"at": 0, "prompt": A}, {"at": 2.0, "prompt": B})
    assert read_stories(path, 16, 21) == [Story((A, B), (0, 9))]


def test_what_holds_stories_says_the_content(tmp_path):
    story = {"prompts": [A, B], "switch_frame_indices": "12"}
    for name in ("s.jsonl", "S.JSONL", "s.txt", "s.json"):
        assert holds_stories(write(tmp_path / name, story))
    assert read_stories(write(tmp_path / "s.json", json.dumps([story, story], indent=1)), 16, 21)[1].frames == (0, 12)
    assert not holds_stories(write(tmp_path / "p.jsonl", {"prompt": A}, {"prompt": B}))
    assert not holds_stories(write(tmp_path / "p.txt", A))


def test_seconds_are_latent_frames_by_where_their_pixels_begin():
    begins = [0] + [(4 * f - 3) / 16 for f in range(1, 40)]
    for f, seconds in enumerate(begins):
        assert latent_frame_at(seconds, 16) == f
        assert latent_frame_at(seconds + 0.01, 16) == f + 1
    assert latent_frame_at(-0.01, 16) < 0


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["not json"], "not valid JSON"),
        (["[1]"], "is no story"),
        ([{"prompts": []}], "no list of texts"),
        ([{"prompts": [A, 3]}], "no list of texts"),
        ([{"prompts": [A, "  "]}], "is empty"),
        ([{"prompts": [A, B], "switch_frame_indices": "x"}], "no list of latent frames"),
        ([{"prompts": [A, B], "switch_frame_indices": "30"}], "beyond the end"),
        ([{"prompts": [A, B], "switch_frame_indices": "-3"}], "is negative"),
        ([{"prompts": [A, B], "switch_frame_indices": "3, 6"}], "for 2 prompts"),
        ([{"prompts": [A, B, C], "switch_frame_indices": "6, 6"}], "does not come after"),
        ([{"at": 0, "prompt": A}, {"at": -2, "prompt": B}], "is negative"),
        ([{"at": 0, "prompt": A}, {"at": 99, "prompt": B}], "beyond the end"),
        ([{"at": 1, "prompt": A}], "from 0 on"),
        ([{"at": "soon", "prompt": A}], "no number of seconds"),
        (['{"at": NaN, "prompt": "a"}'], "NaN is no number"),
        ([{"at": True, "prompt": A}], "no number of seconds"),
        ([{"prompt": A}], "is no story"),
        (["[]"], "holds no story"),
        ([{"at": 0, "prompt": 3}], "is no text"),
        ([{"at": 0, "prompt": A}, {"prompts": [A]}], "mixes lines"),
    ],
)
def test_a_bad_story_is_refused_in_one_sentence(tmp_path, lines, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        read_stories(write(tmp_path / "s.jsonl", *lines), 16, 21)
    assert "s.jsonl" in str(error.value) and "\n" not in str(error.value)


def run(tiny_assets, folder, *arguments, **options):
    command = [sys.executable, str(ROOT / "inference.py"), "--config_path", str(tiny_assets / "tiny.yaml"), *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_an_endless_stream_flows_until_its_reader_goes(tiny_assets, tmp_path):
    arguments = ("--num_output_frames", "0", "--format", "raw", "--prompt", A)
    process = run(tiny_assets, tmp_path, *arguments)
    chunks = process.stdout.read((9 + 12 * 4) * 32 * 48 * 3)
    process.stdout.close()
    assert process.wait(300) == 0, process.stderr.read()
    assert len(chunks) == (9 + 12 * 4) * 32 * 48 * 3
    assert not list(tmp_path.iterdir())


def test_a_story_becomes_a_growing_file_and_its_record(tiny_assets, tmp_path):
    story = write(tmp_path / "story.jsonl", {"at": 0, "prompt": A}, {"at": 0.5, "prompt": B})
    process = run(tiny_assets, tmp_path, "--data_path", str(story), "--output", "out.mp4")
    assert process.wait(300) == 0, process.stderr.read()
    assert read_video(tmp_path / "out.mp4").shape == (21, 32, 48, 3)
    record = json.loads((tmp_path / "out.json").read_text())
    assert [part["prompt"] for part in record["story"]] == [A, B] and record["frames"] == 21


@pytest.mark.parametrize(
    ("prompts", "output", "sentence"),
    [([A], "out.avi", "no known ending"), ([A, B], "out.mp4", "holds one video"), ([A], "/dev/null/x.mp4", None)],
)
def test_an_output_that_cannot_be_is_refused(tiny_assets, prompts, output, sentence):
    config = load_config(tiny_assets / "tiny.yaml")
    with pytest.raises(UserError, match=sentence):
        (job,) = plan_live(config, prompts, True, output, None)
        LiveWriter(job.target, 16, (32, 48), job.kind).__enter__()
