"""Videos that grow: writers, stories, endless streams to a pipe."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_inference_cli import cli  # noqa: F401

from configs.errors import UserError
from configs.load import load_config
from pipeline import DiagonalPipeline, outputs
from pipeline.cli import parse
from pipeline.plan import make_plan
from pipeline.story import Story, holds_stories, latent_frame_at, planned_stories, read_stories
from utils.video import read_video
from utils.video_live import LiveWriter

pytestmark = pytest.mark.slow

A, B, C = "a red circle moves right", "a blue square moves up", "a green triangle moves left"


def numbered(n: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames that say their own number in grey."""
    return np.stack([np.full((height, width, 3), 20 + 3 * i, np.uint8) for i in range(n)])


def test_a_fragmented_file_plays_though_its_writer_was_killed(tmp_path):
    np.save(tmp_path / "frames.npy", numbered(30))
    code = f"""
import os, sys
import numpy as np
sys.path.insert(0, {str(ROOT)!r})
from utils.video_live import LiveWriter
writer = LiveWriter("dead.mp4", 4, (32, 48)).__enter__()
writer.write(np.load("frames.npy"))
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


@pytest.mark.parametrize("kind", ["raw", "y4m"])
def test_a_frame_that_ctrl_c_cut_is_taken_away(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    with LiveWriter(path, 16, (32, 48), kind) as writer:
        writer.write(numbered(3))
        writer._out.write(b"FRAME\n half of one")
    assert writer.frames_written == 3
    length = path.stat().st_size - (len(path.read_bytes().partition(b"\n")[0]) + 1 if kind == "y4m" else 0)
    assert length == 3 * (32 * 48 * 3 if kind == "raw" else 6 + 32 * 48 * 3 // 2)


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


@pytest.mark.parametrize("text", ["", A, {"at": 0, "prompt": A}])
def test_switch_frames_without_prompts_to_switch_to_are_refused(tiny_assets, tmp_path, text):
    file = [f"inference.prompts={write(tmp_path / 'p.txt', text)}"] if text else []
    config = load_config(tiny_assets / "tiny.yaml", ["inference.switch_frame_indices='6'", *file])
    with pytest.raises(UserError, match="switch_frame_indices=6 has no effect"):
        make_plan(config, None if text else [A, B])


def test_a_prompt_that_no_chunk_would_show_is_not_lost_in_silence(tiny_assets, tmp_path, caplog):
    def plan(*frames: int):
        line = {"prompts": [A, B, C][: len(frames) + 1], "switch_frame_indices": [*frames]}
        path = write(tmp_path / "s.jsonl", line)
        config = load_config(tiny_assets / "tiny.yaml", [f"inference.prompts={path}", "video.num_latent_frames=9"])
        return planned_stories(config)

    assert plan(3, 6) and not caplog.text
    with pytest.raises(UserError, match="entry 1: the switch at latent frame 7 lies in the last chunk"):
        plan(3, 7)
    assert plan(4, 6)
    assert f"entry 1: of the prompts that start with chunk 2, only the last is used, not: {B}" in caplog.text


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
        ([{"at": 0, "prompt": A}, {"at": 1e308, "prompt": B}], "no number of seconds"),
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


def run(tiny_assets, folder, *arguments):
    command = [sys.executable, str(ROOT / "inference.py"), "--config_path", str(tiny_assets / "tiny.yaml"), *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_an_endless_stream_flows_until_its_reader_goes(tiny_assets, tmp_path):
    arguments = ("--num_output_frames", "0", "--format", "raw", "--prompt", A)
    process = run(tiny_assets, tmp_path, *arguments)
    chunks = process.stdout.read((9 + 12 * 4) * 32 * 48 * 3)
    process.stdout.close()
    assert process.wait(300) == 0, process.stderr.read()
    assert len(chunks) == (9 + 12 * 4) * 32 * 48 * 3
    assert not list(tmp_path.iterdir())


@pytest.fixture
def story(tmp_path) -> Path:
    return write(tmp_path / "story.jsonl", {"at": 0, "prompt": A}, {"at": 0.5, "prompt": B})


def videos(folder: Path, suffix: str = ".mp4") -> list[Path]:
    return sorted(folder.glob(f"*{suffix}"))


def test_a_story_is_made_as_clips_are(cli, tmp_path, story, capsys):  # noqa: F811
    told = ["--data_path", str(story), "--output_folder", "out"]
    assert cli(*told, "--dry_run") == 0
    said = capsys.readouterr().out
    assert cli(*told) == 0
    (video,) = videos(tmp_path / "out")
    assert f"{Path('out') / video.name}  seed 0" in said, "--dry_run told the name"
    assert read_video(video).shape == (21, 32, 48, 3) and video.with_suffix(".png").exists()
    record = json.loads(video.with_suffix(".json").read_text())
    assert [(part["prompt"], part["seconds"]) for part in record["story"]] == [(A, 0), (B, 9 / 16)]
    assert record["frames"] == 21
    assert record["video"] == video.name and record["weights_sha256"]["student"] and record["timings_s"]["chunks"]
    before = video.stat().st_mtime_ns
    capsys.readouterr()
    assert cli(*told) == 0 and "1 video already there" in capsys.readouterr().out
    assert video.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "change", [["--num_output_frames", "9"], ["--seed", "1"], ["video.width=64"], ["inference.precision=bfloat16"],
               ["student"], ["stream.switch=cut"], ["schedule.steps=1"], ["at"]],
)  # fmt: skip
def test_another_story_has_another_name(tiny_assets, tmp_path, story, change):
    """Whatever makes its pixels others: nothing is written over, or taken for finished."""
    first = planned(tiny_assets, story)
    assert planned(tiny_assets, story) == first
    if change == ["at"]:
        write(story, {"at": 0, "prompt": A}, {"at": 0.3, "prompt": B})
        change = []
    if change == ["student"]:
        folder = Path(shutil.copytree(tiny_assets / "student", tmp_path / "student"))
        save_file({k: v * 0.9 for k, v in load_file(next(folder.glob("*.safetensors"))).items()},
                  next(folder.glob("*.safetensors")), {"format": "pt"})  # fmt: skip
        change = ["--checkpoint_path", str(folder)]
    assert planned(tiny_assets, story, *change) != first


def planned(tiny_assets, story: Path, *arguments: str) -> str:
    overrides = parse(["--data_path", str(story), *arguments]).overrides
    (job,) = make_plan(load_config(tiny_assets / "tiny.yaml", overrides)).jobs
    return job.video.name


def test_a_killed_rerun_leaves_the_earlier_story(tiny_assets, cli, tmp_path, story):  # noqa: F811
    told = ["--data_path", str(story), "--output_folder", "out", "--num_output_frames", "90000"]
    (tmp_path / "out").mkdir()
    name = planned(tiny_assets, story, "--num_output_frames", "90000")
    for suffix in (".mp4", ".png", ".json"):
        (tmp_path / "out" / name).with_suffix(suffix).write_text("whole")
    process = run(tiny_assets, tmp_path, *told, "--overwrite")
    wait_for(process, lambda: [p for p in (tmp_path / "out").glob(".partial-*.mp4") if p.stat().st_size])
    process.kill()
    assert process.wait() == -9
    assert (tmp_path / "out" / name).read_text() == "whole"
    assert cli("--prompt", A, "--num_output_frames", "3", "--output_folder", "out") == 0
    assert not list((tmp_path / "out").glob(".partial-*")), "a later run clears what it left"


def wait_for(process, seen) -> None:
    deadline = time.monotonic() + 600
    while not seen():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)


ENDLESS = ("--num_output_frames", "0", "--prompt", A, "--output")


def test_a_killed_recording_plays_and_the_whole_one_before_it_stays(tiny_assets, tmp_path):
    (tmp_path / "long.mp4").write_text("whole")
    process = run(tiny_assets, tmp_path, *ENDLESS, "long.mp4", "--overwrite")
    partial = tmp_path / "long.partial.mp4"
    wait_for(process, lambda: partial.exists() and partial.stat().st_size > 10_000)
    process.kill()
    process.wait()
    assert len(read_video(partial)) >= 9 and (tmp_path / "long.mp4").read_text() == "whole"
    record = json.loads(partial.with_suffix(".json").read_text())
    assert (record["prompt"], record["seed"], record["video"]) == (A, 0, "long.mp4")


@pytest.mark.parametrize(
    ("end", "code", "whole"), [(KeyboardInterrupt, 0, True), (SystemExit(143), 143, True), (UserError("x"), 2, False)]
)
def test_how_a_recording_ends(cli, tmp_path, monkeypatch, capsys, end, code, whole):  # noqa: F811
    """By Ctrl-C and SIGTERM it gets its name, and a line says so; what an error stopped stays partial, and so does what
    was killed."""
    stream_story = DiagonalPipeline.stream_story

    def three(*args):
        yield from islice(stream_story(*args), 3)
        raise end

    monkeypatch.setattr(DiagonalPipeline, "stream_story", three)
    (tmp_path / "long.partial.mp4").write_text("killed")
    assert cli(*ENDLESS, "long.mp4") == code
    assert capsys.readouterr().out.count("long.mp4  33 frames in ") == whole
    assert (tmp_path / "long.partial.mp4").read_text() == "killed"
    name = "long" if whole else "long.partial-2"
    assert len(read_video(tmp_path / f"{name}.mp4")) == 33
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["frames"] == (33 if whole else 0)
    names = {f"{name}.mp4", f"{name}.json", "long.partial.mp4"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_that_ends_a_stream_into_a_pipe_leaves_a_line_and_its_code(tiny_assets, tmp_path, number, code):
    process = run(tiny_assets, tmp_path, *ENDLESS, "-", "--format", "raw")
    assert process.stdout.read(1000)
    process.send_signal(number)
    errors = process.communicate(timeout=300)[1].decode().splitlines()
    assert process.returncode == code and errors[-1].startswith("standard output  ") and " frames in " in errors[-1]


def test_two_recordings_of_one_name_are_two_files(cli, tmp_path, monkeypatch):  # noqa: F811
    """The name is of what ended first; the other keeps its partial name, with a JSON that says so."""
    stream_story = DiagonalPipeline.stream_story

    def two(pipe, story, *args):
        made = stream_story(pipe, story, *args)
        yield next(made)
        if story.prompts[0] == A:
            other.append(cli("--num_output_frames", "0", "--prompt", B, "--output", "long.mp4"))
        yield next(made)
        raise KeyboardInterrupt

    other = []
    monkeypatch.setattr(DiagonalPipeline, "stream_story", two)
    assert cli(*ENDLESS, "long.mp4") == 0 and other == [0]
    assert {path.stem for path in tmp_path.iterdir()} == {"long", "long.partial"}
    for stem, prompt in (("long", B), ("long.partial", A)):
        record = json.loads((tmp_path / f"{stem}.json").read_text())
        assert (record["prompt"], record["video"], record["frames"]) == (prompt, f"{stem}.mp4", 21)
        assert len(read_video(tmp_path / f"{stem}.mp4")) == 21


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file that this process writes grows beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["long.mp4", "long.y4m", "long.raw"])
def test_a_recording_ends_well_where_the_disk_is_full(cli, tmp_path, capsys, name):  # noqa: F811
    with files_of_at_most(100_000):
        assert cli(*ENDLESS, name) == 2
    errors = capsys.readouterr().err
    said = [line for line in errors.splitlines() if not line.startswith("warning: ")]
    assert len(said) == 1, errors
    assert f"error: the disk of {name} is full; the video ends there, whole" in said[0]
    frames = json.loads((tmp_path / "long.json").read_text())["frames"]
    if name.endswith("raw"):
        assert (tmp_path / name).stat().st_size == frames * 32 * 48 * 3 > 0
    else:
        assert len(read_video(tmp_path / name)) == frames > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "long.json"])


@pytest.mark.parametrize("name", ["one.mp4", "one.gif", "one.y4m"])
def test_a_video_that_the_disk_cannot_hold_leaves_nothing(cli, tmp_path, capsys, name):  # noqa: F811
    with files_of_at_most(1500):
        assert cli("--prompt", A, "--output", name) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {name} cannot be written (File too large); make room there" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("output", "maker"),
    [
        ([], "clip_sheet"),
        ([], "clip_metadata"),
        (["--output", "videos/one.mp4"], "clip_metadata"),
        (["--output", "videos/one.gif"], "clip_metadata"),
        (["--output", "videos/one.y4m"], "clip_metadata"),
    ],
)
def test_a_disk_that_fills_behind_the_video_leaves_none_of_its_files(cli, tmp_path, monkeypatch, capsys, output, maker):  # noqa: F811
    """The contact sheet or the JSON does not fit any more. What was there before stays as it was."""
    asked = ["--prompt", A, "--num_output_frames", "3", *output]
    assert cli(*asked) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "videos").iterdir()}
    make = vars(outputs)[maker]

    def full(*args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return make(*args)

    monkeypatch.setattr(outputs, maker, full)
    for there in (before, {}):
        capsys.readouterr()
        with files_of_at_most(1_000_000):
            assert cli(*asked, "--overwrite") == 2
        said = capsys.readouterr()
        (video,) = [path for path in before if path.suffix not in (".png", ".json")]
        assert f"error: videos/{video.name} cannot be written (File too large); make room there" in said.err
        assert " frames in " not in said.out
        assert {path: path.read_bytes() for path in (tmp_path / "videos").iterdir()} == there
        for path in there:
            path.unlink()


@pytest.mark.parametrize(
    ("arguments", "free", "fits"),
    [
        (["--num_samples", "3", "--output_folder", "out"], 10_000, False),
        (["--num_samples", "3", "--output_folder", "out"], 40_000, True),
        (["--output", "one.raw"], 21 * 32 * 48 * 3, False),
        (["--output", "one.raw"], 21 * 32 * 48 * 3 + 4_000, True),
        (["--output", "one.y4m"], 21 * 32 * 48, False),
        (["--output", "-", "--format", "raw"], 0, True),
        (["--output", "long.mp4", "--num_output_frames", "0"], 20_000, True),
    ],
)
def test_a_disk_that_cannot_hold_it_is_found_before_anything_is_loaded(
    cli, tmp_path, monkeypatch, capsys, arguments, free, fits  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr("pipeline.plan.free_space", lambda folder: free)
    assert cli("--prompt", A, "--dry_run", *arguments) == (0 if fits else 2)
    assert ("need" in capsys.readouterr().err) != fits
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--num_output_frames", "0", "--output", "-"], ["--output", "one.mp4"]])
def test_a_configured_folder_that_is_not_the_place_is_said(cli, tiny_assets, tmp_path, capsys, arguments):  # noqa: F811
    assert cli("--prompt", A, "--dry_run", *arguments) == 0
    assert "no effect" not in capsys.readouterr().out
    (tmp_path / "own.yaml").write_text(f"base: {tiny_assets / 'tiny.yaml'}\ninference: {{output_folder: mine}}\n")
    for more, said in ((arguments, True), ([], False)):
        assert cli("--config_path", "own.yaml", "--prompt", A, "--dry_run", *more) == 0
        assert ("; inference.output_folder=mine has no effect" in capsys.readouterr().out) == said


def test_an_output_never_takes_the_place_of_something_else(cli, tmp_path, capsys):  # noqa: F811
    (tmp_path / "config.json").write_text('{"precious": 1}')
    (tmp_path / "old.mp4").write_text("precious")
    (tmp_path / "folder.mp4").mkdir()
    one = ["--prompt", A, "--num_output_frames", "3", "--output"]
    for name, more, words in (
        ("config.mp4", [], "config.json, which is not of such a video"),
        ("config.mp4", ["--overwrite"], "config.json, which is not of such a video"),
        ("old.mp4", [], "is there and is another video"),
        ("folder.mp4", [], "is a folder"),
        ("one.json", ["--format", "raw"], "is where the video's own JSON goes"),
        (".", [], "is a folder"),
        ("x" * 252 + ".mp4", [], "too long"),
    ):
        assert cli(*one, name, *more) == 2
        assert words in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == '{"precious": 1}'
    assert (tmp_path / "old.mp4").read_text() == "precious"
    assert cli(*one, "old.mp4", "--overwrite") == 0 and len(read_video(tmp_path / "old.mp4")) == 9
    capsys.readouterr()
    assert cli(*one, "old.mp4") == 0
    assert "0 videos to make in old.mp4 on cpu (float32); 1 video already there" in capsys.readouterr().out
    assert cli(*one, "old.gif", "--overwrite") == 2
    assert "old.json, which is of old.mp4; choose another name" in capsys.readouterr().err
    assert cli(*one, "old.mp4", "--seed", "1") == 2, "another video"
    assert cli(*one, "old.mp4", "--seed", "1", "--overwrite") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "folder.mp4", "old.json", "old.mp4"]


@pytest.mark.parametrize("name", ["a.webp", "a.y4m"])
def test_an_output_is_what_its_ending_says(cli, tmp_path, name):  # noqa: F811
    assert cli("--prompt", A, "--num_output_frames", "3", "--output", name) == 0
    if name != "a.webp":  # which libav does not read
        assert read_video(tmp_path / name).shape == (9, 32, 48, 3)
    assert json.loads((tmp_path / "a.json").read_text())["video"] == name


@pytest.mark.parametrize(
    ("prompts", "output", "endless", "sentence"),
    [
        ([A], "out.avi", True, "no known ending"),
        ([A], "out.gif", True, "no known ending"),
        ([A], "out.avi", False, "no known ending"),
        ([A, B], "out.mp4", True, "holds one video"),
        ([A], "/dev/null/x.mp4", True, "--output"),
        ([A], "/dev/null/x.mp4", False, "--output"),
    ],
)
def test_an_output_that_cannot_be_is_refused(tiny_assets, prompts, output, endless, sentence):
    config = load_config(tiny_assets / "tiny.yaml")
    with pytest.raises(UserError, match=sentence):
        make_plan(config, prompts, endless=endless, output=output)


@pytest.mark.parametrize(("output", "kind"), [("a.mp4", "y4m"), ("a.gif", "fmp4"), ("a.rgb", "y4m"), ("a.y4m", "raw")])
def test_an_output_and_a_format_that_differ_are_refused(tiny_assets, output, kind):
    config = load_config(tiny_assets / "tiny.yaml")
    with pytest.raises(UserError, match=f"--output={output} .*--format={kind}"):
        make_plan(config, [A], output=output, kind=kind)
    for name in ("a.bin", "a.mp4" if kind == "fmp4" else f"a.{kind}"):
        assert make_plan(config, [A], output=name, kind=kind).jobs[0].kind == kind


def test_a_device_or_pipe_as_output_is_written_to_and_not_replaced(cli, tmp_path):  # noqa: F811
    os.mkfifo(tmp_path / "pipe.raw")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe.raw").read_bytes()), daemon=True)
    reader.start()
    assert cli("--prompt", A, "--num_output_frames", "3", "--output", "pipe.raw") == 0
    reader.join(20)
    assert len(read[0]) == 9 * 32 * 48 * 3
    assert [path.name for path in tmp_path.iterdir()] == ["pipe.raw"] and (tmp_path / "pipe.raw").is_fifo()
