"""What sending video costs: the script on a small scene, and what it refuses."""

import importlib.util
import json

import pytest

from configs.load import CHECKOUT

SPEC = importlib.util.spec_from_file_location("measure_encoding", CHECKOUT / "scripts" / "measure_encoding.py")
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


def test_both_ways_are_measured(tmp_path, capsys):
    sizes = ["--height", "64", "--width", "96", "--chunks", "2", "--json", str(tmp_path / "x.json")]
    assert script.main(sizes) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    assert "fmp4" in printed and found["chunks"] == 2
    assert 0 < found["fmp4"]["bytes_a_second"] < found["jpeg"]["bytes_a_second"]


@pytest.mark.parametrize("arguments, words", [(["--height", "31"], "--height=31"), (["--chunks", "0"], "--chunks: 0"),
                                              (["--encoder", "none", "--height", "64"], "--encoder=none")])  # fmt: skip
def test_what_cannot_be_measured_is_a_sentence(arguments, words):
    with pytest.raises(script.UserError, match=words):
        script.main(arguments)
