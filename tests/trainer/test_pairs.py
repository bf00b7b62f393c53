"""Trajectories: making them, both layouts, and what trains on them."""

import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO

import lmdb
import pytest
import torch
from conftest import ROOT
from distill_case import CPU, distill_config, distill_stage

from configs.errors import UserError
from configs.load import to_yaml
from model.causal_wan import chunk_causal_mask
from model.flow import v_from_x0
from trainer.pairs import SELF_FORCING, TIMESTEPS, open_pairs, write_timesteps
from trainer.registry import build_stage
from trainer.trajectories import CausalTrajectoryMaker, TrajectoryMaker
from utils.distributed import Ranks


def script(name: str, *arguments: str) -> str:
    """What a script prints, run in this process."""
    main = import_module(f"scripts.{name}").main
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
        patch.setattr(sys, "argv", [name, *arguments])
        assert main() == 0
    return out.getvalue()


def write_lmdb(folder, path):
    """The trajectories of a folder as Self-Forcing's create_lmdb_iterative.py stores them."""
    pairs = open_pairs("pairs", folder)
    states = [pairs.read([i])[0].contiguous().numpy() for i in range(len(pairs))]
    path.mkdir(exist_ok=True)
    with lmdb.open(str(path), map_size=1 << 26) as env, env.begin(write=True) as transaction:
        for i, (prompt, value) in enumerate(zip(pairs.prompts, states, strict=True)):
            transaction.put(f"latents_{i}_data".encode(), value.tobytes())
            transaction.put(f"prompts_{i}_data".encode(), prompt.encode())
        transaction.put(b"latents_shape", " ".join(str(n) for n in (len(states), *states[0].shape)).encode())
        transaction.put(b"prompts_shape", str(len(states)).encode())
    return path


@pytest.fixture(scope="module")
def folder(tiny_assets, tmp_path_factory):
    """Three trajectories of the tiny case."""
    out = tmp_path_factory.mktemp("pairs")
    (out / "case.yaml").write_text(to_yaml(distill_config(tiny_assets)))
    arguments = ["--config_path", str(out / "case.yaml"), "--output_folder", str(out / "pairs"), "--steps", "4"]
    script("generate_ode_pairs", *arguments, "--count", "2")
    first = (out / "pairs" / "00001.pt").stat().st_mtime_ns
    assert "3 trajectories of 6 states" in script("generate_ode_pairs", *arguments, "--count", "3")
    assert (out / "pairs" / "00001.pt").stat().st_mtime_ns == first, "what is there is left alone"
    return out / "pairs"


def test_counts_below_one_are_refused(tmp_path):
    with pytest.raises(UserError, match="--batch_size: 0 is less than 1; give 1 or more"):
        script("generate_ode_pairs", "--output_folder", str(tmp_path / "pairs"), "--batch_size", "0")
    assert not list(tmp_path.iterdir())


def test_trajectories_follow_the_teacher(tiny_assets):
    """Each state follows from the one before by the teacher's v, integrated over finer steps."""
    config = distill_config(tiny_assets)
    maker = TrajectoryMaker(config, CPU, steps=4, guidance=0.5)
    states = maker.make([1])[0]
    assert maker.timesteps[0] == 1000 and maker.timesteps[-1] == 0 and len(states) == len(maker.timesteps)
    torch.testing.assert_close(maker.make([2, 1])[1], states, rtol=1e-4, atol=1e-5)
    assert torch.equal(states, maker.make([1])[0]) and not torch.equal(states, maker.make([2])[0])
    x, text = states[:1], maker.encoder([maker.prompts[1]])
    for t, t_next in zip(maker.grid, maker.grid[1:], strict=False):
        with torch.no_grad():
            cond, null = (maker.teacher.x0(x, t, y) for y in (text, maker.null))
        x0 = cond + 0.5 * (cond - null)
        x = x + v_from_x0(x, x0, torch.tensor([t])) * (t_next - t) / 1000
        if t_next in maker.timesteps:
            torch.testing.assert_close(x[0], states[maker.timesteps.index(t_next)], rtol=1e-3, atol=1e-4)


def test_lmdb_holds_what_the_folder_holds(folder, tmp_path):
    with pytest.raises(UserError, match="6 states at unknown timesteps"):
        open_pairs("pairs", write_lmdb(folder, tmp_path))
    shutil.copy(folder / TIMESTEPS, tmp_path)
    a, b = open_pairs("pairs", folder), open_pairs("pairs", tmp_path)
    assert a.prompts == b.prompts and a.timesteps == b.timesteps and len(a) == len(b) == 3
    assert torch.equal(a.read([2, 0]), b.read([2, 0])) and a.read([0]).shape == (1, 6, 12, 16, 4, 6)


def test_self_forcings_layout_without_timesteps(tmp_path):
    """Five states of one prompt a file, as its scripts write them."""
    for i, prompt in enumerate(["a cat", "a dog", "a cat"]):
        torch.save({prompt: torch.randn(1, 5, 3, 16, 4, 6)}, tmp_path / f"{i:05d}.pt")
    pairs = open_pairs("pairs", tmp_path)
    assert pairs.timesteps == SELF_FORCING and SELF_FORCING[1] == pytest.approx(960)
    again = open_pairs("pairs", write_lmdb(tmp_path, tmp_path / "lmdb"))
    assert again.timesteps == SELF_FORCING and torch.equal(again.read([1]), pairs.read([1]))


def test_unknown_timesteps_and_empty_folders_are_refused(tmp_path):
    torch.save({"a cat": torch.randn(1, 4, 3, 16, 4, 6)}, tmp_path / "00000.pt")
    with pytest.raises(UserError, match="4 states at unknown timesteps"):
        open_pairs("pairs", tmp_path)
    with pytest.raises(UserError, match="holds no trajectories; make some with python scripts/generate_ode_pairs"):
        open_pairs("pairs", tmp_path / "nothing")


def test_regression_terms_are_on_where_pairs_are_given(tiny_assets, folder, tmp_path):
    stage = distill_stage(tiny_assets, f"training.distill.pairs={folder}")
    stage.begin(0, tmp_path)
    assert stage.check_gradients().names == ("spatial", "flow", "regression", "regression_flow")
    plan = stage.planner.draw("generator", 0)
    batch = stage._draw("generator", 0, 0, plan)
    states = stage.pairs.read(range(3)).float()
    start = torch.cat([batch["noise"][:, [0]], batch["noise"][:, [5]]], dim=1).flatten(1, 2)  # chunks 0 and 1
    matches = [[torch.equal(start[b], states[i, 0, :6]) for i in range(3)] for b in range(2)]
    assert all(sum(row) == 1 for row in matches)
    assert all(torch.equal(batch["target"][b], states[row.index(True), -1]) for b, row in enumerate(matches))
    assert all(value.isfinite() for value in stage.update(0).values())


@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_causal_trajectories_are_those_of_all_chunks_at_once_given_their_ends(tiny_assets, guidance):
    """Integrated without a cache: one sequence [ends ; noisy] under the mask of teacher forcing, no cache."""
    config = distill_config(tiny_assets, f"training.init.teacher={tiny_assets / 'student'}")
    maker = CausalTrajectoryMaker(config, CPU, steps=4, guidance=guidance)
    states = maker.make([1])[0]
    assert states.shape[:2] == (len(maker.timesteps), 12) and torch.equal(states, maker.make([1])[0])
    torch.testing.assert_close(maker.make([1, 2])[0], states, rtol=1e-4, atol=1e-5)
    ends, mask = states[-1:], chunk_causal_mask(maker.geometry, 12, CPU, teacher_forcing=True)
    x, frame_ids, zeros = states[:1], torch.arange(12).repeat(2), torch.zeros(1, 12)
    texts = [maker.encoder([maker.prompts[1]]), maker.null]
    for t, t_next in zip(maker.grid, maker.grid[1:], strict=False):
        both, times = torch.cat([ends, x], dim=1), torch.cat([zeros, zeros + t], dim=1)
        with torch.no_grad():
            v, null = (maker.teacher.model(both, times, y, mask=mask, frame_ids=frame_ids)[:, 12:] for y in texts)
        x = x + (v + guidance * (v - null)) * (t_next - t) / 1000
        if t_next in maker.timesteps:
            torch.testing.assert_close(x[0], states[maker.timesteps.index(t_next)], rtol=1e-3, atol=1e-4)


def test_regression_on_causal_trajectories(tiny_assets, tmp_path):
    """Made by the script, as LMDB too; the student sees their ends, noised, and states of each chunk's own row."""
    teacher = f"training.init.teacher={tiny_assets / 'student'}"
    (tmp_path / "case.yaml").write_text(to_yaml(distill_config(tiny_assets, teacher)))
    arguments = ["--config_path", str(tmp_path / "case.yaml"), "--output_folder", str(tmp_path / "pairs")]
    script("generate_ode_pairs", *arguments, "--steps", "2", "--count", "3", "--batch_size", "2", "--causal")
    with pytest.raises(UserError, match="trajectories of another kind"):
        write_timesteps(tmp_path / "pairs", [1000.0, 0.0], causal=False)
    shutil.copy(tmp_path / "pairs" / TIMESTEPS, write_lmdb(tmp_path / "pairs", tmp_path / "lmdb"))
    stages = []
    for kept in ("lmdb", "pairs"):
        extra = ["training.stage=ode_regression", f"training.distill.pairs={tmp_path / kept}"]
        extra += ["training.optimizer.lr=3e-3", "training.flow.context_timesteps=[0.0, 357.142857]"]
        stages.append(build_stage(distill_config(tiny_assets, *extra), CPU, Ranks()))
    one, other = (stage.batch(3, 0) for stage in stages)
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [torch.tensor(stages[0].schedule.timesteps(chunk)) for chunk in range(4)]
    batches = [stages[0].batch(step, 0) for step in range(12)]
    for chunk, row in enumerate(rows):
        seen = torch.cat([batch["t"][:, 3 * chunk] for batch in batches])
        assert all((row - t).abs().min() < 0.01 for t in seen) and len(seen.unique()) == len(row)
    for batch in batches:
        clean = batch["context_t"][:, 0] == 0
        same = (batch["context"] == batch["target"]).flatten(1).all(1)
        assert torch.equal(clean, same) and batch["context_t"].unique().numel() <= 2
    losses = [stages[0].update(step)["loss"].item() for step in range(30)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    with pytest.raises(UserError, match="lacks states at timesteps"):
        build_stage(distill_config(tiny_assets, *extra, "schedule.steps=6"), CPU, Ranks())


def test_ode_regression_learns(tiny_assets, folder):
    extra = ["training.stage=ode_regression", f"training.distill.pairs={folder}", "training.optimizer.lr=3e-3"]
    stage = build_stage(distill_config(tiny_assets, *extra), CPU, Ranks())
    batch = stage.batch(0, 0)
    known = torch.tensor(stage.pairs.timesteps[:-1])
    assert all((known - t).abs().min() < 1e-3 for t in batch["t"].unique())
    states = stage.pairs.read(range(3)).float()
    for b in range(2):
        index = [torch.equal(batch["target"][b], x[-1]) for x in states].index(True)
        for chunk in range(4):
            at = min(range(5), key=lambda i, t=batch["t"][b, 3 * chunk]: abs(stage.pairs.timesteps[i] - t))
            assert torch.equal(batch["x_t"][b, 3 * chunk], states[index, at, 3 * chunk])
    losses = [stage.update(step)["loss"].item() for step in range(40)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


# --- damaged and hostile ----------------------------------------------------------------------------------------------


def few(folder, states: int = 5):
    """Trajectories of three prompts in a folder, and the same as LMDB; returns both paths."""
    folder.mkdir()
    for i, prompt in enumerate(["a cat", "a dog", "a fish"]):
        torch.save({prompt: torch.randn(1, states, 3, 16, 4, 6)}, folder / f"{i:05d}.pt")
    return folder, write_lmdb(folder, folder.with_name("lmdb"))


def rewritten(lmdb_folder, key: str, value: bytes | None) -> None:
    env = lmdb.open(str(lmdb_folder), map_size=1 << 26)
    with env.begin(write=True) as transaction:
        transaction.delete(key.encode()) if value is None else transaction.put(key.encode(), value)
    env.close()


def nan(states: torch.Tensor) -> torch.Tensor:
    states.view(-1)[-1] = float("nan")
    return states


FILES = {
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: file.write_bytes(b""),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
    "a memo of 2^28": lambda file: file.write_bytes(b"\x80\x02}r\x00\x00\x00\x10."),
    "two prompts": lambda file: torch.save({"a": torch.zeros(1, 5, 3, 16, 4, 6), "b": torch.zeros(1)}, file),
    "no tensor": lambda file: torch.save({"a": [1, 2]}, file),
    "a tensor alone": lambda file: torch.save(torch.zeros(3), file),
    "another size": lambda file: torch.save({"a": torch.zeros(1, 5, 6, 16, 4, 6)}, file),
    "another number of states": lambda file: torch.save({"a": torch.zeros(1, 4, 3, 16, 4, 6)}, file),
    "whole numbers": lambda file: torch.save({"a": torch.zeros(1, 5, 3, 16, 4, 6, dtype=torch.int32)}, file),
    "NaN": lambda file: torch.save({"a": nan(torch.zeros(1, 5, 3, 16, 4, 6))}, file),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_trajectory_is_refused(tmp_path, case):
    folder, _ = few(tmp_path / "pairs")
    FILES[case](folder / "00001.pt")
    with pytest.raises(UserError, match="00001.pt") as caught:
        pairs = open_pairs("training.distill.pairs", folder)
        assert case == "NaN", "seen when it is opened"
        pairs.read([0, 1])
    assert "\n" not in str(caught.value)


OPEN = """
import sys
from trainer.pairs import open_pairs
for path in sys.argv[1:]:
    try:
        open_pairs("pairs", path).read([0, 1, 2])
    except ValueError as error:
        print(type(error).__name__, error)
"""


def test_a_database_that_is_cut_is_refused_before_it_is_touched(tmp_path):
    """In a process of its own, which a touch beyond the end would kill."""
    _, path = few(tmp_path / "pairs")
    shares = (0.9, 0.5, 0.2, 0.0)
    copies = [shutil.copytree(path, tmp_path / f"cut{share}") for share in shares]
    for share, copy in zip(shares, copies, strict=True):
        os.truncate(copy / "data.mdb", int(share * (copy / "data.mdb").stat().st_size))
    done = subprocess.run([sys.executable, "-c", OPEN, *map(str, copies)], capture_output=True, text=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(copies), done
    for line, copy in zip(lines, copies, strict=True):
        assert line.startswith(f"UserError pairs={copy}") and "make it again" in line


DATABASES = {
    "noise": lambda path: (path / "data.mdb").write_bytes(os.urandom(20_000)),
    "a pipe": lambda path: ((path / "data.mdb").unlink(), os.mkfifo(path / "data.mdb")),
    "no shape": lambda path: rewritten(path, "latents_shape", None),
    "a shape of words": lambda path: rewritten(path, "latents_shape", b"3 many 3 16 4 6"),
    "a shape too short": lambda path: rewritten(path, "latents_shape", b"3 5"),
    "a shape below nothing": lambda path: rewritten(path, "latents_shape", b"-3 5 3 16 4 6"),
    "more than there are": lambda path: rewritten(path, "latents_shape", b"9 5 3 16 4 6"),
    "another size": lambda path: rewritten(path, "latents_shape", b"3 5 9 16 4 6"),
    "one of another size": lambda path: rewritten(path, "latents_1_data", b"abcd"),
    "one missing": lambda path: rewritten(path, "latents_1_data", None),
    "a prompt missing": lambda path: rewritten(path, "prompts_2_data", None),
    "a prompt that is no text": lambda path: rewritten(path, "prompts_2_data", b"\xff\xfe"),
    "timesteps that rise": lambda path: (path / TIMESTEPS).write_text("[0, 250, 500, 750, 1000]"),
    "timesteps of words": lambda path: (path / TIMESTEPS).write_text('["a", "b", "c", "d", "e"]'),
    "NaN": lambda path: rewritten(path, "latents_1_data", b"\xff\x7f" * (5 * 3 * 16 * 4 * 6)),
}


@pytest.mark.parametrize("case", DATABASES)
def test_a_database_of_no_trajectories_is_refused(tmp_path, case):
    _, path = few(tmp_path / "pairs")
    DATABASES[case](path)
    with pytest.raises(UserError, match=str(path)) as caught:
        pairs = open_pairs("training.distill.pairs", path)
        assert case == "NaN", "seen when it is opened"
        pairs.read([0, 1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("told", ["{", "[1000, NaN, 0, 0, 0]", "[1000, 0]", "7", '{"timesteps": [0, 1, 2, 3, 4]}'])
def test_timesteps_that_cannot_be_are_refused(tmp_path, told):
    folder, _ = few(tmp_path / "pairs")
    (folder / "timesteps.json").write_text(told)
    with pytest.raises(UserError, match="pairs"):
        open_pairs("training.distill.pairs", folder)
