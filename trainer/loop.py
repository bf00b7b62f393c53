"""The training loop: step, log, validate, save; stop and resume exactly."""

import gc
import json
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from configs.errors import UserError
from configs.load import to_dict
from configs.schema import Config
from model.weights.run_folders import EXPORT, MANIFEST
from trainer.checkpoint import save as checkpoint
from trainer.checkpoint import sharded as sharded_checkpoint
from trainer.checkpoint.resume import check_changes, export_folder
from trainer.parallel.apply import mean_over_ranks
from trainer.parallel.control_group import ControlGroup
from trainer.parallel.rank_watch import explain_lost_rank
from trainer.stage import Stage
from utils.curves import write_curves
from utils.device import release_memory
from utils.files import DiskFull, atomic_path, exclusive_use, is_disk_full, write_json_atomic
from utils.logs import JsonlSink, Sink, get_logger, read_jsonl
from utils.sinks import TensorboardSink, WandbSink

log = get_logger(__name__)

WIDTH = 79  # columns of a line of progress
METRICS, CURVES, END = "metrics.jsonl", "curves.png", "end.json"  # in the run's folder


class _StopRequest:
    """Turns SIGTERM, Ctrl-C and a closed terminal into a request to stop after the current micro-batch, and so does the
    time `until`, of time.monotonic()."""

    def __init__(self, until: float):
        self.until, self.signalled = until, False

    @property
    def asked(self) -> bool:
        return self.signalled or time.monotonic() > self.until

    def __enter__(self):
        asking = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            asking.append(signal.SIGHUP)
        self.terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        self.before = {s: signal.signal(s, self._ask) for s in asking}
        return self

    def _ask(self, number: int, *_):
        self.signalled = True
        if number == signal.SIGHUP:  # the terminal is gone, and writing to it would fail
            devnull = os.open(os.devnull, os.O_WRONLY)
            for descriptor in self.terminals:
                os.dup2(devnull, descriptor)
            os.close(devnull)

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


_Step = tuple[dict[str, Tensor], int]  # logged values of a step, its number (from 1)


class NonFiniteLoss(UserError):
    """A logged value is NaN or infinite."""


class _StepAborted(Exception):
    """A request to stop came in the middle of a step, which is discarded."""


class _FiniteCheck:
    """Checks that the values of each step are finite, without a host sync: on a GPU the result is one step late."""

    def __init__(self):
        self.pending: deque[tuple[Tensor, torch.cuda.Event | None, _Step]] = deque()
        self.checked: _Step | None = None  # the newest step whose result was read, the same on all ranks

    def put(self, values: dict[str, Tensor], step: int) -> None:
        fine = torch.stack([value.detach().float() for value in values.values()]).isfinite().all()
        late = fine.device.type == "cuda"
        answer = torch.empty((), dtype=torch.bool, pin_memory=late).copy_(fine, non_blocking=late)
        event = torch.cuda.Event() if late else None
        if event is not None:
            event.record()
        self.pending.append((answer, event, (values, step)))

    def bad(self, *, drain: bool = False) -> bool:
        """Whether the step in `checked` has a non-finite value. drain: check all pending steps, and wait for them."""
        while self.pending and (drain or len(self.pending) > 1 or self.pending[0][1] is None):
            answer, event, self.checked = self.pending.popleft()
            if event is not None:
                event.synchronize()
            if not bool(answer):
                return True
        return False


def history(logdir: Path) -> list[dict]:
    """Rows that earlier processes of this run have logged."""
    path = logdir / METRICS
    return [row for row in read_jsonl(path) if "seconds_per_step" in row] if path.exists() else []


def save_checkpoint(stage: Stage, logdir: Path, step: int, control: ControlGroup) -> None:
    """A sharded stage is written by all ranks, each its own shards; otherwise the first rank writes everything."""
    manifest = {"stage": stage.name, "config": to_dict(stage.config)}
    stage_state, train_states = stage.state_dict(), stage.train_states
    if stage.sharded:
        state = partial(sharded_checkpoint.write, train_states=train_states, stage_state=stage_state, control=control)
    else:
        state = {}
        if stage.ranks.first:  # the others hold the same
            state = {name: value.state_dict() for name, value in train_states.items()} | {"stage": stage_state}
    checkpoint.save(logdir, step, state, manifest, stage.config.training.max_checkpoints, control)
    if stage.export_often and (stage.sharded or stage.ranks.first):
        stage.export(logdir / EXPORT, step)
    if stage.ranks.first:
        show_curves(logdir, stage.name)
    release_memory()


def show_curves(logdir: Path, name: str) -> None:
    """Plot the metrics of a run into its curves.png."""
    path = logdir / METRICS
    if path.exists():
        write_curves(logdir / CURVES, read_jsonl(path), f"{name}: {logdir.resolve().name}")


def _resume(stage: Stage, logdir: Path, control: ControlGroup) -> int:
    if control.rank == 0:
        checkpoint.clear_leftovers(logdir)
    newest = checkpoint.newest(logdir, stage.name, control)
    if control.rank == 0:
        for damaged in checkpoint.folders(logdir):
            beyond = newest is None or checkpoint.step_of(damaged) > checkpoint.step_of(newest[0])
            if beyond and (damaged / MANIFEST).exists():
                checkpoint.set_aside(damaged)
    control.wait()
    if newest is None:
        return 0
    folder, manifest = newest
    if manifest["step"] > stage.config.training.steps:
        log.warning(
            "training.steps=%d is below step %d, which %s has reached: there is nothing left to train",
            stage.config.training.steps, manifest["step"], logdir,
        )  # fmt: skip
    before = manifest["config"] if "config" in manifest else {}
    check_changes(before, stage.config, logdir, warn=control.rank == 0)
    stage_state = checkpoint.restore(folder, stage.train_states, control)
    if stage_state:
        stage.load_state_dict(stage_state)
    log.info("resuming %s at step %d of %d", logdir, manifest["step"], stage.config.training.steps)
    return manifest["step"]


class _RunReporter:
    """Reports the progress of a run: metric sinks, progress bar, warnings. Silent on all ranks but the first."""

    def __init__(self, stage: Stage, logdir: Path, start: int, sinks: Sequence[Sink]):
        self.stage, self.logdir, self.sinks = stage, logdir, sinks
        self.rows = [row for row in history(logdir) if row["step"] <= start] if stage.ranks.first else []
        steps, quiet = stage.config.training.steps, not stage.ranks.first
        still = range(start, steps)
        self.bar = tqdm(still, stage.name, steps, initial=start, dynamic_ncols=True, disable=quiet or None)
        self.restart_clock(start)

    def restart_clock(self, step: int) -> None:
        """Time only the steps after `step`: what was compiled, saved or validated before them is not theirs."""
        self.clock, self.since = time.perf_counter(), step

    def log(self, values: dict[str, Tensor], step: int) -> None:
        """Read the values of a step (the only host sync), write them and warn. NaN and infinity raise."""
        averaged = mean_over_ranks(values)
        row = dict(zip(averaged, torch.stack([v.float() for v in averaged.values()]).tolist(), strict=True))
        seconds = (time.perf_counter() - self.clock) / max(1, step - self.since)
        self.restart_clock(step)
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if self.stage.ranks.first:
            self.write(step, **row, seconds_per_step=seconds)
            log.info(progress_line(step, self.stage.config.training.steps, row, seconds))
            self.rows.append({"step": step} | row)
            for warning in self.stage.diagnose(self.rows) if not bad else []:
                log.warning("step %d: %s", step, warning)
        if bad:
            self.stop_at(bad, step)

    def write(self, step: int, **values: float) -> None:
        for sink in self.sinks:
            sink.write(step, **values)

    def stop_at(self, bad: list[str], step: int) -> NoReturn:
        path = self.logdir / f"not_finite_rank{self.stage.ranks.rank}.pt"
        inputs = f"the inputs of this step are in {path}"
        try:
            with atomic_path(path) as aside:
                torch.save({"step": step, **self.stage.inputs(step - 1)}, aside)
        except (OSError, RuntimeError, DiskFull) as error:
            if not is_disk_full(error):
                raise
            inputs = f"the disk has no room for the inputs of this step ({path})"
        raise NonFiniteLoss(
            f"{', '.join(bad)} not finite at step {step}; the last checkpoint is intact and {inputs}: lower the "
            "learning rate (training.optimizer.lr) and resume"
        )


def progress_line(step: int, steps: int, row: Mapping[str, float], seconds: float) -> str:
    """One line of at most WIDTH columns on a step: losses first, as many values as fit, and the remaining time."""
    left = timedelta(seconds=round(seconds * max(0, steps - step)))
    shown = f"{seconds:.3g}" if seconds < 999.5 else f"{seconds:.0f}"
    start, end = f"step {step}/{steps}", f"  {shown} s a step, {left} left"
    rank = {"loss": 0, "norm": 1}
    names = sorted(row, key=lambda name: (rank.get(name.rpartition("_")[2], 2), list(row).index(name)))
    for name in names:
        cell = f"  {name.removeprefix('generator_')} {row[name]:.3g}"
        if len(start) + len(cell) + len(end) <= WIDTH:
            start += cell
    return start + end


@contextmanager
def _explain_full_disk(logdir: Path) -> Iterator[None]:
    """Turns any library's error for a full disk into one sentence. Checkpoints have their own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"--logdir {logdir}: the disk is full ({str(error).splitlines()[0]}); existing checkpoints are "
            f"intact: make room, and start the same command again"
        ) from error


def _validate(stage: Stage, step: int, logdir: Path, reporter: _RunReporter, control: ControlGroup) -> None:
    if stage.sharded or stage.ranks.first:
        figures = stage.validate(step, logdir / "validation")
        if figures and stage.ranks.first:
            reporter.write(step, **{f"validation_{name}": value for name, value in figures.items()})
            log.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    release_memory()
    control.wait()


def run(
    stage: Stage, logdir: Path, sinks: Callable[[int], Sequence[Sink]] | None = None, *, save: bool = True,
    until: float = math.inf,
) -> bool:  # fmt: skip
    """Train until `training.steps`, a signal or the time `until`, of time.monotonic(). Returns whether the end was
    reached.

    sinks: makes the metric sinks, given the first step of the run; None = those of the configuration.
    save: write checkpoints and exports.
    """
    timeout_s = stage.config.training.timeout_s
    control = ControlGroup(timeout_s)
    logdir.mkdir(parents=True, exist_ok=True)
    resume = f"start the same command again: {logdir} resumes from its newest checkpoint"
    alone = exclusive_use(logdir, "--logdir") if control.rank == 0 else nullcontext()
    with alone, explain_lost_rank(control, resume, timeout_s), _explain_full_disk(logdir):
        start = _resume(stage, logdir, control)
        stage.begin(start, logdir)
        make = sinks or make_sinks(stage.config, logdir)
        made = make(start) if stage.ranks.first else []
        with _StopRequest(until) as stop, ExitStack() as stack:
            stack.callback(gc.unfreeze)
            reporter = _RunReporter(stage, logdir, start, [stack.enter_context(sink) for sink in made])
            if not _steps(stage, logdir, reporter, stop, control, save):
                return False
            reached = max(start, stage.config.training.steps)
            if stage.config.training.validation_clips:
                _validate(stage, reached, logdir, reporter, control)
                if save and stage.ranks.first:
                    show_curves(logdir, stage.name)
        if save:
            saved = stage.export_often and start < reached  # with the last checkpoint, to <logdir>/export
            _export(stage, logdir, reached, control, done=saved)
            if stage.ranks.first:
                write_json_atomic(logdir / END, {"steps": reached})
    return True


def make_sinks(
    config: Config, logdir: Path, *, wandb: bool = True, wandb_dir: str | None = None
) -> Callable[[int], list[Sink]]:
    """JSON lines, and the loggers of `training.loggers`. wandb: False leaves that one out."""

    def make(start: int) -> list[Sink]:
        sinks: list[Sink] = [JsonlSink(logdir / METRICS, resume_step=start)]
        if "tensorboard" in config.training.loggers:
            sinks.append(TensorboardSink(logdir, purge_step=start + 1))
        if "wandb" in config.training.loggers and wandb:
            name = f"{config.name}/{logdir.name}"
            sinks.append(WandbSink(name, logdir, to_dict(config), Path(wandb_dir) if wandb_dir else None))
        return sinks

    return make


def at_end(config: Config, logdir: Path) -> bool:
    """Whether the run in `logdir` has been trained, validated and exported to the last step of `config`."""
    try:
        steps = json.loads((logdir / END).read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return steps == config.training.steps and export_folder(config, logdir).is_dir()


def freeze_garbage() -> None:
    """Exclude existing objects from garbage collection: scanning networks, libraries and compiled code takes long, and
    happens at a different time on each rank."""
    gc.collect()
    gc.freeze()


def _steps(
    stage: Stage, logdir: Path, reporter: _RunReporter, stop: _StopRequest, control: ControlGroup, save: bool
) -> bool:
    """Run all remaining steps. Returns False if the run was stopped before the last one."""
    t, finite = stage.config.training, _FiniteCheck()

    def between() -> None:
        if control.any(stop.asked):
            raise _StepAborted

    stage.between, first = between, True
    for step in reporter.bar:
        try:
            values = stage.update(step)
        except _StepAborted:
            _stop_within_step(stage, logdir, step, reporter, finite, control, save)
            return False
        done = step + 1
        finite.put(values, done)
        stopping, failing = control.each(stop.asked, finite.bad())
        if failing:
            reporter.log(*finite.checked)
        saving = stopping or done == t.steps or (t.checkpoint_every and done % t.checkpoint_every == 0)
        if saving or done % t.log_every == 0:  # nothing is saved unchecked
            reporter.log(values, done)
        if first:
            freeze_garbage()
        if saving and save:
            save_checkpoint(stage, logdir, done, control)
        if stopping:
            log.info("stopped after step %d; the same command resumes", done)
            return False
        validating = t.validation_clips and t.validate_every and done % t.validate_every == 0 and done < t.steps
        if validating:
            _validate(stage, done, logdir, reporter, control)
        if first or saving or validating:
            reporter.restart_clock(done)
        first = False
    return True


def _stop_within_step(
    stage: Stage, logdir: Path, step: int, reporter: _RunReporter, finite: _FiniteCheck, control: ControlGroup,
    save: bool,
) -> None:  # fmt: skip
    """Save the state before step `step` (from 0), which was interrupted."""
    if control.any(finite.bad(drain=True)):
        reporter.log(*finite.checked)
    if not all(bool(value.isfinite().all()) for value in sharded_checkpoint.flat(stage.state_dict()).values()):
        reporter.stop_at(["values of the first half of the step are"], step + 1)
    if save:
        save_checkpoint(stage, logdir, step, control)
    log.info("stopped in step %d, which will be repeated; the same command resumes", step + 1)


def _export(stage: Stage, logdir: Path, step: int, control: ControlGroup, done: bool) -> None:
    """done: they have just been written to <logdir>/export."""
    folder = export_folder(stage.config, logdir)
    if (stage.sharded or stage.ranks.first) and not (done and folder == logdir / EXPORT):
        stage.export(folder, step)
    control.wait()
    log.info("trained weights are in %s", folder)
