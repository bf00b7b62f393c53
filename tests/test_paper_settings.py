"""docs/paper-settings.md: its table says what the presets say, the code acts on it, and departures have a reason."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from configs.load import CHECKOUT, load_config, to_dict
from model.flow import shift_time
from model.schedule import PRESETS, Schedule

PRESET = "configs/train_wan2.1_t2v_1.3b.yaml"  # starts from configs/wan2.1_t2v_1.3b.yaml, so it has both
STAGES = tuple(f"configs/train_wan2.1_t2v_1.3b_stage{n}.yaml" for n in (1, 2))
PRESETS_OF_TODAY = tuple(tuple(row) for row in PRESETS["release_2026_11"]["timesteps"])
PAGE = (CHECKOUT / "docs" / "paper-settings.md").read_text(encoding="utf-8")


class Row(NamedTuple):
    """The cells of a row, as texts."""

    what: str
    paper: str  # empty = not stated
    release: str  # of both stages, or `stage 1 / stage 2`
    ours: str  # of all three files, or `single run / stage 1 / stage 2`
    key: str
    code: str  # the file that acts on it
    note: str  # reason if ours differs, or a note


TABLE = PAGE.partition("\n| setting | paper |")[2].partition("\n\n")[0].splitlines()[2:]  # without its head
ROWS = [Row(*(cell.strip().strip("`") for cell in line[1:-1].split("|"))) for line in TABLE]


def values_of(key: str) -> list[str]:
    """Of the single run, stage 1 and stage 2, as the table writes them."""
    out = []
    for path in (PRESET, *STAGES):
        value = to_dict(load_config(path))
        for part in key.split("."):
            value = value[part]
        out.append(str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float)
                   else "none" if value is None else str(value))  # fmt: skip
    return out


def departures(row: Row) -> list[str]:
    """Of what ours are not. The single run departs from the paper, or, where that is silent, from the release that its
    stages have in common; the stages depart from the release."""
    single, *stages = row.ours.split(" / ") if " / " in row.ours else [row.ours] * 3
    theirs = row.release.split(" / ")
    sources = {"the paper"} if row.paper not in ("", single) else set()
    if stages != (theirs * 2)[:2] or (not row.paper and len(theirs) == 1 and single != theirs[0]):
        sources.add("the release")
    return sorted(sources)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_each_row_holds(row):
    values = values_of(row.key)
    assert row.ours == (values[0] if len(set(values)) == 1 else " / ".join(values)), "what the files say"
    expected = " and ".join(departures(row))
    assert row.note.startswith(f"**departs** from {expected}: " if expected else ""), f"departs from {expected}"
    assert expected or "**departs**" not in row.note
    source = (CHECKOUT / row.code).read_text(encoding="utf-8")
    assert row.key.rpartition(".")[2] in source or row.key.startswith("training.init."), "the code does not act on it"


def test_departures_are_from_the_paper_or_where_that_is_silent_from_the_release():
    def of(ours, paper, release):
        return departures(Row("x", paper, release, ours, "a.b", "c.py", ""))

    assert of("1 / 2 / 2", "1", "2") == [] and of("1 / 2 / 3", "1", "2 / 3") == [] and of("1", "1", "1") == []
    assert of("3 / 2 / 2", "1", "2") == ["the paper"] and of("1 / 2 / 2", "", "2") == ["the release"]
    assert of("3 / 2 / 3", "1", "2") == ["the paper", "the release"] and of("9 / 2 / 3", "", "2 / 3") == []


def test_the_stages_are_the_releases_recipe():
    """Its rows, its steps, its losses; stage 2 starts where stage 1's run leaves its export."""
    one, two = (load_config(path) for path in STAGES)
    rows = [Schedule.from_config(c.schedule, c.stream).timesteps_by_chunk for c in (one, two)]
    assert [tuple(round(t, 1) for t in row) for row in rows[0]] == [(1000, 937.5, 833.3, 357.1)]
    assert rows[1] == PRESETS_OF_TODAY
    assert (one.training.steps, two.training.steps) == (1000, 2000)
    assert two.training.init["student"] == f"logs/{Path(STAGES[0]).stem}"
    losses = [replace(c.training.distill, prompts=None) for c in (one, two)]
    assert losses[0] == losses[1] and not losses[0].flow.half and losses[0].motion_regression.weight == 1


def test_the_presets_of_inference_agree_with_that_of_training():
    training, inference = (load_config(path) for path in (PRESET, "configs/wan2.1_t2v_1.3b.yaml"))
    assert (training.video, training.schedule, training.stream) == (
        inference.video,
        inference.schedule,
        inference.stream,
    )


def test_teacher_and_critic_look_where_the_releases_do():
    """Self-Forcing and diagdistill draw 0..999 evenly, shift by 5 and clamp to 20..980: 746 on average."""
    d = load_config(PRESET).training.distill
    drawn = shift_time(torch.arange(1000.0), d.shift).clamp(d.min_timestep, d.max_timestep)
    assert round(float(drawn.mean())) == 746
