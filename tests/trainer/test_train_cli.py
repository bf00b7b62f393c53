"""train.py: flags, sinks, a run from end to end, and that inference plays what it leaves."""

import fcntl
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import time
import types
from collections.abc import Iterator

import pytest
import torch
from conftest import ROOT
from distill_case import distill_config
from PIL import Image

from configs.errors import UserError
from configs.load import load_config, to_yaml
from model.weights.files import missing_weights
from pipeline import DiagonalPipeline
from trainer import loop
from trainer.cli import parse
from trainer.loop import make_sinks, progress_line
from trainer.validation import LABEL
from utils.logs import read_jsonl
from utils.video import read_video

pytestmark = pytest.mark.slow

sys.path.insert(0, str(ROOT))


def train(monkeypatch, *arguments):
    import train as entry

    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    threads = torch.get_num_threads()
    try:
        return entry.main()
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def config_file(tiny_assets, tmp_path):
    path = tmp_path / "case.yaml"
    path.write_text(to_yaml(distill_config(tiny_assets, "training.steps=3", "training.validation_clips=2")))
    return path


def test_flags_become_settings():
    args = parse(["--config_path", "a.yaml", "--max_checkpoints", "3", "--no_visualize", "seed=1"])
    assert args.overrides == ["training.max_checkpoints=\"3\"", "training.validation_clips=0", "seed=1"]
    assert load_config("configs/train_tiny.yaml", args.overrides).training.max_checkpoints == 3
    assert parse(["--disable-wandb"]).disable_wandb and parse([]).config_path == "configs/train_tiny.yaml"
    with pytest.raises(UserError, match="--wrong"):
        parse(["--wrong"])


def test_a_stage_whose_earlier_stage_has_not_run_says_which_to_train():
    stage1 = "train_wan2.1_t2v_1.3b_stage1"
    for stage, advice in ((stage1, f" (`bash training.sh --config_path configs/{stage1}.yaml`)"), ("mine", "")):
        error = missing_weights("training.init.student", ROOT / "logs" / stage, "does not exist")
        assert str(error).endswith(f"does not exist; train it first{advice}, or set training.init.student")


def test_a_run_shows_what_it_does_and_inference_plays_what_it_leaves(
    config_file, tiny_assets, tmp_path, monkeypatch, capsys
):
    """Lines that stay and fit 80 columns; curves beside the metrics; which clip is the student's."""
    logdir = tmp_path / "run"
    settings = ["training.checkpoint_every=1", "training.distill.video_clips=1"]
    assert train(monkeypatch, "--config_path", str(config_file), "--logdir", str(logdir), *settings) == 0
    said = capsys.readouterr()
    assert "%|" not in said.err, "a progress bar is for a terminal"
    lines = [line for line in said.out.splitlines() if line.startswith("step ") and "s a step" in line]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    assert all(len(line) < 80 and "critic_loss" in line and line.endswith(" left") for line in lines)
    assert Image.open(logdir / "curves.png").width > 1000
    (video,) = (logdir / "validation").glob("*.mp4")
    frames = read_video(video)
    assert frames.shape[1:3] == (32 + LABEL, 2 * 48)
    strip = frames[:, :LABEL]
    assert (strip.max(axis=(0, 1, 3)).reshape(2, 48).max(axis=1) > 150).all(), "a name above each"
    rows = read_jsonl(logdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 3] and "validation_shape" in rows[-1]
    assert load_config(logdir / "config.yaml").training.steps == 3
    for path in (logdir, logdir / "export"):
        pipe = DiagonalPipeline.from_config(str(tiny_assets / "tiny.yaml"), f"model.student={path}")
        assert pipe("a red circle").videos[0].frames.shape == (21, 32, 48, 3)


@pytest.mark.parametrize(
    "name, every",
    [
        ("_validate", ["training.validate_every=1"]), ("save_checkpoint", ["training.checkpoint_every=1"]),
        ("freeze_garbage", []),
    ],
)  # fmt: skip
def test_the_time_of_a_step_leaves_out_the_first_step_saving_and_validation(
    config_file, tmp_path, monkeypatch, name, every
):
    real, added, call = time.perf_counter, [0.0], getattr(loop, name)
    monkeypatch.setattr(time, "perf_counter", lambda: real() + added[0])

    def slowed(*args, **kwargs):
        added[0] += 10_000
        return call(*args, **kwargs)

    monkeypatch.setattr(loop, name, slowed)
    settings = ["training.checkpoint_every=0", "training.validate_every=0", "training.log_every=1", *every]
    train(monkeypatch, "--config_path", str(config_file), "--logdir", str(tmp_path / "run"), *settings)
    rows = [row for row in read_jsonl(tmp_path / "run/metrics.jsonl") if "seconds_per_step" in row]
    assert len(rows) == 3 and all(row["seconds_per_step"] < 1_000 for row in rows) and added[0] > 0


def test_no_save_leaves_metrics_only(config_file, tmp_path, monkeypatch):
    logdir = tmp_path / "run"
    train(monkeypatch, "--config_path", str(config_file), "--logdir", str(logdir), "--no_save", "--no_visualize")
    assert {p.name for p in logdir.iterdir()} == {"config.yaml", "metrics.jsonl", "audit.json"}


@pytest.mark.parametrize("where", ["models", ".", "run", "logs"])
def test_an_export_that_would_replace_something_is_refused_at_once(config_file, tmp_path, monkeypatch, where):
    """Before a network is made; nothing is lost, not even the file beside an earlier export."""
    monkeypatch.setattr("trainer.command.build_stage", lambda *a: pytest.fail("a network was made"))
    monkeypatch.chdir(tmp_path)
    logdir, field = tmp_path / "logs" / "run", "training.export"
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.safetensors").write_text("mine")
    export = [f"training.export={tmp_path / where}"]
    if where == "run":
        (logdir / "export").mkdir(parents=True)
        (logdir / "export" / "config.json").write_text("another program's")
        field, export = "--logdir.*export", []
    if where == "logs":
        logdir.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=field):
        train(monkeypatch, "--config_path", str(config_file), "--logdir", str(logdir), *export)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "models" / "mine.safetensors").read_text() == "mine"


def test_wandb_is_used_if_asked_for_and_not_disabled(tmp_path, monkeypatch):
    calls = []
    fake = types.ModuleType("wandb")

    class Run:
        def define_metric(self, name, step_metric):
            calls.append(("define_metric", name, step_metric))

        def log(self, values):  # without wandb's own step, which must not fall
            calls.append(("log", values))

        def finish(self, exit_code):
            calls.append(("finish", exit_code))

    fake.Error = type("Error", (Exception,), {})
    fake.init = lambda **options: calls.append(("init", options["id"], options["resume"])) or Run()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = load_config("configs/train_tiny.yaml", ["training.loggers=[wandb]"])
    for _ in range(2):
        _, sink = make_sinks(config, tmp_path)(0)
        with sink:
            sink.write(3, loss=1.0)
    assert [call[0] for call in calls] == ["init", "define_metric", "log", "finish"] * 2 and calls[0] == calls[4]
    assert calls[1:3] == [("define_metric", "*", "step"), ("log", {"step": 3, "loss": 1.0})]
    assert len(make_sinks(config, tmp_path, wandb=False)(0)) == 1


    def refuse(**options):
        raise fake.Error("the key is not known\nand more")

    fake.init = refuse
    with pytest.raises(UserError, match=r"cannot be used \(the key is not known\); mend that, set WANDB_MODE=offline"):
        make_sinks(config, tmp_path)(0)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb, or pass --disable-wandb"):
        make_sinks(config, tmp_path)(0)


def test_a_seed_that_is_drawn_is_refused(config_file, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="seed=-1 draws one for inference"):
        train(monkeypatch, "--config_path", str(config_file), "--logdir", str(tmp_path / "run"), "seed=-1")


@pytest.fixture
def listening() -> Iterator[int]:
    """A port at which connections are taken."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    "logger, installed, environment, said",
    [
        ("tensorboard", False, {}, "tensorboard, which is not installed"),
        ("wandb", False, {}, "wandb, which is not installed"),
        ("wandb", True, {}, "wandb, which has no key here"),
        ("wandb", True, {"WANDB_API_KEY": "x", "WANDB_BASE_URL": "http://127.0.0.1:LISTENS"}, None),
        ("wandb", True, {"WANDB_API_KEY": "x", "WANDB_BASE_URL": "http://127.0.0.1:9"}, "wandb, which cannot be used"),
        ("wandb", True, {"WANDB_API_KEY": "x", "WANDB_BASE_URL": "http://127.0.0.1:x"}, "wandb, which cannot be used"),
        ("wandb", True, {"WANDB_API_KEY": "x", "WANDB_MODE": "onlin"}, "WANDB_MODE=onlin is no mode of wandb"),
        ("wandb", True, {"WANDB_MODE": "offline"}, None),
        ("wandb", True, {"NETRC": "netrc", "WANDB_BASE_URL": "http://127.0.0.1:LISTENS"}, None),
    ],
)
def test_loggers_are_looked_at_before_a_network_is_made(
    config_file, tmp_path, monkeypatch, listening, logger, installed, environment, said
):
    class Made(Exception):
        pass

    def make(*_):
        raise Made

    monkeypatch.setattr("trainer.command.build_stage", make)
    monkeypatch.setitem(sys.modules, logger, types.ModuleType(logger) if installed else None)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password key")
    for name, value in environment.items():
        value = value.replace("LISTENS", str(listening))
        monkeypatch.setenv(name, str(tmp_path / value) if name == "NETRC" else value)
    arguments = ("--config_path", str(config_file), "--logdir", str(tmp_path / "run"), f"training.loggers=[{logger}]")
    with pytest.raises(UserError if said else Made, match=said):
        train(monkeypatch, *arguments)
    if said == "wandb, which has no key here":
        with pytest.raises(Made):
            train(monkeypatch, *arguments, "--disable-wandb")


def test_a_disk_that_cannot_hold_the_checkpoints_is_found_before_a_network_is_made(config_file, tmp_path, monkeypatch):
    """Of student, average, moments and critic, one more than is kept; those that are there count."""
    from model.weights.inspection import inspect_weights, required_weights
    from pipeline.preflight import check_room, saved_bytes
    from trainer.loop import run
    from trainer.registry import build_stage
    from utils.distributed import Ranks

    config = load_config(config_file, ["training.validation_clips=0", "training.max_checkpoints=2"])
    places = {role: path for role, path, _ in required_weights(config, training=True)}
    peeks = {role: inspect_weights(role, places[role]) for role in ("student", "teacher")}
    checkpoint, export = saved_bytes(config, peeks)
    run(build_stage(config, torch.device("cpu"), Ranks()), tmp_path / "run")
    state = (tmp_path / "run" / "checkpoint_000003" / "state.pt").stat().st_size
    written = (tmp_path / "run" / "export" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert checkpoint == pytest.approx(state, rel=0.1) and export == pytest.approx(written, rel=0.1)
    free = 3 * checkpoint + export
    for space, there, refused in ((free, 0, False), (free - 1, 0, True), (free - 1, 1, False)):
        monkeypatch.setattr("utils.machine.free_space", lambda folder, space=space: space)
        if refused:
            monkeypatch.setattr("trainer.command.build_stage", lambda *a: pytest.fail("a network was made"))
            with pytest.raises(UserError, match="3 checkpoints and an export take .*; make room"):
                train(
                    monkeypatch, "--config_path", str(config_file), "--logdir", str(tmp_path / "new"),
                    "training.validation_clips=0", "training.max_checkpoints=2",
                )  # fmt: skip
        else:
            check_room(config, tmp_path / "run", tmp_path / "run" / "export", there)


def test_a_folder_with_another_programs_config_is_refused(config_file, tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    with pytest.raises(UserError, match="--logdir .* holds a config.yaml that no run has written"):
        train(monkeypatch, "--config_path", str(config_file), "--logdir", str(tmp_path))
    assert (tmp_path / "config.yaml").read_text() == "mine: 1\n"


def test_a_run_is_converted(config_file, tmp_path):
    """Averages of its newest checkpoint, and the weights themselves of a checkpoint; both load."""
    from model.weights.load import load_student
    from scripts import convert_checkpoint
    from trainer.loop import run
    from trainer.registry import build_stage
    from utils.distributed import Ranks

    config = load_config(config_file, ["training.validation_clips=0"])
    stage = build_stage(config, torch.device("cpu"), Ranks())
    run(stage, tmp_path / "run")
    (newest,) = (tmp_path / "run").glob("checkpoint_*3")
    for source, flags, wanted in (tmp_path / "run", ["--use_ema"], stage.averaged), (newest, [], stage.student.model):
        out = tmp_path / f"out{len(flags)}"
        assert convert_checkpoint.main([str(source), str(out), *flags]) == 0
        loaded = load_student(out)
        state = loaded.state_dict()
        assert loaded.card["step"] == 3
        assert all(torch.equal(value, state[name]) for name, value in wanted.state_dict().items())


def test_a_newest_checkpoint_is_whole_and_newest_by_number(tmp_path):
    """For inference: not by text, not a damaged one, not one without a manifest."""
    from model.weights.run_folders import find_weights
    from trainer.checkpoint import save as checkpoint

    for step in (999_999, 1_000_000, 1_000_001):
        checkpoint.save(tmp_path, step, {"x": torch.zeros(99)}, {"stage": "text"}, keep=9)
    newest = checkpoint.folders(tmp_path)[-1]
    assert find_weights(tmp_path).parent == newest
    whole = (newest / "state.pt").read_bytes()
    (newest / "state.pt").write_bytes(whole[:-9])
    (tmp_path / "checkpoint_2000000").mkdir()
    (tmp_path / "checkpoint_2000000" / "state.pt").write_bytes(whole)
    assert find_weights(tmp_path).parent.name == "checkpoint_1000000"


HOLD = """
import sys
from pathlib import Path
from utils.files import exclusive_use
folder = Path(sys.argv[1])
with exclusive_use(folder, "--logdir"):
    with exclusive_use(folder, "--logdir"):
        pass
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_training_of_a_folder_is_refused(config_file, tmp_path, monkeypatch):
    """And leaves what the first one has half saved."""
    from utils.files import exclusive_use

    half = tmp_path / "run" / ".partial-checkpoint_000005"
    half.mkdir(parents=True)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is in use by another process"):
            train(monkeypatch, "--config_path", str(config_file), "--logdir", str(tmp_path / "run"))
        first.stdin.close()
    assert half.exists() and not (tmp_path / "run" / "config.yaml").exists()
    with exclusive_use(tmp_path / "run", "--logdir"):
        pass


def test_a_closed_terminal_saves_and_ends_well(config_file, tmp_path):
    """Even one that takes no more output, as a terminal that is gone."""
    more = ["training.steps=5000", "training.log_every=1", "training.validation_clips=0", "training.checkpoint_every=0"]
    terminal, end = pty.openpty()

    def at_a_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--config_path", str(config_file), *more, "--logdir", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdin=end, stdout=end, stderr=end, start_new_session=True,
        preexec_fn=at_a_terminal,
    )  # fmt: skip
    os.close(end)
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(read_jsonl(metrics)) >= 2):
        select.select([terminal], [], [], 0.02)[0] and os.read(terminal, 4096)
    os.close(terminal)
    assert process.wait(600) == 0
    assert len(list(tmp_path.glob("checkpoint_*"))) == 1 and not list(tmp_path.glob(".partial-*"))


STOPPED = """
import os, signal
import train
from utils.logs import JsonlSink
write = JsonlSink.write
def stopped(sink, step, **values):
    write(sink, step, **values)
    if step == 4:
        os.kill(os.getpid(), signal.SIGTERM)
JsonlSink.write = stopped
raise SystemExit(train.main())
"""


def test_sigterm_and_the_same_command_again(config_file, tmp_path, monkeypatch):
    """A run stopped in the middle says so, exits 0, and ends with the bytes of one that was not stopped."""
    more = ["training.steps=16", "training.log_every=1", "training.validation_clips=0", "cpu_threads=1"]
    arguments = ["--config_path", str(config_file), *more, "--logdir"]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train(monkeypatch, *arguments, str(straight)) == 0

    command = [sys.executable, "-c", STOPPED, *arguments, str(stopped)]
    process = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=600)
    assert process.returncode == 0 and "the same command resumes" in process.stdout
    assert 4 <= len(read_jsonl(stopped / "metrics.jsonl")) < 16 and (stopped / "export" / "config.json").exists()
    assert train(monkeypatch, *arguments, str(stopped)) == 0
    weights = "export/diffusion_pytorch_model.safetensors"
    assert (straight / weights).read_bytes() == (stopped / weights).read_bytes()


@pytest.mark.parametrize("seconds, shown", [(0.0312, "0.0312"), (1.663, "1.66"), (1234.4, "1234")])
def test_the_time_of_a_step_is_a_number_that_is_read_at_a_glance(seconds, shown):
    assert f"  {shown} s a step, " in progress_line(1, 2, {"loss": 1.0}, seconds)
