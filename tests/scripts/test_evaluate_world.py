"""scripts/evaluate_world.py and scripts/world_sheets.py on rendered videos."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import UserError
from configs.load import load_config
from pipeline import DiagonalPipeline
from scripts import evaluate_world, world_sheets
from scripts.studies import clips
from trainer.world.captions import MOTIONS
from trainer.world.scene import World
from utils.intervals import Interval


def test_rendered_videos_reach_what_is_aimed_at(tmp_path, capsys):
    out = tmp_path / "scores.json"
    asked = ["--rendered", "--people", "--num_prompts", "2", "--switches", "1", "--stay", "0", "--json", str(out)]
    assert evaluate_world.main([*asked, "video.num_latent_frames=12"]) == 0
    scores = json.loads(out.read_text())
    assert all(scores[name]["value"] == 1 for name in ("clips.colour", "switches.seen", "switches.stayed"))
    by_motion = [scores[f"clips.all_{motion}"]["n"] for motion in MOTIONS if f"clips.all_{motion}" in scores]
    assert sum(by_motion) == 2 and min(by_motion) > 0
    printed = capsys.readouterr().out
    assert "clips.colour" in printed and "reached  at least 0.97" in printed


def test_what_few_clips_leave_without_data_is_a_dash(tmp_path, capsys):
    """One clip has no spread, its means have no interval, and it moves in no direction or orbits nothing."""
    out = tmp_path / "scores.json"
    asked = ["--rendered", "--num_prompts", "1", "--json", str(out), "video.num_latent_frames=12"]
    assert evaluate_world.main(asked) == 0
    rows = {name: rest for name, *rest in map(str.split, capsys.readouterr().out.splitlines())}
    assert rows["clips.spread_starts"] == ["-", "-", "..", "-", "1", "unknown", "at", "least", "0.9"]
    assert rows["clips.partner"][:5] == ["-", "0.000", "..", "1.000", "0"]
    assert rows["clips.number"] == ["1.000", "-", "..", "-", "1"]
    assert not {"nan", "inf", "-inf"} & {word for row in rows.values() for word in row}
    assert json.loads(out.read_text())["clips.spread_starts"] == {"value": None, "low": None, "high": None, "n": 1}


def test_a_model_of_another_world_is_refused_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr(DiagonalPipeline, "from_config", lambda *_: pytest.fail("loaded"))
    told = "^model.tokenizer=assets/tiny/text_encoder lacks star, .* not of the moving world; .*world.yaml$"
    for part in (["--num_prompts", "2"], ["--num_prompts", "0", "--streams", "1"]):
        with pytest.raises(UserError, match=told):
            evaluate_world.main(["--config_path", "configs/tiny.yaml", *part])


def test_the_shipped_student_shows_its_captions(tmp_path):
    out = tmp_path / "scores.json"
    assert evaluate_world.main(["--num_prompts", "2", "--json", str(out)]) == 0
    scores = json.loads(out.read_text())
    assert all(scores[f"clips.{name}"]["value"] > 0.9 for name in ("colour", "ground", "number"))


def test_the_teacher_is_measured_as_the_student_is(tmp_path, monkeypatch):
    """Two steps in place of 50 show the ground; with other captions than the clips' own they do not."""
    monkeypatch.setattr(clips, "TEACHER_STEPS", 2)
    out = tmp_path / "scores.json"
    asked = ["--teacher_path", "assets/world/teacher", "--num_prompts", "4", "--json", str(out)]
    assert evaluate_world.main([*asked, "video.num_latent_frames=3"]) == 0
    assert json.loads(out.read_text())["clips.ground"]["value"] == 1
    for flag in (["--streams", "1"], ["--rendered"], ["--checkpoint_path", "x"]):
        with pytest.raises(UserError, match=f"^--teacher_path .* leave {flag[0]} out"):
            evaluate_world.main(["--teacher_path", "assets/world/teacher", *flag])


def test_a_seam_and_a_miss_are_told():
    assert evaluate_world.verdict("clips.seam", Interval(1.2, 1.1, 1.3, 9)).startswith("missed")
    assert evaluate_world.verdict("streams.sharpness_trend", Interval(0.1, -0.1, 0.3, 9)).startswith("reached")
    assert evaluate_world.verdict("clips.spread_starts", Interval(float("nan"), 0, 0, 1)).startswith("unknown")


def test_a_colour_that_is_gone_has_not_stayed():
    read = torch.tensor([[2, 2, -1, -1], [2, 2, 2, -1], [-1, 3, -1, -1], [2, 2, -1, -1]])
    assert evaluate_world.kept(read, torch.tensor([2, 2, 2, 2])).tolist() == [True, False, False, False]


def test_sheets_show_clips_and_long_streams(tmp_path):
    asked = ["--output", str(tmp_path), "--clips", "2", "--columns", "3", "--minutes", "10", "--streams", "1"]
    assert world_sheets.main(asked) == 0
    with Image.open(tmp_path / "sheet.png") as sheet, Image.open(tmp_path / "strip.png") as strip:
        assert sheet.size == (3 * 162, 2 * (98 + 13)) and strip.size == (3 * 162, 98 + 13)


@pytest.mark.parametrize("frames", [[0], [8], [2, 9], [0, 20, 21], [5, 33]])
def test_a_students_frames_are_shown_wherever_chunks_end(tiny_assets, frames):
    """Chunks end with frames 8, 20 and 32."""
    config = load_config(tiny_assets / "tiny.yaml")
    shown = world_sheets.generated(config, 0)(0, World().scene(3), frames)
    assert shown.shape == (len(frames), 32, 48, 3)
    whole = world_sheets.generated(config, 0)(0, World().scene(3), list(range(34)))
    assert (shown == whole[frames]).all()


def test_a_vae_is_shown_below_what_it_was_given():
    world = World()
    scene = world.scene(3)
    both = world_sheets.reconstructed(world, "assets/world/vae")(0, scene, [0, 3])
    assert both.shape == (2, 192, 160, 3)
    given, back = both[:, :96].astype(float), both[:, 96:].astype(float)
    assert (given == world_sheets.rendered(world)(0, scene, [0, 3])).all()
    assert 10 * np.log10(255**2 / ((given - back) ** 2).mean()) > 30  # dB


def test_a_vae_and_a_student_or_streams_are_refused():
    for other in (["--config_path", "configs/world/world.yaml"], ["--minutes", "1"]):
        with pytest.raises(UserError, match="--vae shows"):
            world_sheets.parse(["--vae", "assets/world/vae", *other])


def test_a_setting_of_rendered_sheets_is_refused():
    with pytest.raises(UserError, match="^seed=1 has no effect on rendered clips; give --config_path"):
        world_sheets.parse(["seed=1"])


@pytest.mark.parametrize("flag, value", [("--num_prompts", "-1"), ("--minutes", "0"), ("--batch", "0")])
def test_too_little_is_refused(flag, value):
    with pytest.raises(UserError, match=f"{flag} .* is too little"):
        evaluate_world.parse([flag, value])


def test_nothing_to_measure_is_refused():
    with pytest.raises(UserError, match="--num_prompts 0 leaves nothing to measure"):
        evaluate_world.parse(["--num_prompts", "0"])
    assert evaluate_world.parse(["--num_prompts", "0", "--switches", "1"]).switches == 1
