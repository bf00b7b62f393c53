"""The diagonal schedule: values of the family, golden tables, counts of evaluations, and what is refused.

A golden table that should change: run with UPDATE_GOLDEN=1, and look at the difference before committing it.
"""

import json
import os

import pytest
from conftest import ROOT

from configs.errors import UserError
from configs.geometry import Geometry
from configs.schema import DATED, Config, ScheduleConfig, StreamConfig
from model.schedule import PRESETS, Schedule, with_steps
from model.timesteps import warp

GOLDEN = ROOT / "tests" / "golden"
FULL = Geometry(height=480, width=832)


def build(stream: dict | None = None, **schedule) -> Schedule:
    return Schedule.from_config(ScheduleConfig(**schedule), StreamConfig(**(stream or {})))


def check_golden(name: str, text: str):
    path = GOLDEN / f"{name}.txt"
    if "UPDATE_GOLDEN" in os.environ:
        path.write_text(text + "\n")
    assert text + "\n" == path.read_text()


def test_every_preset_prints_as_its_golden_table():
    tables = [f"{name}\n{build(preset=name).table(7, FULL)}\n" for name in PRESETS]
    check_golden("schedule_presets", "\n".join(tables))


def test_a_context_and_an_unbounded_window_print_as_their_golden_tables():
    mixed = {"context": "renoise", "context_timestep": 20.0}
    endless = Geometry(height=64, width=96, window_frames=0, sink_frames=0)
    tables = [
        build(mixed, steps=[3, 2]).table(9, FULL),
        build(mixed, steps=[3, 2]).table(9),
        str(build(mixed, steps=[3, 2])),
        build(steps="21").table(5, endless),
        build(steps="4322").table(2),
        build(steps="1").table(1),
    ]
    check_golden("schedule_mixed", "\n\n".join(tables))


@pytest.mark.parametrize(
    "steps, rows",
    [
        ("4", [[1000, 921.0526, 769.2308, 357.142857]]),
        ("32", [[1000, 859.375, 357.142857], [1000, 357.142857]]),
        ("1", [[1000]]),
    ],
)
def test_timesteps_are_warped_by_the_shift(steps, rows):
    ours = build(steps=steps).timesteps_by_chunk
    assert [pytest.approx(row, abs=1e-4) for row in rows] == [list(row) for row in ours]


def test_timesteps_without_a_warp_are_even():
    assert build(steps="4", shift=1.0).timesteps(0) == pytest.approx([1000, 700, 400, 100])


def test_releases_are_taken_as_their_code_passes_them():
    march, today = build(preset="release_2026_03"), build(preset="release")
    assert march.timesteps_by_chunk == ((1000, 933, 733, 357), (1000, 933, 357), (1000, 357.142857))
    four, two = ([warp(t / 1000, 5.0) for t in row] for row in ((1000, 750, 500, 100), (1000, 100)))
    rows = [list(row) for row in today.timesteps_by_chunk]
    assert [pytest.approx(row) for row in (four, [four[0], four[1], four[3]], two)] == rows
    assert {march.context, today.context} == {"last_step"}


def test_a_preset_is_stored_under_its_date():
    assert ScheduleConfig(preset="release").preset == "release_2026_11" in PRESETS
    assert all(name in PRESETS for name in DATED.values())


@pytest.mark.parametrize(
    "preset, nfe",
    [
        ("paper_4322222", 17), ("paper_5432222", 20), ("paper_4222222", 16), ("release", 17), ("release_2026_03", 17),
        ("self_forcing", 35),
    ],
)
def test_evaluations_of_seven_chunks(preset, nfe):
    assert build(preset=preset).nfe(7) == nfe


def test_context_passes_are_counted():
    assert build({"context": "clean"}).nfe(7) == 24


@pytest.mark.parametrize(
    "context, timestep, level", [("last_step", None, 357.142857), ("clean", 0, 0), ("renoise", 20, 20)]
)
def test_levels_of_the_context(context, timestep, level):
    schedule = build({"context": context, "context_timestep": 20.0})
    assert schedule.context == context
    assert schedule.context_timestep == timestep
    assert schedule.kv_timestep(5) == pytest.approx(level)


def test_a_preset_that_fixes_the_context_goes_before_the_stream():
    assert build({"context": "clean"}, preset="release").context == "last_step"
    assert build({"context": "clean"}, preset="paper_4322222").context == "clean"


@pytest.mark.parametrize("steps", ["4322", 4322, [4, 3, 2, 2], (4, 3, 2, 2)])
def test_ways_to_write_steps_agree(steps):
    assert build(steps=steps) == build(steps="4322")


@pytest.mark.parametrize("preset", list(PRESETS))
def test_round_trip_through_json(preset):
    schedule = build({"context": "clean"}, preset=preset)
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


@pytest.mark.parametrize(
    "change",
    [{"policy": "own"}, {"rows": []}, {"rows": [[2000]]}, {"exceptions": [[0, "clean"]]}, {"restart_every": 5}],
)
def test_a_stored_schedule_is_checked(change):
    with pytest.raises(UserError):
        Schedule.from_dict(build().to_dict() | change)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"steps": "4302"}, "schedule.steps=4302 .* digits 1-9"),
        ({"steps": "4,3"}, "schedule.steps=4,3 "),
        ({"steps": ""}, "schedule.steps= "),
        ({"steps": 0}, "schedule.steps=0 "),
        ({"steps": -3}, "schedule.steps=-3 "),
        ({"steps": 4.5}, "schedule.steps=4.5 "),
        ({"steps": True}, "schedule.steps=True "),
        ({"steps": None}, "schedule.steps=null "),
        ({"steps": []}, r"schedule.steps=\[\] "),
        ({"steps": [4, 0]}, r"schedule.steps=\[4, 0\] "),
        ({"steps": [4, "3"]}, r"schedule.steps=\[4, '3'\] "),
        ({"steps": [True]}, r"schedule.steps=\[True\] "),
        ({"first": 0.0}, "schedule.first=0.0 is not a timestep"),
        ({"first": 1000.5}, "schedule.first=1000.5 is out of range"),
        ({"last": float("nan")}, "schedule.last=nan is out of range"),
        ({"last": "low"}, "schedule.last=low is not a timestep"),
        ({"first": 100.0, "last": 100.0}, "schedule.last=100 is not below schedule.first=100"),
        ({"shift": 0.0}, "schedule.shift=0.0 is out of range"),
        ({"timesteps": []}, r"schedule.timesteps=\[\] names no chunk"),
        ({"timesteps": [[1000.0], []]}, r"schedule.timesteps.1=\[\] has no step"),
        ({"timesteps": [1000.0, 500.0]}, "schedule.timesteps.0=1000.0 has no step"),
        ({"timesteps": [[1000.0, 500.0, 500.0]]}, "schedule.timesteps.0=.* does not fall"),
        ({"timesteps": [[1000.0], [500.0, 700.0]]}, "schedule.timesteps.1=.* does not fall"),
        ({"timesteps": [[1000.0, 0.0]]}, "schedule.timesteps.0=0.0 is not a timestep"),
        ({"timesteps": [[1001.0]]}, "schedule.timesteps=.* holds 1001.0, which is out of range"),
        ({"timesteps": [[1000.0], [float("nan")]]}, "schedule.timesteps=.* holds nan, which is out of range"),
        ({"timesteps": [[1.0]] * 1001}, "schedule.timesteps has 1,001 rows"),
        ({"steps": [1_000_000_000]}, r"schedule.steps=\[1000000000\] is not a count"),
        ({"steps": "4" * 5000}, "schedule.steps=4444.* is not a count"),
        ({"preset": "papr"}, "schedule.preset=papr is unknown; use one of .*paper_5432222"),
        ({"preset": "release", "steps": "43"}, "schedule.steps=43 has no effect beside schedule.preset=rel"),
        ({"preset": "release", "shift": 3.0}, "schedule.shift=3.0 has no effect"),
        ({"preset": "release", "timesteps": [[1000.0]]}, "schedule.timesteps=.* has no effect"),
    ],
)
def test_mistakes_are_named_in_one_sentence(fields, message):
    with pytest.raises(UserError, match=message) as error:
        build(**fields)
    assert "\n" not in str(error.value) and ";" in str(error.value), "and end with a fix"


def changed(counts, context=None, stream: dict | None = None, **schedule) -> Schedule:
    """The schedule of these settings with other numbers of steps."""
    config = Config(schedule=ScheduleConfig(**schedule), stream=StreamConfig(**(stream or {})))
    config = with_steps(config, counts, context)
    return Schedule.from_config(config.schedule, config.stream)


ROWS = [[1000.0, 900.0, 700.0, 300.0], [1000.0, 500.0], [1000.0, 800.0, 350.0]]


@pytest.mark.parametrize(
    "stream, schedule",
    [
        *(({}, {"preset": name}) for name in PRESETS),
        ({"context": "renoise", "context_timestep": 30.0}, {"steps": "432"}),
        ({}, {"steps": [3, 2], "first": 990.0, "last": 200.0, "shift": 3.0}),
        ({}, {"steps": "42", "shift": 1.0}),
        ({"context": "clean"}, {"timesteps": ROWS}),
    ],
)
def test_a_schedule_with_its_own_numbers_of_steps_is_the_same(stream, schedule):
    own = build(stream, **schedule)
    assert changed([len(row) for row in own.timesteps_by_chunk], stream=stream, **schedule) == own


def test_other_numbers_of_steps_keep_all_else_of_a_schedule_that_counts_steps():
    stream = {"context_timestep": 20.0}
    kept = {"first": 990.0, "last": 200.0, "shift": 3.0}
    ours = changed([3, 2], "renoise", stream=stream, steps="4322222", **kept)
    assert ours == build(stream | {"context": "renoise"}, steps="32", **kept)
    ours = changed([2], preset="self_forcing")
    assert ours.timesteps(0) == pytest.approx([1000, 625]), "the preset's last"
    assert ours.context == "clean", "and context"


def test_other_numbers_of_steps_of_listed_timesteps():
    ours = changed([3, 3, 2, 1, 4, 7], timesteps=ROWS)
    rows = [list(row) for row in ours.timesteps_by_chunk]
    assert rows[:5] == [ROWS[2], ROWS[2], ROWS[1], [1000.0], ROWS[0]], "rows of that length"
    assert ours.timesteps_by_chunk[5] == (1000, 950, 900, 800, 700, 500, 300), "else the longest row, interpolated"
    pair = changed([3, 3], timesteps=[[1000.0, 900.0, 300.0], [990.0, 800.0, 200.0]])
    assert pair.timesteps_by_chunk == ((1000, 900, 300), (990, 800, 200)), "of several rows the chunk's own"
    assert changed([1, 1], timesteps=[[1000.0, 300.0], [900.0, 200.0]]).timesteps_by_chunk == ((1000,), (900,))
    with pytest.raises(UserError, match="one step in each row"):
        changed([2], timesteps=[[1000.0]])
    with pytest.raises(UserError, match="schedule.steps="):
        changed([0], timesteps=ROWS)
