"""scripts/compare.py with stand-ins for both programs."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from configs.errors import UserError

SPEC = importlib.util.spec_from_file_location("compare", ROOT / "scripts" / "compare.py")
compare = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compare)

PEER = """
import json, shutil, sys
prompt, seed, out, log = sys.argv[1:]
open(log, "a").write(json.dumps(["theirs", prompt, seed]) + "\\n")
shutil.copy(sys.argv[0].replace("peer.py", "clip.mp4"), out)
"""


@pytest.fixture
def peer(tmp_path) -> str:
    """A command that copies a clip and notes what it was asked for."""
    import numpy as np

    from utils.video import VideoWriter

    frames = np.random.default_rng(0).integers(0, 255, (21, 32, 48, 3), dtype=np.uint8)
    with VideoWriter(tmp_path / "clip.mp4", 16, (32, 48)) as video:
        video.write(frames)
    (tmp_path / "peer.py").write_text(PEER)
    return f"{sys.executable} {tmp_path / 'peer.py'} {{prompt}} {{seed}} {{out}} {tmp_path / 'log'}"


def test_in_turns_and_in_pairs(peer, tmp_path, monkeypatch, capsys):
    def ours(config, overrides, prompt, seed, folder):
        """Inference's stand-in: the same clip, under a name of its own, with a JSON."""
        code = (
            "import json, pathlib, shutil, sys; f = pathlib.Path(sys.argv[1]); f.mkdir(parents=True); "
            f"open({str(tmp_path / 'log')!r}, 'a').write(json.dumps(['ours', *sys.argv[2:]]) + chr(10)); "
            f"shutil.copy({str(tmp_path / 'clip.mp4')!r}, f / 'x.mp4'); "
            "(f / 'x.json').write_text(json.dumps({'nfe': 17, 'timings_s': {'total': 9, 'first_frames': 0.5}}))"
        )
        return [sys.executable, "-c", code, str(folder), prompt, str(seed)]

    log = tmp_path / "log"

    def clock() -> float:
        """Each of their commands takes 2 s, each of ours 1."""
        calls = log.read_text().splitlines() if log.exists() else []
        return sum(2 if "theirs" in call else 1 for call in calls)

    monkeypatch.setattr(compare, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(compare, "our_command", ours)
    out = tmp_path / "out"
    arguments = ["--ours", "configs/tiny.yaml", "--theirs", peer, "--out", str(out), "--seeds", "3", "4"]
    arguments += ["--prompt", "a 'quoted' {seed} $HOME circle", "--prompt", "b"]
    assert compare.main(arguments) == 0
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert [side for side, *_ in calls] == ["theirs", "ours", "ours", "theirs"] * 2
    assert calls[0] == ["theirs", "a 'quoted' {seed} $HOME circle", "3"]
    assert sorted(c[1:] for c in calls if c[0] == "ours") == sorted(c[1:] for c in calls if c[0] == "theirs")
    found = json.loads((out / "compare.json").read_text())
    assert found["speed_ratio"]["n"] == 4 and found["speed_ratio"]["value"] == pytest.approx(2)
    report = json.loads((out / "report.json").read_text())
    assert len(report["pairs"]) == 4 and report["differences"]["motion"]["value"] == 0
    mine = report["folders"][1]["clips"][0]
    assert mine["nfe"] == 17 and mine["first_frames"] == 0.5 and mine["seconds"] == 1
    assert "times as fast over 4 clips" in capsys.readouterr().out
    names = {f"000{i}{suffix}" for i in range(4) for suffix in (".mp4", ".json")}
    assert {path.name for path in (out / "ours").iterdir()} == names


def test_ratios_are_geometric():
    rows = [{"theirs": 4.0, "ours": 1.0}, {"theirs": 1.0, "ours": 1.0}]
    ratio = compare.speed_ratio(rows)
    assert ratio.value == pytest.approx(2) and ratio.low * ratio.high == pytest.approx(4)
    assert math.isinf(compare.speed_ratio(rows[:1]).high)


def test_ours_is_inference():
    command = compare.our_command("c.yaml", ["a=b"], "-x", 3, Path("folder"))
    assert command[1:] == [
        str(ROOT / "inference.py"),
        *("--config_path", "c.yaml", "--overwrite", "--prompt=-x", "--seed=3", "--output_folder=folder", "a=b"),
    ]


@pytest.mark.parametrize(
    "theirs, said",
    [
        ("nothing {prompt}", "lacks {out}"),
        ("'open {prompt} {out}", "cannot be read"),
        ("no-such-program {prompt} {out}", "did not run"),
        (f"{sys.executable} -c 'raise SystemExit(\"no weights\")' {{prompt}} {{out}}", r"ended with 1 \(no weights\)"),
        (f"{sys.executable} -c pass {{prompt}} {{out}}", "did not write"),
    ],
)
def test_a_peer_that_does_not_work(theirs, said, tmp_path):
    with pytest.raises(UserError, match=said):
        arguments = ["--ours", "configs/tiny.yaml", "--theirs", theirs, "--prompt", "x"]
        compare.run_theirs(compare.parse_arguments(arguments), "x", 0, tmp_path / "v.mp4")


def test_ours_runs_for_real(peer, tiny_assets, tmp_path):
    out = tmp_path / "real"
    arguments = ["--ours", str(tiny_assets / "tiny.yaml"), "--theirs", peer, "--out", str(out)]
    assert compare.main([*arguments, "--prompt", "a red circle", "schedule.steps=1", "video.num_latent_frames=3"]) == 0
    clip = json.loads((out / "report.json").read_text())["folders"][1]["clips"][0]
    assert (clip["frames"], clip["prompt"], clip["nfe"]) == (9, "a red circle", 1)
