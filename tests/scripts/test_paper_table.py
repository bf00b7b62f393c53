"""The table of the paper's settings: complete, true of the presets and of the code, and shown in the docs."""

import importlib.util
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from configs.load import CHECKOUT, load_config, to_dict
from model.flow import shift_time

SPEC = importlib.util.spec_from_file_location("paper_table", CHECKOUT / "scripts" / "paper_table.py")
paper = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(paper)


def test_the_docs_show_the_table():
    text = (CHECKOUT / "docs" / "paper-settings.md").read_text(encoding="utf-8")
    assert paper.inserted(text) == text, "run python scripts/paper_table.py --write"


@pytest.mark.parametrize("row", paper.SETTINGS, ids=lambda row: row.key)
def test_each_row_holds(row):
    ours = paper.value_of(to_dict(load_config(paper.PRESET)), row.key)
    assert paper.same(row.paper, ours) or row.why, "ours departs and nothing says why"
    source = (CHECKOUT / row.code).read_text(encoding="utf-8")
    assert row.key.rpartition(".")[2] in source, f"{row.code} does not act on {row.key}"
    assert row.source in ("paper", "release")


def test_the_presets_of_inference_agree_with_that_of_training():
    training, inference = (load_config(path) for path in (paper.PRESET, "configs/wan2.1_t2v_1.3b.yaml"))
    assert (training.video, training.schedule, training.stream) == (
        inference.video,
        inference.schedule,
        inference.stream,
    )


def test_teacher_and_critic_look_where_the_releases_do():
    """Self-Forcing and diagdistill draw 0..999 evenly, shift by 5 and clamp to 20..980: 746 on average."""
    d = load_config(paper.PRESET).training.distill
    drawn = shift_time(torch.arange(1000.0), d.shift).clamp(d.min_timestep, d.max_timestep)
    assert round(float(drawn.mean())) == 746


def test_a_change_of_a_preset_shows(tmp_path, monkeypatch):
    changed = tmp_path / "changed.yaml"
    changed.write_text(f"base: {Path(CHECKOUT / paper.PRESET)}\nstream: {{window_frames: 9}}\n")
    monkeypatch.setattr(paper, "PRESET", changed)
    (line,) = [line for line in paper.table().splitlines() if "`stream.window_frames`" in line]
    assert "| 9 |" in line and "**departs**" in line


def test_marks_are_needed():
    with pytest.raises(UserError, match="end of paper table"):
        paper.inserted(paper.BEGIN)
    assert paper.inserted(f"a\n{paper.BEGIN}\nold\n{paper.END}\nb").startswith(f"a\n{paper.BEGIN}\n| setting")
