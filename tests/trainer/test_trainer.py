"""The training machinery on tiny things: schedules, averages, accumulation, checkpoints, exact resume."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_case import latest
from torch import nn

from configs.errors import UserError
from configs.load import load_config
from configs.train_schema import OptimizerConfig
from trainer.checkpoint import save as checkpoint
from trainer.loop import NonFiniteLoss, run
from trainer.optim.train_state import EMA, learning_rate
from trainer.registry import build_stage
from trainer.trajectories import trajectory_grid
from utils.distributed import Ranks
from utils.exits import explain

CPU = torch.device("cpu")


def text_stage(tmp_path: Path, *overrides: str):
    """A text stage of a few steps."""
    small = ["training.bank_clips=64", "training.validation_clips=0", "training.log_every=1"]
    sizes = ["training.steps=6", "training.global_batch=4", "training.micro_batch=4"]
    export = f"training.export={tmp_path / 'export'}"
    config = load_config("configs/train_tiny_text.yaml", [*small, *sizes, export, *overrides])
    return build_stage(config, CPU, Ranks())


def test_learning_rate_warms_up_and_decays():
    config = OptimizerConfig(lr=1.0, warmup_steps=10, final_lr_share=0.1)
    rates = [learning_rate(config, step, 110) for step in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55) and rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_average_copies_then_decays():
    module = nn.Linear(3, 2)
    average = EMA(module, decay=0.9, start_step=2)
    expected = None
    for step in range(6):
        with torch.no_grad():
            module.weight.add_(torch.randn(2, 3))
        average.update(module, step)
        weight = module.weight.detach()
        expected = weight.clone() if step < 2 else 0.9 * expected + 0.1 * weight
    torch.testing.assert_close(average.module.weight, expected)
    assert not any(p.requires_grad for p in average.module.parameters())


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    whole, parts = text_stage(tmp_path), text_stage(tmp_path, "training.micro_batch=2")
    assert parts.micro_batches == 2
    for step in range(3):
        one, two = whole.update(step), parts.update(step)
        torch.testing.assert_close(one["loss"], two["loss"])
    for a, b in zip(whole.module.parameters(), parts.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_nan_ends_a_run_with_one_sentence_and_the_inputs_of_its_step(tmp_path):
    stage = text_stage(tmp_path)
    update = stage.update
    stage.update = lambda step: {name: value / (step != 2) for name, value in update(step).items()}
    with pytest.raises(NonFiniteLoss, match="not finite at step 3; the last checkpoint is intact") as raised:
        run(stage, tmp_path)
    line, code = explain(raised.value)
    assert code == 2 and line.startswith("error: loss, ") and "not_finite_rank0.pt" in line
    kept = torch.load(tmp_path / "not_finite_rank0.pt", weights_only=True)
    assert kept["step"] == 3 and torch.equal(kept["batches"][0]["ids"], stage.batch(2, 0)["ids"])
    assert not torch.equal(kept["batches"][0]["ids"], stage.batch(3, 0)["ids"])


def test_global_batch_must_divide(tmp_path):
    with pytest.raises(UserError, match="training.global_batch=4.*training.micro_batch=3"):
        text_stage(tmp_path, "training.micro_batch=3")


def test_a_damaged_newest_checkpoint_falls_back(tmp_path, caplog):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"x": torch.tensor([step])}, {"stage": "text"}, keep=3)
    newest = checkpoint.folders(tmp_path)[-1] / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-7])
    state, manifest = latest(tmp_path, "text")
    assert manifest["step"] == 1 and state["x"].item() == 1
    assert "damaged" in caplog.text


def test_checkpoints_are_kept_to_a_number_and_leave_nothing_behind(tmp_path):
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, {"x": torch.zeros(1)}, {"stage": "text"}, keep=2)
    assert [p.name for p in checkpoint.folders(tmp_path)] == ["checkpoint_000004", "checkpoint_000005"]
    assert len(list(tmp_path.iterdir())) == 2
    assert json.loads((checkpoint.folders(tmp_path)[-1] / "manifest.json").read_text())["step"] == 5


def test_a_checkpoint_is_on_the_disk_before_an_older_one_is_removed(tmp_path, monkeypatch):
    """Each file and folder is flushed before the rename, and the rename before anything is removed."""
    events, flush, rename, remove = [], os.fsync, os.replace, shutil.rmtree
    checkpoint.save(tmp_path, 1, {"x": torch.zeros(1)}, {"stage": "text"}, keep=1)

    def fsync(descriptor):
        events.append(("flush", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("rename", Path(b).name)), rename(a, b)))
    monkeypatch.setattr(shutil, "rmtree", lambda p, **kw: (events.append(("remove", Path(p).name)), remove(p, **kw)))
    checkpoint.save(tmp_path, 2, {"x": torch.zeros(1)}, {"stage": "text"}, keep=1)

    renamed, removed = events.index(("rename", "checkpoint_000002")), events.index(("remove", "checkpoint_000001"))
    assert {"state.pt", "manifest.json", ".partial-checkpoint_000002"} <= {name for _, name in events[:renamed]}
    assert ("flush", tmp_path.name) in events[renamed:removed]


def test_a_file_system_that_syncs_files_alone_will_do(tmp_path, monkeypatch):
    flush = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    assert checkpoint.verified(checkpoint.save(tmp_path, 1, {"x": torch.zeros(1)}, {"stage": "text"}, keep=1))


def test_what_is_not_whole_neither_counts_nor_is_counted_out(tmp_path):
    """Damaged ones with higher numbers and with lower ones; what was just written stays, also beyond a million."""
    for name in ("checkpoint_000002", "checkpoint_9000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    for step in (999_997, 999_998, 999_999, 1_000_000, 1_000_001):
        made = checkpoint.save(tmp_path, step, {"x": torch.zeros(1)}, {"stage": "text"}, keep=2)
        assert checkpoint.verified(made)
        cut = made / "state.pt"
        if step == 999_999:
            cut.write_bytes(cut.read_bytes()[:-1])
    left = ["checkpoint_000002", "checkpoint_999999", "checkpoint_1000000", "checkpoint_1000001", "checkpoint_9000000"]
    assert [p.name for p in checkpoint.folders(tmp_path)] == left
    assert all((tmp_path / name / "notes.txt").exists() for name in (left[0], left[-1]))


def test_a_run_goes_on_beside_damaged_checkpoints(tmp_path):
    """They step aside when a run goes on before them; a folder of somebody's under a checkpoint's name is not lost."""
    run(text_stage(tmp_path, "training.steps=2"), tmp_path / "run")
    for name in ("checkpoint_000003", "checkpoint_000900"):
        shutil.copytree(tmp_path / "run" / "checkpoint_000002", tmp_path / "run" / name)
        (tmp_path / "run" / name / "state.pt").write_bytes(b"cut")
    (tmp_path / "run" / "checkpoint_000004").mkdir()
    (tmp_path / "run" / "checkpoint_000004" / "notes.txt").write_text("mine")
    stage = text_stage(tmp_path, "training.steps=5", "training.checkpoint_every=1", "training.max_checkpoints=1")
    run(stage, tmp_path / "run")
    names = {p.name for p in (tmp_path / "run").iterdir() if p.is_dir()}
    damaged = {f"damaged_checkpoint_{step:06d}" for step in (3, 4, 900)}
    assert names == {"checkpoint_000005", *damaged}
    assert (tmp_path / "run" / "damaged_checkpoint_000004" / "notes.txt").read_text() == "mine"


def test_a_checkpoint_is_put_back_where_its_replacing_was_killed(tmp_path):
    made = checkpoint.save(tmp_path, 1, {"x": torch.zeros(1)}, {"stage": "text"}, keep=2)
    made.rename(tmp_path / ".partial-checkpoint_000001-before")
    (tmp_path / ".partial-checkpoint_000002").mkdir()
    checkpoint.clear_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_000001"] and checkpoint.verified(made)


FULL = OSError(errno.ENOSPC, "No space left on device")
FULL_IN_C = RuntimeError("I/O error: No space left on device (error 28)")


@pytest.mark.parametrize("what, error", [("metrics", FULL), ("validation", FULL_IN_C), ("export", FULL)])
def test_a_disk_that_is_full_elsewhere_is_one_sentence_too(tmp_path, monkeypatch, what, error):
    """The run goes on from its checkpoint when there is room."""

    def full(*_, **__):
        raise error

    def stage():
        often = ["training.checkpoint_every=2", "training.log_every=3"]
        return text_stage(tmp_path, "training.validation_clips=2", *often)

    places = {"metrics": "trainer.loop.JsonlSink.write", "validation": "trainer.tiny.text.TextStage.validate",
              "export": "trainer.tiny.text.TextStage.export"}  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(places[what], full)
        with pytest.raises(UserError, match="--logdir .* the disk is full .*No space left"):
            run(stage(), tmp_path / "run")
    assert run(stage(), tmp_path / "run") and (tmp_path / "export" / "card.json").exists()


def test_fewer_steps_than_a_run_has_reached(tmp_path, caplog):
    """What is exported says the step of its weights."""
    run(text_stage(tmp_path), tmp_path / "run")
    run(text_stage(tmp_path, "training.steps=3"), tmp_path / "run")
    assert json.loads((tmp_path / "export" / "card.json").read_text())["step"] == 6
    assert "training.steps=3 is below step 6" in caplog.text


def test_another_stage_does_not_resume(tmp_path):
    checkpoint.save(tmp_path, 1, {"x": torch.zeros(1)}, {"stage": "codec"}, keep=2)
    with pytest.raises(UserError, match="stage codec.*--logdir"):
        latest(tmp_path, "text")


def test_trajectory_grid_holds_every_row():
    rows = [(1000.0, 921.0526, 769.2308, 357.142857), (1000.0, 859.375, 357.142857), (1000.0, 357.142857)]
    grid = trajectory_grid(rows, 50.0, 5.0)
    assert grid[0] == 1000.0 and grid[-1] == 0.0 and sorted(grid, reverse=True) == grid
    assert all(t in grid for row in rows for t in row)
    gaps = [a - b for a, b in zip(grid, grid[1:], strict=False)]
    assert min(gaps) > 1e-3
