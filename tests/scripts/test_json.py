"""`--json FILE` of the scripts that measure."""

import importlib

import pytest

from configs.errors import UserError

MEASURING = ("benchmark", "benchmark_training", "evaluate_world", "measure_live", "measure_memory", "soak")


@pytest.mark.parametrize("name", MEASURING)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(name, tmp_path):
    parse = importlib.import_module(f"scripts.{name}").parse
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="^--json=.* is there and is no file"):
        parse(["--json", str(tmp_path)])
    with pytest.raises(UserError, match="^--json=.* cannot be a folder because"):
        parse(["--json", str(tmp_path / "file" / "figures.json")])
    assert parse(["--json", str(tmp_path / "new" / "figures.json")]).json and not (tmp_path / "new").exists()
