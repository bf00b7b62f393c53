"""scripts/evaluate_tiny.py: the table and the JSON, with rendered clips in the pipeline's place."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import pipeline
from configs.errors import UserError
from scripts import evaluate_tiny
from trainer.tiny.captions import parse_caption
from trainer.tiny.world import TinyWorld
from utils.video import read_video

KEYS = ("colour", "shape", "direction", "axis", "speed_ratio", "background", "consistency", "all")
CONFIG = ["--config_path", str(ROOT / "configs" / "tiny.yaml")]


class FakePipeline:
    """Renders what a prompt says, but always moving right, and notes what it was asked for."""

    calls: list[tuple[list[str], list[int]]] = []
    frames = 81

    @classmethod
    def from_config(cls, config, *overrides):
        cls.frames = 1 + 4 * (config.video.num_latent_frames - 1)
        cls.calls = []
        if config.model.student.endswith("missing"):
            raise UserError("model.student=missing is not there; train one")
        return cls()

    def __call__(self, prompts, seed):
        self.calls.append((prompts, seed))
        world = TinyWorld()
        stated = [{**parse_caption(p), "direction": "right"} for p in prompts]
        scenes = [world.place(s, np.random.default_rng(i)) for s, i in zip(stated, seed, strict=True)]
        clips = ((world.render(scenes, self.frames) + 1) * 127.5).round().to(torch.uint8)
        return SimpleNamespace(videos=[SimpleNamespace(frames=clip.permute(0, 2, 3, 1).numpy()) for clip in clips])


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(pipeline, "DiagonalPipeline", FakePipeline, raising=False)
    return FakePipeline


def test_ground_truth_is_all_right(tmp_path, capsys):
    out = tmp_path / "new" / "scores.json"
    arguments = [*CONFIG, "--ground_truth", "--num_prompts", "8", "--json", str(out)]
    assert evaluate_tiny.main(arguments) == 0
    scores = json.loads(out.read_text())
    for key in KEYS:
        assert set(scores[key]) == {"value", "low", "high", "n"}
        assert scores[key]["value"] == pytest.approx(1, abs=0.02) and scores[key]["n"] == 8
    assert scores["consistency_share"]["value"] == 1 and abs(scores["seam_score"]["value"] - 1) < 0.1
    assert scores["frechet_distance"] > 0 and scores["start_spread"] > 5
    printed = capsys.readouterr().out
    for word in ("colour", "axis", "all together", "95% interval", "100.0%", "frechet_distance"):
        assert word in printed


def test_generated_clips_are_measured_against_their_prompts(fake, tmp_path):
    out = tmp_path / "scores.json"
    flags = ["--num_prompts", "9", "--seed", "3", "--batch", "4", "--num_output_frames", "12"]
    assert evaluate_tiny.main([*CONFIG, *flags, "--json", str(out), "--save_videos", str(tmp_path / "clips")]) == 0
    assert [len(prompts) for prompts, _ in fake.calls] == [4, 4, 1]
    prompts = [p for some, _ in fake.calls for p in some]
    seeds = [s for _, some in fake.calls for s in some]
    assert prompts == TinyWorld().prompts(3, 9) and len(set(seeds)) == 9
    scores = json.loads(out.read_text())
    right = sum(parse_caption(p)["direction"] == "right" for p in prompts)
    assert scores["direction"]["value"] == pytest.approx(right / 9)
    assert scores["colour"]["value"] == scores["shape"]["value"] == 1
    videos = sorted((tmp_path / "clips").glob("*.mp4"))
    assert len(videos) == 9 and read_video(videos[0]).shape == (45, 64, 96, 3)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--num_prompts", "0"], "num_prompts=0"),
        (["--batch", "-1"], "batch=-1"),
        (["--seed", "-1"], "seed=-1"),
        (["--config_path", "nowhere.yaml"], "nowhere.yaml"),
        (["--num_output_frames", "20"], "20"),
        (["--ground_truth", "--num_output_frames", "20"], "20"),
        (["schedule.stepz=3"], "schedule.steps"),
        (["--json", str(ROOT / "setup.py" / "scores.json")], "json="),
        (["--checkpoint_path", "missing"], "model.student=missing"),
    ],
)
def test_bad_input_is_one_sentence(fake, flags, sentence):
    with pytest.raises(UserError) as caught:
        evaluate_tiny.main([*CONFIG, *flags] if "--config_path" not in flags else flags)
    assert sentence in str(caught.value) and len(str(caught.value).splitlines()) == 1
