"""The two-stage recipe from published layouts to a clip, on two processes of a CPU, with the tiny world's networks."""

import json
import sys
from pathlib import Path

import pytest
from conftest import SEVERAL_RANKS
from distill_case import distill_config
from ranks_case import on_ranks

import inference
from configs.errors import UserError
from configs.load import CHECKOUT
from model.weights.inspection import required_weights
from model.weights.run_folders import checkpoints
from pipeline.preflight import check_training
from scripts import convert_checkpoint
from trainer.cli import parse
from trainer.command import train
from utils.video import read_video

pytestmark = [SEVERAL_RANKS, pytest.mark.slow]
TINY = CHECKOUT / "assets" / "tiny"
STAGES = tuple(f"configs/train_wan2.1_t2v_1.3b_stage{n}.yaml" for n in (1, 2))
STEPS = 2


def convert(source: str, out: Path, form: str) -> Path:
    assert convert_checkpoint.main([str(TINY / source), str(out), "--to", form]) == 0
    return out


def train_rank(*arguments: str) -> bool:
    return train(parse(arguments))


@pytest.fixture
def settings(tmp_path) -> list[str]:
    """Everything small; the student as Self-Forcing's ode_init.pt, teacher and critic as Wan's folders."""
    student = convert("student_init", tmp_path / "ode_init.pt", "self-forcing")
    teacher = convert("teacher", tmp_path / "Wan2.1-T2V-14B", "wan")
    text = TINY / "text_encoder"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle moves right\na blue square moves up slowly\n", encoding="utf-8")
    values = {
        "video": "{height: 32, width: 48, num_latent_frames: 6}",
        "model": f"{{vae: {TINY}/vae, text_encoder: {text}, tokenizer: {text}, text_tokens: 32}}",
        "training.init": f"{{student: {student}, teacher: {teacher}, critic: {teacher}}}",
        "training.distill": f"{{prompts: {prompts}, dfake_gen_update_ratio: 1, video_clips: 1}}",
        "training.global_batch": 2, "training.log_every": 1, "training.checkpoint_every": 0,
        "training.validate_every": 0, "training.validation_clips": 1, "training.loggers": "[]",
        "training.steps": STEPS, "training.precision": "float32", "training.ema_start_step": 0, "device": "cpu",
        "training.compile": "false",  # in C++, for minutes; compiled training: test_gathered.py, test_compiled_parts.py
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


def test_from_published_files_through_both_stages_to_a_clip(tmp_path, settings, monkeypatch, capsys):
    logs = [tmp_path / name for name in ("stage1", "stage2")]
    two = [*settings, f"training.init.student={logs[0]}"]
    for stage, folder, own in zip(STAGES, logs, (settings, two), strict=True):
        outcomes = on_ranks(2, train_rank, "--config_path", stage, "--logdir", str(folder), *own)
        assert [o.ended for o in outcomes] == ["done"] * 2, outcomes
        assert [p.name for p in checkpoints(folder)][-1] == f"checkpoint_{STEPS:06d}"
        assert read_video(folder / "validation" / f"distill_{STEPS:06d}.mp4").shape[0] == 21
    rows = json.loads((logs[1] / "export" / "card.json").read_text())["schedule"]["rows"]
    assert [len(row) for row in rows] == [4, 3, 2]
    monkeypatch.setattr(sys, "argv", [
        "inference.py", "--config_path", STAGES[1], "--checkpoint_path", str(logs[1]), "model.use_ema=false",
        "--prompt", "a red circle moves right", "--output_folder", str(tmp_path / "out"), *two,
    ])  # fmt: skip
    assert inference.main() == 0
    printed = capsys.readouterr()
    assert "warning" not in (printed.out + printed.err).lower(), printed
    (video,) = (tmp_path / "out").glob("*.mp4")
    assert read_video(video).shape == (21, 32, 48, 3)


def test_random_networks_need_no_file(tiny_assets):
    """For speed, memory and trials at full size: training.init.teacher=random:14B."""
    config = distill_config(tiny_assets, "training.init={student: random:tiny, teacher: random:tiny}")
    check_training(config, 1, None)
    assert not {"student", "teacher"} & {role for role, _, _ in required_weights(config, training=True)}
    with pytest.raises(UserError, match="training.init.teacher=.*nowhere does not exist"):
        check_training(distill_config(tiny_assets, "training.init.teacher=nowhere"), 1, None)
