"""The schedule explorer: names and fronts by hand-made figures; the script on random weights."""

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from configs.errors import UserError
from configs.load import load_config
from model.schedule import Schedule

SPEC = importlib.util.spec_from_file_location("explore_schedules", ROOT / "scripts" / "explore_schedules.py")
explore = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(explore)
Candidate = explore.Candidate
CONFIG = load_config("configs/tiny.yaml")


def test_names():
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
    release = load_config("configs/tiny.yaml", ["schedule={preset: release, steps: '4322222'}"])
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
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_the_reference_agrees_with_itself(tiny_assets):
    config = load_config(tiny_assets / "tiny.yaml")
    bench = explore.Benchmark(config, ["a red circle moves right"], 0, "reference", "2")
    assert bench.run(Candidate((2, 2))).quality.value == 100
    assert bench.run(Candidate((1, 1))).quality.value < 100


def test_times_are_taken_in_turns():
    """On a machine that gets slower and slower, schedules of equal work come out equal."""
    bench, calls = explore.Benchmark.__new__(explore.Benchmark), []

    def pipe(name):
        def make(prompt, seed):
            calls.append((name, prompt, seed))
            timings = [{"step 0": 1.0 * len(calls), "text": 99.0}, {"decode": 1.0}]
            return SimpleNamespace(videos=[SimpleNamespace(timings=timings)])

        return make

    bench.prompts, bench.seeds, bench._pipe = ["a", "b"], [5, 6], lambda candidate: pipe(candidate.name)
    runs = [explore.Run(Candidate((n,)), n, explore.Interval(1, 1, 1, 1), {}, []) for n in (1, 2)]
    first, second = bench.in_turns(runs, 3)
    one_round = [("1", "a", 5), ("1", "a", 5), ("2", "a", 5), ("2", "a", 5)]
    assert calls[:4] == one_round and calls[4:8] == [(name, "b", 6) for name, _, _ in one_round] and len(calls) == 12
    assert [run.first_ms for run in (first, second)] == [6000, 8000] and first.latency_ms == 7000


def test_tiny_quality_is_the_share_of_attributes(tiny_assets):
    bench = explore.Benchmark.__new__(explore.Benchmark)
    world = explore.TinyWorld()
    scenes = world.scenes(1, 3)
    bench.reference, bench.prompts = None, [explore_caption(scene) for scene in scenes]
    clips = list(((world.render(scenes) + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2).contiguous().numpy())
    assert bench._qualities(clips).tolist() == [1, 1, 1]
    bench.prompts = bench.prompts[1:] + bench.prompts[:1]
    assert bench._qualities(clips).max() < 1


def explore_caption(scene) -> str:
    from trainer.tiny.world import caption

    return caption(scene)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--schedules", "40"], "schedules=40 is no schedule"),
        (["--num_prompts", "0"], "--num_prompts: 0 is less than 1"),
        (["--config_path", "none.yaml"], "none.yaml does not exist"),
    ],
)
def test_mistakes_are_one_sentence(arguments, said, tmp_path):
    with pytest.raises(UserError, match=said):
        explore.main([*arguments, "--out", str(tmp_path / "new")])
