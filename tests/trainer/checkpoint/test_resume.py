"""Checkpoints in parts by one process, a full disk, changed settings, and metadata that would run code."""

import errno
import os
import pickle
import zipfile
from dataclasses import replace

import pytest
import torch
from checkpoint_case import read_state
from torch import nn

from configs.errors import UserError
from configs.load import load_config, to_dict
from model.weights.load import load_student
from model.weights.safe_pickle import dry_run
from model.weights.sharded_files import open_sharded
from scripts import convert_checkpoint
from trainer.checkpoint import save as checkpoint
from trainer.checkpoint import sharded as sharded_checkpoint
from trainer.checkpoint.resume import check_changes, check_init_finished
from trainer.loop import at_end
from trainer.optim.train_state import TrainState
from trainer.parallel.control_group import ControlGroup
from utils.files import block_hash_of

CONFIG = load_config("configs/train_tiny_text.yaml", ["training.ema_start_step=1"])


def train_state(seed: int, updates: int) -> TrainState:
    torch.manual_seed(seed)
    made = TrainState(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), CONFIG.training)
    for step in range(updates):
        made.module(torch.randn(5, 3)).square().sum().backward()
        made.step(step)
        made.module.zero_grad()
    return made


def equal(one: TrainState, other: TrainState) -> bool:
    pairs = [(one.module.state_dict(), other.module.state_dict())]
    pairs += [(one.average.module.state_dict(), other.average.module.state_dict())]
    states = [list(p.optimizer.state.values()) for p in (one, other)]
    pairs += list(zip(*states, strict=True))
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("layers", [[nn.Linear(3, 5), nn.Linear(5, 2)], [nn.Linear(3, 4)]], ids=["shapes", "names"])
def test_networks_of_other_shapes_or_names_are_a_sentence(layers, in_parts, tmp_path):
    """Such as adapters of another rank, where training.accept_changes lets their setting through."""
    before, after = train_state(0, 1), TrainState(nn.Sequential(*layers), CONFIG.training)
    if in_parts:
        sharded_checkpoint.write(tmp_path / "shards", {"generator": before}, {}, ControlGroup())
    else:
        torch.save({"generator": before.state_dict()}, tmp_path / "state.pt")
    kept = [p.clone() for p in after.module.parameters()]
    with pytest.raises(UserError, match=r"0\.bias|1\.bias.*choose another --logdir"):
        checkpoint.restore(tmp_path, {"generator": after})
    assert all(map(torch.equal, kept, after.module.parameters()))


def test_parts_written_and_read_by_one_process(tmp_path):
    """Weights, average, moments and counters; the next step is the same, too."""
    before, after = train_state(0, 3), train_state(1, 0)
    kept = {"logs": {"loss": torch.tensor(2.5)}, "done": torch.tensor(7)}
    sharded_checkpoint.write(tmp_path / "shards", {"generator": before}, kept, ControlGroup())
    found = checkpoint.restore(tmp_path, {"generator": after})
    assert found["logs"]["loss"] == 2.5 and found["done"] == 7
    assert equal(before, after)
    for p in (before, after):
        torch.manual_seed(9)
        p.module(torch.randn(5, 3)).square().sum().backward()
        p.step(3)
    assert equal(before, after)
    state = read_state(tmp_path / "shards")
    assert state["stage"]["done"] == 7 and state["generator"]["module"]["0.weight"].shape == (4, 3)


def test_sums_are_left_to_the_manifest(tmp_path):
    """torch.save's own take long. What has them is still checked, and other files keep theirs."""
    folder, state = tmp_path / "run", {"text": {"module": train_state(0, 1).module.state_dict()}}
    file = checkpoint.save(folder, 1, state, {"stage": "text"}, keep=1) / "state.pt"
    torch.save(state, tmp_path / "other.pt")
    sums = []
    for path in (file, tmp_path / "other.pt"):
        assert dry_run(path).value["text"]["module"].keys() == state["text"]["module"].keys()
        with zipfile.ZipFile(path) as archive:
            sums.append([entry.CRC for entry in archive.infolist()])
    assert not any(sums[0]) and all(sums[1])
    with zipfile.ZipFile(tmp_path / "other.pt") as archive:
        (place,) = [e.header_offset for e in archive.infolist() if e.filename.endswith("data.pkl")]
    damaged = bytearray((tmp_path / "other.pt").read_bytes())
    damaged[damaged.index(b"weight", place)] ^= 1
    (tmp_path / "other.pt").write_bytes(damaged)
    with pytest.raises(zipfile.BadZipFile, match="CRC"):
        dry_run(tmp_path / "other.pt")


def test_metadata_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="mkdir"):
        open_sharded("model.student", tmp_path)
    assert not (tmp_path / "made").exists()


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"x": torch.zeros(1)}, {"stage": "text"}, keep=2)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(checkpoint.SaveFailed, match="step 2.*No space left.*checkpoint_000001 is intact.*make room"):
        checkpoint.save(tmp_path, 2, {"x": torch.zeros(1)}, {"stage": "text"}, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_000001"]


@pytest.mark.parametrize(
    "change, said",
    [
        ("training.log_every=3", None),
        ("training.sharding=full", None),
        ("inference.output_folder=elsewhere", None),
        ("training.optimizer.lr=0.5", "from here on"),
        ("training.global_batch=8", "refused"),
        ("video.height=32", "refused"),
        ("training.init.text_encoder=other.json", "refused"),
        ("training.init.critic=assets/tiny/student", "refused"),
    ],
)
def test_what_may_change(change, said, tmp_path, caplog):
    before = to_dict(CONFIG)
    now = load_config("configs/train_tiny_text.yaml", ["training.ema_start_step=1", change])
    if said == "refused":
        with pytest.raises(UserError, match=change.split("=")[0]):
            check_changes(before, now, tmp_path)
        key = change.split("=")[0]
        allowed = ["training.ema_start_step=1", change, f"training.accept_changes=[{key}]"]
        check_changes(before, load_config("configs/train_tiny_text.yaml", allowed), tmp_path)
        said = "from here on"
    else:
        check_changes(before, now, tmp_path, warn=False)
        assert "from here on" not in caplog.text
        check_changes(before, now, tmp_path)
    assert ("from here on" in caplog.text) == (said is not None)


def test_a_network_of_the_start_that_is_left_out_is_refused(tmp_path):
    before = to_dict(load_config("configs/train_tiny_text.yaml", ["training.init.critic=assets/tiny/student"]))
    now = load_config("configs/train_tiny_text.yaml")
    with pytest.raises(UserError, match="training.init.critic=null was assets/tiny/student when"):
        check_changes(before, now, tmp_path)


@pytest.mark.parametrize("fast", [True, False])
def test_settings_that_rollouts_are_made_by_are_not_free(fast, tmp_path, caplog):
    text = ["training.ema_start_step=1", f"training.distill.fast_rollout={fast}".lower(), "training.cuda_graphs=false"]
    before = to_dict(load_config("configs/train_tiny_distill.yaml", text))
    for change in ("inference.attention=sdpa", "inference.compile=off"):
        caplog.clear()
        check_changes(before, load_config("configs/train_tiny_distill.yaml", [*text, change]), tmp_path)
        assert ("from here on" in caplog.text) == fast


def test_settings_named_in_the_lists_exist():
    from configs.load import _fields
    from configs.schema import Config
    from trainer.checkpoint.resume import FREE, ROLLOUT, TUNED

    assert {*FREE, *ROLLOUT, *TUNED} <= _fields(Config, "").keys()


def test_a_checkpoint_in_parts_is_exported(tiny_assets, tmp_path):
    """What `scripts/convert_checkpoint.py` and inference find in a sharded run: the student, its sizes, its average."""
    from distill_case import distill_config, distill_stage

    stage = distill_stage(tiny_assets)
    with torch.no_grad():
        stage.averaged.proj_out.bias.add_(1.0)
    manifest = {"stage": "distill", "config": to_dict(distill_config(tiny_assets))}

    def write(folder):
        return sharded_checkpoint.write(folder, stage.train_states, stage.state_dict(), ControlGroup())

    folder = checkpoint.save(tmp_path / "run", 4, write, manifest, keep=2)
    hashes = checkpoint.verified(folder)["files"]
    assert hashes == {f"shards/{file.name}": block_hash_of(file) for file in (folder / "shards").iterdir()}
    assert convert_checkpoint.main([str(tmp_path / "run"), str(tmp_path / "out"), "--use_ema"]) == 0
    exported = load_student(tmp_path / "out")
    state = exported.state_dict()
    assert exported.card["step"] == 4
    assert all(torch.equal(value, state[name]) for name, value in stage.averaged.state_dict().items())
    raw = load_student(folder).state_dict()
    assert all(torch.equal(value, raw[name]) for name, value in stage.student.model.state_dict().items())


def test_a_start_from_a_run_that_is_not_at_its_end_is_refused(tmp_path):
    """Whether its export or only a checkpoint is there; weights of others say nothing of steps."""

    def start_from(path, *more):
        check_init_finished(load_config("configs/train_tiny_distill.yaml", [f"training.init.student={path}", *more]))

    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run / "export", other, tmp_path / "half" / "checkpoint_000400"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}") if folder.name != "checkpoint_000400" else None
    (run / "export" / "card.json").write_text('{"stage": "distill", "step": 400, "steps": 1000}')
    (other / "card.json").write_text('{"stage": "distill", "step": 400}')
    half = tmp_path / "half" / "checkpoint_000400"
    (half / "state.pt").write_bytes(b"")
    (half / "manifest.json").write_text('{"step": 400, "files": {}, "config": {"training": {"steps": 1000}}}')
    for path in (run, run / "export", tmp_path / "half", half):
        with pytest.raises(UserError, match=r"training.init.student=.* is at step 400 of 1000; finish that run"):
            start_from(path)
        start_from(path, "training.accept_unfinished=true")
    for path in (other, tmp_path / "nothing"):
        start_from(path)
    (run / "export" / "card.json").write_text('{"stage": "distill", "step": 1000, "steps": 1000}')
    start_from(run)


def test_a_run_at_its_end_is_known_by_what_it_left(tmp_path):
    config = load_config("configs/train_tiny.yaml", ["training.steps=40"])
    assert not at_end(config, tmp_path)
    (tmp_path / "end.json").write_text('{"steps": 40}')
    assert not at_end(config, tmp_path), "what it exported is gone"
    (tmp_path / "export").mkdir()
    assert at_end(config, tmp_path)
    assert not at_end(replace(config, training=replace(config.training, steps=60)), tmp_path)
    (tmp_path / "end.json").write_text("[")
    assert not at_end(config, tmp_path)
