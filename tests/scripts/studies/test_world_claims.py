"""How claims about the method are decided on the moving world; rows differ in what their titles say alone."""

import math
import re
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.load import load_config
from scripts import ablate_world
from scripts.evaluate_world import rendered
from scripts.studies.world_claims import CLAIMS, PARENTS, ROWS, SEEDS, Claim, decision, difference, table
from trainer.world.captions import parse_caption

ROW = {row.name: row for row in ROWS}
HARD = [True, True, False, False]


def figures(name: str, *rows: list[float], figure: str = "all") -> dict:
    return {(name, seed): {figure: row} for seed, row in zip(SEEDS, rows, strict=False)}


def claim(figure: str = "all", effect: float = 0.03, hard: bool = False) -> Claim:
    return Claim(1, "a claim", "diagonal", "even", figure, effect, hard)


def test_a_clear_difference_holds_and_its_reverse_is_refuted():
    better = figures("diagonal", [1, 1, 1, 1], [1, 1, 1, 0.9], [1, 1, 1, 0.95])
    worse = figures("even", [0.5] * 4, [0.5] * 4, [0.5] * 4)
    found = difference(claim(), better | worse, HARD)
    assert found.n == 3 and found.low > 0 and decision(claim(), found) == "holds"
    turned = Claim(1, "a claim", "even", "diagonal", "all", 0.03)
    assert decision(turned, difference(turned, better | worse, HARD)) == "refuted"
    seam = Claim(3, "seams", "even", "diagonal", "all", 0.03)  # of seams the lower is the better
    assert difference(Claim(3, "seams", "diagonal", "even", "seam", 0.03),
                      {k: {"seam": v["all"]} for k, v in (better | worse).items()}, HARD).value < 0  # fmt: skip
    assert difference(seam, better | worse, HARD).value < 0


def test_noise_is_undecided_and_says_what_would_have_been_seen():
    rows = figures("diagonal", [0.9] * 4, [0.5] * 4, [0.7] * 4) | figures("even", [0.6] * 4, [0.8] * 4, [0.6] * 4)
    assert decision(claim(), difference(claim(), rows, HARD)).startswith("undecided; ")


def test_one_that_is_as_good_may_be_a_little_worse():
    alike = Claim(3, "a claim", "diagonal", "even", "all", 0.03, as_good=True)
    for loss, said in ((0.01, "holds"), (-0.2, "holds"), (0.05, "refuted")):
        rows = figures("diagonal", *[[0.9 - loss] * 4] * 3) | figures("even", *[[0.9] * 4] * 3)
        assert decision(alike, difference(alike, rows, HARD)) == said
    assert {c.number for c in CLAIMS if c.as_good} == {3, 7}


def test_the_flow_loss_has_to_regain_half_of_what_fewer_steps_lost():
    """Of 0.5 that are lost, 0.1 is above the effect of 0.05 and less than half; 0.3 is more."""
    lost = figures("four_no_flow", *[[1.0] * 4] * 3, figure="rate_ratio")
    lost |= figures("two_no_flow", *[[0.5] * 4] * 3, figure="rate_ratio")
    for regained, said in ((0.1, "refuted"), (0.3, "holds")):
        flow = figures("two_flow", *[[0.5 + regained] * 4] * 3, figure="rate_ratio")
        lines = [line for line in table(lost | flow, HARD).splitlines() if "restores it: rate" in line]
        assert len(lines) == 1 and lines[0].endswith(f"| 0.25 | {said} |")
    without = {key: row for key, row in (lost | flow).items() if key != ("four_no_flow", 2)}
    (line,) = [line for line in table(without, HARD).splitlines() if "restores it: rate" in line]
    assert "not measured" in line, "what was lost is not known"


def test_too_few_seeds_decide_nothing():
    rows = figures("diagonal", [1.0] * 4) | figures("even", [0.0] * 4)
    assert decision(claim(), difference(claim(), rows, HARD)) == "not measured (1 of 3 seeds)"
    assert math.isnan(difference(claim(), {}, HARD).value)
    line = next(line for line in table(rows, HARD).splitlines() if "steps early |" in line)
    assert line.endswith("| +1.000 (- .. -) | 0.05 | not measured (1 of 3 seeds) |")
    assert "| steps early | - | 0.05 | not measured (0 of 3 seeds) |" in table({}, HARD)


def test_hard_clips_alone_count_and_a_motion_that_is_not_there_is_none():
    rows = figures("diagonal", *[[1.0, 1.0, 0.0, 0.0]] * 3, figure="rate_ratio")
    rows |= figures("even", *[[0.8, None, 9.0, 9.0]] * 3, figure="rate_ratio")
    assert difference(claim("rate_ratio", hard=True), rows, HARD).value == pytest.approx(0.6)


@pytest.mark.parametrize(
    "hide, said", [([1.0, 1.0, None, None], "holds"), ([1.0, 0.0, None, None], "refuted"), ([None] * 4, "undecided")]
)
def test_memory_is_that_hiding_clips_keep_their_colour_about_as_often_as_others(hide, said):
    memory = next(c for c in CLAIMS if c.number == 7)
    assert (memory.figure, memory.against) == ("kept_hide", "kept_shown")
    found = {("diagonal", seed): {"kept_hide": hide, "kept_shown": [1.0, 1.0, 1.0]} for seed in SEEDS}
    if said == "undecided":
        for seed, kept in zip(SEEDS, ([1.0, 0.0], [1.0, 1.0], [1.0, 1.0]), strict=True):
            found["diagonal", seed]["kept_hide"] = kept
    assert decision(memory, difference(memory, found, HARD)).startswith(said)


def test_rendered_clips_of_captions_without_a_colour_keep_theirs(monkeypatch):
    said = []

    def instead(config, wording):
        def play(scenes, *rest):
            said.extend(map(wording, scenes))
            yield from rendered(config)(scenes, *rest)

        return play, None

    monkeypatch.setattr(ablate_world, "generated", instead)
    figures = ablate_world.memory(load_config("configs/world/distill.yaml", []), Path("student"), 2, 2)
    assert figures == {"kept_hide": [1.0, 1.0], "kept_shown": [1.0, 1.0]}
    stated = [parse_caption(text) for text in said]
    assert [s["motion"] for s in stated] == ["hide", "hide", "travel", "spin"]
    assert {s["colour"] for s in stated} == {None} and {s["rate"] for s in stated} == {"slow", "medium"}


def test_every_claim_names_rows_that_there_are_and_the_table_has_a_line_of_each():
    assert all({c.better, c.worse} <= set(ROW) for c in CLAIMS) and set(PARENTS) <= set(ROW)
    assert len(table({}, HARD).splitlines()) == 2 + len(CLAIMS)


def test_rows_are_settings_that_load(tmp_path):
    args = ablate_world.parse(["--output", str(tmp_path), "training.global_batch=16", "training.micro_batch=16"])
    configs = {row.name: ablate_world.config_of(args, row, 1, "start") for row in (*ROWS, *PARENTS.values())}
    for config in configs.values():
        assert config.seed == 1 and config.training.init["student"] == "start" and config.training.global_batch == 16
        assert config.training.distill.prompts == f"{tmp_path}/prompts.txt"
    updates = {n: c.training.distill.generator_updates(c.training.steps) for n, c in configs.items()}
    assert updates.pop("four") + updates.pop("two_stages") == 200 and set(updates.values()) == {200}
    assert configs["two_newest"].training.distill.motion_regression.weight == 1
    evaluations = [sum(int(x) for x in str(configs[n].schedule.steps).ljust(7, "2")[:7]) for n in ("diagonal", "even")]
    assert evaluations[0] == 17 and sum(map(int, "2232323")) == 17 and evaluations[1] == 17


def in_place(monkeypatch):
    """Rows are not trained and measured but noted."""
    made = []

    def trained(row, config, folder, device, until):
        made.append((row.name, config.seed, config.training.init["student"]))
        return folder / "export"

    monkeypatch.setattr(ablate_world, "trained", trained)
    for name in ("check_training", "write_prompts"):
        monkeypatch.setattr(ablate_world, name, lambda *_: None)
    monkeypatch.setattr(ablate_world, "measured", lambda config, student, scenes, batch: {"all": [1.0] * len(scenes)})
    monkeypatch.setattr(ablate_world, "memory", lambda *_: {})
    return made


def test_two_processes_make_each_row_once_and_one_of_two_stages_after_its_first(monkeypatch, tmp_path):
    made, asked = in_place(monkeypatch), ["--output", str(tmp_path), "--num_prompts", "2"]
    for part in ("1/2", "2/2", "1/2"):  # and nothing again
        assert ablate_world.main([*asked, "--part", part]) == 0
    assert sorted(made) == sorted(set(made)) and len(made) == len(SEEDS) * (len(ROWS) + len(PARENTS))
    starts = {(name, seed): start for name, seed, start in made}
    assert re.fullmatch(rf"{tmp_path}/runs/four-1-[0-9a-f]{{8}}/export", starts["two_stages", 1])
    assert starts["diagonal", 1] == "logs/world/causal_start"
    assert len(list((tmp_path / "rows").iterdir())) == len(SEEDS) * len(ROWS)
    two_stages = next(line for line in (tmp_path / "claims.md").read_text().splitlines() if line.startswith("| 6 |"))
    assert "+0.000 (+0.000 .. +0.000)" in two_stages


def test_rows_of_other_settings_or_another_start_are_made_again(monkeypatch, tmp_path):
    made, asked = in_place(monkeypatch), ["--output", str(tmp_path), "--num_prompts", "2", "--rows", "diagonal", "even"]
    assert ablate_world.main([*asked, "--seeds", "0", "1", "2"]) == 0 and len(made) == 6
    assert "+0.000" in (tmp_path / "claims.md").read_text()
    start = tmp_path / "start"
    start.mkdir()
    (start / "a.safetensors").write_bytes(b"weights")
    other, new = ["training.optimizer.lr=2.0e-4"], ["--start", str(start)]
    for change, count in ((other, 2), (new, 2), (new, 0)):
        made.clear()
        assert ablate_world.main([*change, *asked, "--seeds", "0"]) == 0 and len(made) == count, change
        assert "1 of 3 seeds" in (tmp_path / "claims.md").read_text(), "rows of other settings are not compared"
    (start / "a.safetensors").write_bytes(b"others")
    assert ablate_world.main([*new, *asked, "--seeds", "0"]) == 0 and len(made) == 2


def test_no_row_is_begun_when_the_time_is_up(monkeypatch, tmp_path):
    made = in_place(monkeypatch)
    assert ablate_world.main(["--output", str(tmp_path), "--num_prompts", "2", "--minutes", "0"]) == 0 and not made


def test_a_negative_time_is_refused():
    with pytest.raises(UserError, match="--minutes -1.0 is no time"):
        ablate_world.parse(["--minutes", "-1"])


@pytest.mark.parametrize("part", ["0/2", "3/2", "half"])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(UserError, match="is not one of so many"):
        ablate_world.parse(["--part", part])


def test_no_clips_are_refused():
    with pytest.raises(UserError, match="num_prompts 0 is too few"):
        ablate_world.parse(["--num_prompts", "0"])
