"""Everything that a person can get wrong gives one sentence and exit code 2, before anything is loaded or written."""

import io
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest

import inference
from configs.errors import UserError
from configs.load import load_config
from pipeline import DiagonalPipeline
from pipeline.plan import make_plan
from utils import exits

# what is given -> words that the sentence holds: the field, and what is wrong with it; settings: configs/test_config.py
ARGUMENTS = {
    "unknown key": (["video.heigth=64"], "video.heigth is not a setting; did you mean video.height"),
    "unknown flag": (["--sead", "3"], "unrecognized arguments: --sead (did you mean --seed?)"),
    "flag without its value": (["--seed"], "--seed"),
    "text for a number": (["--seed", "three"], "--seed=three has the wrong type; it must be an integer"),
    "fraction for a whole number": (["--num_samples", "1.5"], "error: --num_samples=1.5"),
    "frames in no whole chunks": (["--num_output_frames", "20"], "--num_output_frames=20"),
    "fewer frames than none": (["--num_output_frames", "-3"], "--num_output_frames=-3"),
    "missing weights": (["--checkpoint_path", "nowhere"], "nowhere"),
    "missing vae": (["model.vae=nowhere"], "model.vae="),
    "missing config": (["--config_path", "nowhere.yaml"], "config_path=nowhere.yaml"),
    "missing prompt file": (["--data_path", "nowhere.txt"], "nowhere.txt does not exist"),
    "folder as prompt file": (["--data_path", "."], "--data_path="),
    "empty prompt": (["--prompt", ""], "--prompt is empty"),
    "blank prompt": (["--prompt", " \n "], "--prompt is empty"),
    "one of two prompts empty": (["--prompt", "a circle", "--prompt", ""], "--prompt is empty"),
    "output folder under a file": (["--output_folder", "file/out"], "--output_folder=file/out"),
    "output folder is a file": (["--output_folder", "file"], "--output_folder=file"),
    "a folder for a stream without end": (
        ["--num_output_frames", "0", "--output_folder", "out"],
        "--output_folder has no effect on a video without end, which goes to --output FILE or into a pipe",
    ),
    "a folder for a stream without end, as a setting": (
        ["--num_output_frames", "0", "inference.output_folder=out"],
        "inference.output_folder has no effect on a video without end",
    ),
    "a folder and a file": (
        ["--output_folder", "out", "--output", "x.mp4"],
        "--output_folder has no effect beside --output",
    ),
    "unbounded samples": (["--num_samples", "1000000000"], "--num_samples=1000000000 is out of range"),
    "too many videos": (["--num_samples", "100000", *["--prompt", "a"] * 11], "are 1,100,000 videos, and one run"),
    "unbounded frames": (["--num_output_frames", "999999999"], "--num_output_frames=999999999 is out of range"),
    "seed below -1": (["--seed", "-2"], "--seed=-2 is out of range; it must lie in [-1, "),
    "flag and setting": (["--seed", "1", "seed=-2"], "error: seed=-2"),
    "device without kernels": (["device=mps"], "device=mps is none that this runs on"),
    "unknown device": (["device=quantum"], "device=quantum"),
    "absent GPU": (["device=cuda:99"], "device=cuda:99"),
    "GPU kernel on the CPU": (["inference.attention=fa3"], "inference.attention=fa3 needs a GPU"),
    "a prompt and a file of them": (
        ["--prompt", "a", "--data_path", "p.txt"],
        "--prompt and --data_path were both given",
    ),
}


@pytest.fixture
def refused(tiny_assets, tmp_path, monkeypatch, capsys):
    """Run inference.py, expect a refusal that has written nothing, and return its sentence."""

    def load(*_, **__):
        raise AssertionError("it was not refused before loading")

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["inference.py", "--config_path", str(tiny_assets / "tiny.yaml"), *arguments])
        with pytest.raises(SystemExit) as stop:
            exits.run(inference.main)
        captured = capsys.readouterr()
        assert stop.value.code == 2 and captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("error: ") and len(line) < 600
        assert sorted(tmp_path.rglob("*")) == before
        return line

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DiagonalPipeline, "from_config", load)
    (tmp_path / "file").touch()
    handler = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.parametrize("case", ARGUMENTS)
def test_a_wrong_argument_is_one_sentence(refused, case):
    arguments, words = ARGUMENTS[case]
    assert words in refused(*arguments)


def test_a_prompt_file_that_is_none(refused, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"a\0b")
    assert "NUL" in refused("--data_path", "prompts.txt")


def copy(tiny_assets: Path, tmp_path: Path, part: str) -> Path:
    return Path(shutil.copytree(tiny_assets / part, tmp_path / part))


@pytest.mark.parametrize("part", ["student", "vae", "text_encoder"])
def test_truncated_weights_are_named(refused, tiny_assets, tmp_path, part):
    (weights,) = copy(tiny_assets, tmp_path, part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    line = refused(f"model.{part}={weights.parent}")
    assert f"model.{part}" in line or str(weights) in line


def test_a_stream_without_end_does_not_fill_the_disk(tiny_assets, tmp_path, monkeypatch):
    """Standard output is a file, by redirection; `--output -` says that it is meant so."""
    config = load_config(tiny_assets / "tiny.yaml")
    with open(tmp_path / "out", "wb") as file, monkeypatch.context() as redirected:
        redirected.setattr(sys, "stdout", io.TextIOWrapper(file))
        with pytest.raises(UserError, match="to a file, which would fill the disk; give --output FILE, or a pipe"):
            make_plan(config, ["a circle"], endless=True)
        assert make_plan(config, ["a circle"], endless=True, output="-").jobs[0].piped


@pytest.mark.parametrize(("part", "other"), [("student", "vae"), ("vae", "student"), ("text_encoder", "student")])
def test_weights_of_another_network(refused, tiny_assets, part, other):
    assert f"model.{part}" in refused(f"model.{part}={tiny_assets / other}")


def test_weights_of_another_size(refused, tiny_assets, tmp_path):
    folder = copy(tiny_assets, tmp_path, "student")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    assert "--checkpoint_path=" in refused("--checkpoint_path", str(folder))


def test_no_averaged_weights(refused):
    assert "averaged" in refused("--use_ema")


def test_yaml_that_is_none(refused, tmp_path):
    (tmp_path / "bad.yaml").write_text("video: [1,\n")
    assert "bad.yaml" in refused("--config_path", "bad.yaml")


@pytest.mark.parametrize("environment", [{"RANK": "1"}, {"RANK": "x", "WORLD_SIZE": "2"}])
def test_half_a_torchrun(refused, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert "RANK" in refused()
