"""The schedule explorer: costs, fronts and moves by hand-made figures; the script on random weights."""

import importlib.util
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from configs.errors import UserError
from configs.load import load_config
from model.schedule import Schedule
from scripts.studies.schedule_search import Candidate, Costs, Point, front, neighbours, next_candidate

SPEC = importlib.util.spec_from_file_location("explore_schedules", ROOT / "scripts" / "explore_schedules.py")
explore = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(explore)
CONFIG = load_config("configs/tiny.yaml")
COSTS = Costs(step=(10.0, 20.0, 30.0), context=(5.0, 6.0, 7.0), decode=(1.0, 2.0, 3.0))


cost = explore.predictor(COSTS, CONFIG)


def test_names():
    assert Candidate.parse("43", 4).steps == (4, 3, 3, 3)
    assert Candidate.parse("5432222", 3).name == "543"
    clean = Candidate.parse("4+clean", 2)
    assert clean.name == "44+clean"
    for text in ("", "40", "4x", "4+dirty"):
        with pytest.raises(UserError):
            Candidate.parse(text, 3)


def configured(config) -> Schedule:
    return Schedule.from_config(config.schedule, config.stream)


def test_a_candidate_is_the_schedule_that_inference_runs(tmp_path):
    config = CONFIG
    ours = Candidate.parse("5432", 7, "clean").schedule(config)
    told = load_config("configs/tiny.yaml", ["schedule.steps=5432", "stream.context=clean"])
    assert str(ours) == str(Schedule.from_config(told.schedule, told.stream))
    release = load_config("configs/tiny.yaml", ["schedule={preset: release, steps: '4322222'}"])
    assert str(Candidate.parse("432", 7).schedule(release)) == str(configured(release)), "its own timesteps"
    kept = ["stream.context_by_chunk={0: renoise}"]
    forcing = load_config("configs/self_forcing.yaml", kept)
    assert Candidate.parse("4", 7, "clean").schedule(forcing).table(7) == configured(forcing).table(7)
    (tmp_path / "point.yaml").write_text(explore.to_yaml(Candidate.parse("432", 7).apply(config)))
    again = load_config(tmp_path / "point.yaml")
    assert str(Schedule.from_config(again.schedule, again.stream)) == str(Candidate.parse("432", 7).schedule(config))


def test_costs_are_sums_of_their_parts():
    assert cost(Candidate((3, 2, 1))) == 30 + 40 + 30 + 6
    assert cost(Candidate((3, 2, 1), "clean")) == 106 + 18
    mixed = load_config("configs/tiny.yaml", ["stream.context_by_chunk={1: clean}"])
    assert explore.predictor(COSTS, mixed)(Candidate((3, 2, 1))) == 106 + 6, "exceptions count"
    spans = [{"text": 9.0, "step 0": 0.01, "step 1": 0.03, "decode": 0.002}, {"step 0": 0.02, "decode": 0.001}]
    measured = Costs.measured([spans, [dict(spans[0], context=0.5), spans[1]]])
    assert measured.step == pytest.approx((20, 20)) and measured.context == pytest.approx((500, 20))
    assert measured.decode == pytest.approx((2, 1))


def test_the_front_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    points = [Point(Candidate((i % 9 + 1,)), float(x), float(y)) for i, (x, y) in enumerate(rng.random((60, 2)))]
    naive = [p for p in points if not any(q.latency_ms < p.latency_ms and q.quality >= p.quality for q in points)]
    assert front(points) == sorted(naive, key=lambda p: p.latency_ms)


def test_neighbours_fall_and_are_one_move_away():
    start = Candidate((4, 3, 2))
    found = list(neighbours(start))
    assert len(set(found)) == len(found) and start not in found
    naive = {
        Candidate(steps)
        for steps in itertools.product(range(1, 7), repeat=3)
        if steps[0] >= steps[1] >= steps[2]
        and sorted(b - a for a, b in zip(start.steps, steps, strict=True)) in ([0, 0, 1], [-1, 0, 0], [-1, 0, 1])
    }
    assert set(found) == naive


def test_the_search_climbs_within_the_budget():
    """Quality that counts early steps more: the best within the budget puts them first."""

    def quality(c: Candidate) -> float:
        return 5 * c.steps[0] + 2 * c.steps[1] + c.steps[2]

    points = [Point(c, cost(c), quality(c)) for c in (Candidate((1, 1, 1)),)]
    for _ in range(40):
        candidate = next_candidate(points, cost, budget_ms=150)
        if candidate is None:
            break
        assert cost(candidate) <= 150 and candidate not in {p.candidate for p in points}
        points.append(Point(candidate, cost(candidate), quality(candidate)))
    rows = [Candidate(s) for s in itertools.product(range(1, 7), repeat=3) if s[0] >= s[1] >= s[2]]
    best = max((c for c in rows if cost(c) <= 150), key=quality)
    assert max(points, key=lambda p: p.quality).candidate == best


def test_the_script_on_random_weights(tiny_assets, tmp_path, capsys):
    arguments = ["--config_path", str(tiny_assets / "tiny.yaml"), "--out", str(tmp_path), "--num_prompts", "2"]
    arguments += ["--schedules", "1", "21", "2+clean", "--reference", "3", "--budget_ms", "1e6", "--max_runs", "4"]
    assert explore.main(arguments) == 0
    out = capsys.readouterr().out
    assert "PSNR" in out and "predicted" in out
    data = json.loads((tmp_path / "points.json").read_text())
    names = [run["name"] for run in data["runs"]]
    assert names[:3] == ["11", "21", "22+clean"] and len(names) == 4
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
        (["--budget_ms", "0"], "budget_ms=0.0 is not above 0"),
        (["--num_prompts", "0"], "--num_prompts: 0 is less than 1"),
        (["--config_path", "none.yaml"], "none.yaml does not exist"),
    ],
)
def test_mistakes_are_one_sentence(arguments, said, tmp_path):
    with pytest.raises(UserError, match=said):
        explore.main([*arguments, "--out", str(tmp_path / "new")])
