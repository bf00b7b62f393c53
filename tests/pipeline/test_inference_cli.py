"""inference.py as a person runs it, on random weights."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, alike
from PIL import Image

import inference
from configs.load import load_config
from pipeline import DiagonalPipeline
from pipeline.cli import parse
from pipeline.plan import make_plan
from utils import exits
from utils.distributed import Ranks
from utils.seeds import sample_seed
from utils.video import read_video

pytestmark = pytest.mark.slow

PROMPT = "a red circle moves right"
STRANGE = ["a/b\\c ../../x", "🚀🎉", "two\nlines", "x " * 5_000, "*?<>|:\"'", "-"]


@pytest.fixture
def cli(tiny_assets, tmp_path, monkeypatch):
    """Run inference.py in this process, in an empty folder: `cli("--seed", "3") -> exit code`."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> int:
        argv = ["inference.py", "--config_path", str(tiny_assets / "tiny.yaml"), *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            exits.run(inference.main)
        return stop.value.code

    before, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    torch.set_num_threads(1)
    yield run
    signal.signal(signal.SIGTERM, before)
    torch.set_num_threads(threads)


def files(folder: Path, suffix: str) -> list[Path]:
    return sorted(folder.glob(f"*{suffix}"))


def test_a_run_leaves_video_sheet_and_record(cli, tmp_path, tiny_assets, capsys):
    assert cli() == 0
    out = tmp_path / "videos"
    assert [len(files(out, suffix)) for suffix in (".mp4", ".png", ".json", "")] == [2, 2, 2, 6]
    (video,) = out.glob("a_red_circle_moves_right-0-*.mp4")
    assert read_video(video).shape == (21, 32, 48, 3)
    DiagonalPipeline.from_config(tiny_assets / "tiny.yaml")(PROMPT, seed=0).videos[0].save("api.mp4")
    assert alike(read_video(video), read_video("api.mp4"))
    sheet = Image.open(video.with_suffix(".png"))
    assert sheet.width == 9 * 48 and sheet.height > 3 * 32, "and a head and numbers"
    record = json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))
    assert (record["prompt"], record["seed"], record["sample"], record["frames"]) == (PROMPT, 0, 0, 21)
    assert record["config"]["video"]["num_latent_frames"] == 6 and record["nfe"] == 7
    assert len(record["weights_sha256"]["student"]) == 64 and set(record["weights_sha256"]) >= {"vae", "text_encoder"}
    assert record["versions"]["torch"] and record["schedule"]["rows"][0][0] == 1000
    assert "training" not in record["config"]
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (record["commit"] or "").removesuffix("-dirty") == head, "none where this is no checkout"
    assert record["timings_s"]["total"] >= record["timings_s"]["first_frames"] > 0
    said = capsys.readouterr().out
    assert str(Path("videos") / video.name) in said and " 21 frames in " in said and "total: 7 NFE" in said


def test_a_second_run_skips_what_is_finished(cli, tmp_path, capsys):
    cli("--prompt", PROMPT)
    video = files(tmp_path / "videos", ".mp4")[0]
    stamp = video.stat().st_mtime_ns
    capsys.readouterr()
    assert cli("--prompt", PROMPT) == 0
    assert video.stat().st_mtime_ns == stamp and "1 video already there" in capsys.readouterr().out
    first = read_video(video)
    assert cli("--prompt", PROMPT, "--overwrite") == 0
    assert video.stat().st_mtime_ns != stamp and alike(read_video(video), first), "the same video, made again"
    video.with_suffix(".json").unlink()  # as if killed before the record was written
    cli("--prompt", PROMPT)
    assert video.with_suffix(".json").exists()
    cli("--prompt", PROMPT, "schedule.steps=1")
    assert len(files(tmp_path / "videos", ".mp4")) == 2, "another schedule is another video"


def test_samples_and_index_names(cli, tmp_path):
    assert cli("--num_samples", "2", "--save_with_index", "--seed", "7", "--num_output_frames", "3") == 0
    names = [path.name.rsplit("-", 1)[0] for path in files(tmp_path / "videos", ".mp4")]
    assert names == ["0000-0", "0000-1", "0001-0", "0001-1"]
    records = [json.loads(path.read_text()) for path in files(tmp_path / "videos", ".json")]
    assert [record["seed"] for record in records] == [7, sample_seed(7, 1)] * 2
    assert all(record["frames"] == 9 for record in records)


def test_a_seed_of_minus_one_is_drawn_and_written_down(cli, tmp_path, capsys):
    arguments = ("--prompt", PROMPT, "--num_samples", "2", "--num_output_frames", "3")
    assert cli("--seed", "-1", *arguments) == 0
    said = capsys.readouterr().err
    drawn = int(said.split("--seed ")[1].split()[0])
    records = [json.loads(path.read_text()) for path in files(tmp_path / "videos", ".json")]
    assert {record["seed"] for record in records} == {drawn, sample_seed(drawn, 1)} and drawn >= 0
    assert all(record["config"]["seed"] == drawn for record in records)
    assert cli("--seed", str(drawn), *arguments) == 0
    assert "2 videos already there" in capsys.readouterr().out, "the same seed is the same videos"
    assert cli("seed=-1", *arguments) == 0 and len(files(tmp_path / "videos", ".json")) == 4


def test_strange_prompts_make_files_with_safe_names_of_their_own(cli, tmp_path):
    prompts = [*STRANGE, "a circle!", "a circle?", "a circle!"]  # the last is the one before the last but one again
    assert cli(*(f"--prompt={p}" for p in prompts), "--num_output_frames", "3", "--output_folder", "o") == 0
    videos = files(tmp_path / "o", ".mp4")
    assert all(len(video.name) < 100 and not set(video.name) & set("\n\\*?<>|:\"' ") for video in videos)
    records = [json.loads(video.with_suffix(".json").read_text(encoding="utf-8")) for video in videos]
    assert sorted(record["prompt"] for record in records) == sorted(set(prompts))
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


def test_print_schedule_prints_the_table_alone(cli, tmp_path, capsys):
    assert cli("--print_schedule", "schedule.steps=432") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("chunk") and lines[-1] == "total: 7 NFE for 2 chunks" and len(lines) == 4
    assert not list(tmp_path.iterdir())


def test_dry_run_checks_and_prints_and_loads_nothing(cli, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("--dry_run loads nothing")

    monkeypatch.setattr(DiagonalPipeline, "from_config", refuse)
    assert cli("--dry_run", "--seed", "5") == 0
    said = capsys.readouterr().out
    for part in ("2 videos to make", "student", " MiB", "seed: 5", "a_red_circle_moves_right-5-", "total: 7 NFE"):
        assert part in said
    assert not list(tmp_path.iterdir())


def test_profile_prints_a_table(cli, capsys):
    assert cli("--profile", "--prompt", PROMPT, "stream.context=clean", "inference.overlap=false") == 0
    lines = capsys.readouterr().out.splitlines()
    (head,) = (line for line in lines if "decode" in line)
    assert head.split() == "chunk text step 0 step 1 step 2 step 3 context decode write sum (ms)".split()
    assert [line.split()[0] for line in lines[lines.index(head) + 1 :]][:3] == ["0", "1", "all"]


@pytest.mark.parametrize("path", ["[a", "null", "12", "a: b", "a=b", "true", "é 'x\"", "{}"])
def test_paths_that_look_like_yaml_stay_paths(tiny_assets, path):
    overrides = parse(["--output_folder", path]).overrides
    assert load_config(tiny_assets / "tiny.yaml", overrides).inference.output_folder == path


def test_overrides_may_stand_anywhere():
    args = parse(["seed=1", "--prompt", "x", "video.fps=8", "--profile", "name=z"])
    assert args.prompt == ["x"] and args.overrides == ["inference.profile=true", "seed=1", "video.fps=8", "name=z"]


def start(tiny_assets: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    # a shell that runs tests in the background has them ignore SIGINT: undo that
    code = (
        "import signal, runpy, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(ROOT / "inference.py"), "--config_path", str(tiny_assets / "tiny.yaml")]
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])  # packages may be anywhere
    return subprocess.Popen(
        [*command, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_share_the_prompts_and_make_the_same_videos(cli, tiny_assets, tmp_path):
    (tmp_path / "three.txt").write_text("a red circle\na blue square\na green triangle\n")
    shared = ["--data_path", str(tmp_path / "three.txt"), "--num_output_frames", "3", "--output_folder"]
    ranks = [
        start(tiny_assets, *shared, str(tmp_path / "two"), RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2")
        for r in range(2)
    ]
    said = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert cli(*shared, str(tmp_path / "one")) == 0
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert [text.count(" frames in ") for text in said] == [2, 1] and [text.count("NFE") for text in said] == [1, 0]
    one, two = ({path.name: read_video(path) for path in files(tmp_path / f, ".mp4")} for f in ("one", "two"))
    assert len(one) == 3 and one.keys() == two.keys() and all(alike(one[name], two[name]) for name in one)
    assert not alike(*list(one.values())[:2])


def test_interrupted_runs_leave_no_half_file(tiny_assets, tmp_path):
    cases = [(tmp_path / "int", signal.SIGINT, 130, 1), (tmp_path / "term", signal.SIGTERM, 143, 0)]
    long = ["--prompt", PROMPT, "--num_output_frames", "90000", "--output_folder"]
    processes = [start(tiny_assets, *long, str(out)) for out, *_ in cases]
    for process, (out, number, code, lines) in zip(processes, cases, strict=True):
        deadline = time.monotonic() + 600
        while not list(out.glob(".partial-*")):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=300)
        assert (process.returncode, len(errors.splitlines())) == (code, lines), errors
        assert not list(out.iterdir())


def test_a_late_process_does_not_take_the_jobs_of_another(tiny_assets, tmp_path):
    """Rank 0 finishes its clip before rank 1 looks: rank 1 still makes its own, and no one's clip is lost."""
    config = load_config(tiny_assets / "tiny.yaml", [f"inference.output_folder={tmp_path}"])
    prompts = ["one", "two", "three"]
    early = make_plan(config, prompts, Ranks(0, 2, 0))
    for job in early.jobs[:1]:
        for path in (job.video, job.sheet, job.record):
            path.touch()
    late = make_plan(config, prompts, Ranks(1, 2, 1))
    assert [job.prompt for job in early.jobs] == ["one", "three"] and [job.prompt for job in late.jobs] == ["two"]
    again = make_plan(config, prompts, Ranks(0, 2, 0))
    assert [job.prompt for job in again.jobs] == ["three"] and [job.prompt for job in again.finished] == ["one"]
