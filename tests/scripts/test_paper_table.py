"""The table of the paper's settings: complete, true of the presets and of the code, and shown in the docs."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from configs.load import CHECKOUT, load_config, to_dict
from model.flow import shift_time
from model.schedule import PRESETS, Schedule

SPEC = importlib.util.spec_from_file_location("paper_table", CHECKOUT / "scripts" / "paper_table.py")
paper = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(paper)
PRESETS_OF_TODAY = tuple(tuple(row) for row in PRESETS["release_2026_11"]["timesteps"])


def test_the_docs_show_the_table():
    text = (CHECKOUT / "docs" / "paper-settings.md").read_text(encoding="utf-8")
    assert paper.inserted(text) == text, "run python scripts/paper_table.py --write"


@pytest.mark.parametrize("row", paper.SETTINGS, ids=lambda row: row.key)
def test_each_row_holds(row):
    single, *stages = (paper.value_of(to_dict(load_config(path)), row.key) for path in (paper.PRESET, *paper.STAGES))
    assert not paper.departures(row, single, tuple(stages)) or row.why, "ours departs and nothing says why"
    source = (CHECKOUT / row.code).read_text(encoding="utf-8")
    assert row.key.rpartition(".")[2] in source or row.key.startswith("training.init."), "the code does not act on it"


def test_a_departure_is_from_the_paper_or_where_that_is_silent_from_the_release():
    def of(ours, paper_value, release):
        row = paper.Setting("x", paper_value, release, "a.b", "c.py")
        return paper.departures(row, ours[0], ours[1:])

    assert of((1, 2, 2), 1, 2) == [] and of((1, 2, 3), 1, (2, 3)) == []
    assert of((3, 2, 2), 1, 2) == ["the paper"] and of((1, 2, 2), None, 2) == ["the release"]
    assert of((3, 2, 3), 1, 2) == ["the paper", "the release"] and of((9, 2, 3), None, (2, 3)) == []


def test_the_stages_are_the_releases_recipe():
    """Its rows, its steps, its losses; stage 2 starts where stage 1's run leaves its export."""
    one, two = (load_config(path) for path in paper.STAGES)
    rows = [Schedule.from_config(c.schedule, c.stream).timesteps_by_chunk for c in (one, two)]
    assert [tuple(round(t, 1) for t in row) for row in rows[0]] == [(1000, 937.5, 833.3, 357.1)]
    assert rows[1] == PRESETS_OF_TODAY
    assert (one.training.steps, two.training.steps) == (1000, 2000)
    assert two.training.init["student"] == f"logs/{Path(paper.STAGES[0]).stem}"
    losses = [replace(c.training.distill, prompts=None) for c in (one, two)]
    assert losses[0] == losses[1] and not losses[0].flow.half and losses[0].motion_regression.weight == 1


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
    assert "| 9 / 12 / 12 |" in line and "**departs** from the release" in line


def test_marks_are_needed():
    with pytest.raises(UserError, match="end of paper table"):
        paper.inserted(paper.BEGIN)
    assert paper.inserted(f"a\n{paper.BEGIN}\nold\n{paper.END}\nb").startswith(f"a\n{paper.BEGIN}\n| setting")
