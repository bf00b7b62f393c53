"""The schedule explorer: names and fronts by hand-made figures; the script on random weights."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from configs.errors import UserError
from configs.load import load_config
from model.schedule import Schedule
from scripts import explore_schedules as explore

Candidate = explore.Candidate
CONFIG = load_config("configs/tiny.yaml")


def test_candidates_are_named_by_their_steps():
    assert Candidate.parse("43", 4).steps == (4, 3, 3, 3)
    assert Candidate.parse("5432222", 3).name == "543"
    clean = Candidate.parse("4+clean", 2)
    assert clean.name == "44+clean"
    for text in ("", "40", "4x", "4+", "4+dirty"):
        with pytest.raises(UserError):
            Candidate.parse(text, 3)


def configured(config) -> Schedule:
    return Schedule.from_config(config.schedule, config.stream)


def test_a_candidate_is_the_schedule_that_inference_runs(tmp_path):
    config = CONFIG
    ours = Candidate.parse("5432+clean", 7).schedule(config)
    told = load_config("configs/tiny.yaml", ["schedule.steps=5432", "stream.context=clean"])
    assert str(ours) == str(Schedule.from_config(told.schedule, told.stream))
    release = load_config("configs/tiny.yaml", ["schedule.preset=release"])
    assert str(Candidate.parse("432", 7).schedule(release)) == str(configured(release)), "its own timesteps"
    forcing = load_config("configs/self_forcing.yaml")
    assert Candidate.parse("4+clean", 7).schedule(forcing).table(7) == configured(forcing).table(7)
    (tmp_path / "point.yaml").write_text(explore.to_yaml(Candidate.parse("432", 7).apply(config)))
    again = load_config(tmp_path / "point.yaml")
    assert str(Schedule.from_config(again.schedule, again.stream)) == str(Candidate.parse("432", 7).schedule(config))


def test_the_front_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    runs = [SimpleNamespace(latency_ms=x, quality=SimpleNamespace(value=y)) for x, y in rng.random((60, 2))]
    naive = [
        run
        for run in runs
        if not any(r.latency_ms < run.latency_ms and r.quality.value >= run.quality.value for r in runs)
    ]
    assert explore.front(runs) == sorted(naive, key=lambda run: run.latency_ms)


def test_the_script_on_random_weights(tiny_assets, tmp_path, capsys):
    arguments = ["--config_path", str(tiny_assets / "tiny.yaml"), "--out", str(tmp_path), "--num_prompts", "2"]
    arguments += ["--schedules", "1", "21", "2+clean", "--reference", "3"]
    assert explore.main(arguments) == 0
    assert "PSNR" in capsys.readouterr().out
    data = json.loads((tmp_path / "points.json").read_text())
    names = [run["name"] for run in data["runs"]]
    assert names == ["11", "21", "22+clean"]
    assert all(run["quality"]["value"] > 0 and run["latency_ms"] > run["first_ms"] > 0 for run in data["runs"])
    chosen = {run["name"] for run in data["runs"] if run["on_front"]}
    assert {path.stem for path in (tmp_path / "front").glob("*.yaml")} == chosen
    for path in (tmp_path / "front").glob("*.yaml"):
        load_config(path)


@pytest.mark.parametrize("quality", ["tiny", "reference"])
def test_one_clip_of_one_chunk_has_no_interval_and_no_seam(quality, tmp_path, capsys):
    asked = ["--num_prompts", "1", "--rounds", "1", "--schedules", "1", "--reference", "2", "--quality", quality]
    assert explore.main([*asked, "--out", str(tmp_path), "video.num_latent_frames=3"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| 1 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert float(cells[5]) > 0 and cells[6:8] == ["- .. -", "-"]
    (run,) = json.loads((tmp_path / "points.json").read_text())["runs"]
    assert (run["quality"]["low"], run["quality"]["n"], run["measures"]["seam"]) == (None, 1, None)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--schedules", "40"], "schedules=40 is no schedule"),
        (["--seed", "-4"], "--seed -4 is too little"),
        (["--num_prompts", "0"], "--num_prompts: 0 is less than 1"),
        (["--config_path", "none.yaml"], "none.yaml does not exist"),
    ],
)
def test_mistakes_are_one_sentence(arguments, said, tmp_path):
    with pytest.raises(UserError, match=said):
        explore.main([*arguments, "--out", str(tmp_path / "new")])
