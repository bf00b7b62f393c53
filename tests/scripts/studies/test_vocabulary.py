"""What measures or shows one world refuses a model of the other, before anything is loaded or written."""

import importlib

import pytest

from configs.errors import UserError
from pipeline import DiagonalPipeline

TINY, MOVING = "configs/tiny.yaml", "configs/world/world.yaml"


@pytest.mark.parametrize(
    "script, config, asked",
    [
        ("world_sheets", TINY, ["--output", "{out}"]),
        ("evaluate_world", TINY, ["--num_prompts", "2", "--json", "{out}"]),
        ("ablate_world", "configs/train_tiny_distill.yaml", ["--output", "{out}"]),
        ("ablate_tiny", "configs/world/distill.yaml", ["--output", "{out}"]),
        ("explore_schedules", MOVING, ["--quality", "tiny", "--out", "{out}"]),
        ("measure_live", MOVING, ["--json", "{out}"]),
    ],
)
def test_a_model_of_the_other_world_is_refused(script, config, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(DiagonalPipeline, "from_config", lambda *_: pytest.fail("loaded"))
    main = importlib.import_module(f"scripts.{script}").main
    world, lacking = ("moving", "star") if "tiny" in config else ("tiny", "cross")
    with pytest.raises(UserError, match=f"^model.tokenizer=.* lacks {lacking}, .* not of the {world} world; .*yaml$"):
        main(["--config_path", config, *(word.format(out=tmp_path / "out") for word in asked)])
    assert not list(tmp_path.iterdir())
