"""The ablation end to end on random tiny networks: rows, resuming, figures against known clips, the table."""

import json
import shlex

import pytest
import torch
from distill_case import CPU, distill_config

from configs.errors import UserError
from configs.load import load_config, to_yaml
from scripts import ablate_tiny
from scripts.studies import ablation
from scripts.studies.ablation_table import markdown
from scripts.studies.clips import Bench, bootstrap
from trainer.tiny.captions import parse_caption
from trainer.tiny.world import TinyWorld
from utils.intervals import mean_interval

SMALL = ["--num_prompts", "3", "--long_prompts", "2", "--long_frames", "18", "--eval_batch", "2", "--steps", "2",
         "--open_prompts", "2"]  # fmt: skip


@pytest.fixture
def ablate(tiny_assets, tmp_path, monkeypatch, capsys):
    """Calls the script's main on random weights; returns what it prints."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(ablate_tiny, "check_world", lambda *_: None)  # of random networks, with few words
    (tmp_path / "case.yaml").write_text(to_yaml(distill_config(tiny_assets)))
    where = ["--config_path", str(tmp_path / "case.yaml"), "--output", str(tmp_path / "out")]

    def call(*arguments: str) -> str:
        assert ablate_tiny.main([*where, *SMALL, *arguments]) == 0
        return capsys.readouterr().out

    precision = torch.get_float32_matmul_precision()
    yield call
    torch.set_float32_matmul_precision(precision)


def test_rows_are_trained_measured_and_not_made_again(ablate, tmp_path):
    out = tmp_path / "out"
    names = ["teacher", "start", "self_forcing", "4322222"]
    said = ablate("--rows", *names)
    rows = {name: json.loads((out / "rows" / f"{name}.json").read_text()) for name in names}
    assert [rows[name]["nfe"] for name in names] == [100, 11, 20, 11]  # 4 chunks: 4+3+2+2, 4 x (4+1)
    assert rows["start"]["cpu_seconds"] == rows["4322222"]["cpu_seconds"], "the same schedule is timed once"
    assert "long_drift" in rows["start"]["columns"] and "long_drift" not in rows["teacher"]["columns"]
    assert rows["start"]["columns"]["colour"]["n"] == 3
    assert (out / "table.md").read_text() in said
    assert len(json.loads((out / "table.json").read_text())["rows"]) == 4

    trainings = sorted((out / "runs").iterdir())
    assert [t.name.partition("-")[0] for t in trainings] == ["4322222", "self_forcing"]
    before = {t: (t / "export" / "card.json").stat().st_mtime_ns for t in trainings}
    written = (out / "rows" / "start.json").stat().st_mtime_ns
    ablate("--rows", "start", "4322222", "--num_prompts", "2")  # measured again, but not trained
    assert {t: (t / "export" / "card.json").stat().st_mtime_ns for t in trainings} == before
    assert (out / "rows" / "start.json").stat().st_mtime_ns > written
    written = (out / "rows" / "start.json").stat().st_mtime_ns
    older = json.loads((out / "rows" / "teacher.json").read_text())
    del older["asked"]["open_clips"]
    (out / "rows" / "teacher.json").write_text(json.dumps(older))
    assert "teacher" not in ablate("--rows", "start", "--num_prompts", "2"), "an earlier version measured otherwise"
    assert (out / "rows" / "start.json").stat().st_mtime_ns == written, "it is there"


def test_the_examples_of_its_help_are_valid(tiny_assets):
    examples = [line.strip() for line in ablate_tiny.__doc__.splitlines() if line.startswith("    bash ")]
    for example in [*examples, "bash it --rows start training.init.student=assets/tiny/student"]:
        args = ablate_tiny.parse(shlex.split(example, comments=True)[2:])
        assert [ablation.row_config(args.config_path, row, args.settings) for row in ablation.chosen(args.rows)]
    assert (args.rows, args.settings) == (["start"], ["training.init.student=assets/tiny/student"])


def test_every_row_is_a_run_of_the_base_with_its_own_settings(tiny_assets):
    base = "configs/train_tiny_ablation.yaml"
    configs = {row.name: ablation.row_config(base, row, ["seed=5"]) for row in ablation.ROWS}
    assert all(config.seed == 5 and config.training.stage == "distill" for config in configs.values())
    assert configs["cut_flow"].training.distill.flow.gradient_cut and configs["no_forcing"].stream.context == "clean"
    trained = [to_yaml(configs[row.name]) for row in ablation.ROWS if row.start is None]
    assert len(set(trained)) == len(trained) == 11
    shipped = load_config("configs/train_tiny_distill.yaml", ["seed=5"])
    ours, theirs = (to_yaml(config).splitlines() for config in (configs["4322222"], shipped))
    changed = {line.split(":")[0].strip() for line in set(ours) ^ set(theirs)}
    assert changed == {"name", "max_checkpoints", "validation_clips"}, "what is ablated is what is shipped"
    a, b = (distill_config(tiny_assets, f"training.steps={n}") for n in (4, 5))
    assert ablation.fingerprint(a) == ablation.fingerprint(a) != ablation.fingerprint(b)


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--rows", "teachers"], "--rows teachers is unknown; use some of teacher, start"),
    (["--num_prompts", "1"], "--num_prompts 1 is too few"),
    (["--open_prompts", "1"], "--open_prompts 1 is too few"),
    (["--long_frames", "17"], "17 latent frames are not a whole number of chunks"),
    (["training.init.student=nowhere"], "nowhere"),
])  # fmt: skip
def test_bad_input_is_one_sentence(ablate, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        ablate(*arguments)


def test_rendered_clips_score_as_they_should(tiny_assets):
    """The columns of a maker that renders what the captions say: all right; and of one that always starts alike."""
    config = distill_config(tiny_assets, "video={height: 64, width: 96, num_latent_frames: 12}")
    sizes = {"clips": 24, "open_clips": 30, "long_clips": 2, "long_frames": 15, "batch": 8, "seed": 3}
    bench, world = Bench(config, CPU, **sizes), TinyWorld()
    scenes = dict(zip(bench.prompts, bench.scenes, strict=True))
    scenes |= zip(bench.open_prompts, world.scenes(3, 30, balanced=True), strict=True)
    assert all(parse_caption(prompt)["direction"] is None for prompt in bench.open_prompts)

    def maker(spread: bool):
        def make(prompts, seeds, frames):
            shown = [scenes[prompt] for prompt in prompts] if spread else [bench.scenes[0]] * len(prompts)
            return ((world.render(shown, 4 * frames - 3) + 1) * 127.5).round().to(torch.uint8)

        return make

    right, alike = (bench.columns(maker(spread), endless=True) for spread in (True, False))
    for name in ("colour", "shape", "axis", "direction", "background", "speed", "consistency", "all"):
        assert right[name].value > 0.95
    assert right["speed_ratio"].value == pytest.approx(1, abs=0.05) and abs(right["motion"].value - 1) < 0.2
    assert right["frechet"].value < 0.5 * alike["frechet"].value and alike["colour"].value < 0.5
    assert right["heading_spread"].value > 0.7 and alike["heading_spread"].value < 0.5
    assert abs(right["long_drift"].value) < 0.1 and abs(right["seam"].value - 1) < 0.2


def test_bootstrap_of_a_mean_is_the_normal_interval():
    x = torch.randn(400, generator=torch.Generator().manual_seed(1))
    ours, known = bootstrap(lambda some: float(some["x"].mean()), {"x": x}), mean_interval(x)
    assert ours.value == pytest.approx(known.value)
    assert ours.high - ours.low == pytest.approx(known.high - known.low, rel=0.15)


def test_the_table_leaves_out_what_is_not_known():
    figure = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 4}
    row = {"name": "4322222", "title": "ours", "nfe": 17, "cpu_seconds": 1.234, "steps": 3}
    columns = {"colour": figure, "axis": figure | {"low": 0.1}, "start_spread": {"value": 3, "low": None, "high": None}}
    row |= {"columns": columns, "asked": {"clips": 4, "open_clips": 9, "long_clips": 0, "long_frames": 81}}
    costs, rest = (table.splitlines() for table in markdown([row]).split("\n\n")[:2])
    assert costs[2].startswith("| ours | 17 | 1.23 | 50.0 ± 25.0 | - |")
    assert rest[2] == "| ours | 50.0 (10.0 .. 75.0) | - | - | - | - | - | 3.0 | - |"
    assert all(len({line.count("|") for line in table}) == 1 for table in (costs, rest))
