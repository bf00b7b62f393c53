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
from typing import Any, NoReturn

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
from trainer.parallel.control_group import ControlGroup, noticing_loss
from trainer.stage import Stage
from utils.curves import write_curves
from utils.files import exclusive_use, is_disk_full, write_json_atomic
from utils.logs import JsonlSink, Sink, get_logger, read_jsonl
from utils.sinks import TensorboardSink, WandbSink

log = get_logger(__name__)

METRICS, CURVES, END = "metrics.jsonl", "curves.png", "end.json"  # in the run's folder


class _Stop:
    """Turns SIGTERM, Ctrl-C and a closed terminal into a request, honoured after the micro-batch in flight."""

    def __enter__(self):
        self.asked = False
        asking = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            asking.append(signal.SIGHUP)
        self.terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        self.before = {s: signal.signal(s, self._ask) for s in asking}
        return self

    def _ask(self, number: int, *_):
        self.asked = True
        if number == signal.SIGHUP:  # the terminal has gone, and whatever is written to it would fail
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for descriptor in self.terminals:
                os.dup2(nowhere, descriptor)
            os.close(nowhere)

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


_Step = tuple[dict[str, Tensor], int, dict[str, Any]]  # what a step logs, its number, what it was given


class NonFiniteLoss(RuntimeError):
    """A logged value is NaN or infinite."""


class _Abandoned(Exception):
    """A signal came in the middle of a step, whose unfinished part is to be thrown away."""


class _Watch:
    """Whether the values of each step are finite, asked without a wait: on a GPU the answer comes one step late."""

    def __init__(self):
        self.pending: deque[tuple[Tensor, torch.cuda.Event | None, _Step]] = deque()
        self.judged: _Step | None = None  # the newest step whose answer was looked at, the same on all ranks

    def put(self, values: dict[str, Tensor], step: int, batch: dict[str, Any]) -> None:
        fine = torch.stack([value.detach().float() for value in values.values()]).isfinite().all()
        late = fine.device.type == "cuda"
        answer = torch.empty((), dtype=torch.bool, pin_memory=late).copy_(fine, non_blocking=late)
        event = torch.cuda.Event() if late else None
        if event is not None:
            event.record()
        self.pending.append((answer, event, (values, step, batch)))

    def bad(self, *, drain: bool = False) -> bool:
        """Whether `judged` is a step with a value that is not finite. drain: look at all steps, and wait for them."""
        while self.pending and (drain or len(self.pending) > 1 or self.pending[0][1] is None):
            answer, event, self.judged = self.pending.popleft()
            if event is not None:
                event.synchronize()
            if not bool(answer):
                return True
        return False


def history(logdir: Path) -> list[dict]:
    """What earlier processes of this run have logged of its steps."""
    path = logdir / METRICS
    return [row for row in read_jsonl(path) if "seconds_per_step" in row] if path.exists() else []


def save_checkpoint(stage: Stage, logdir: Path, step: int, control: ControlGroup) -> None:
    """Of a sharded stage each rank writes its parts; else the first one writes what all hold."""
    manifest = {"stage": stage.name, "config": to_dict(stage.config)}
    kept, players = stage.state_dict(), stage.players
    if stage.sharded:
        state = partial(sharded_checkpoint.write, players=players, kept=kept, control=control)
    else:
        first = stage.ranks.first  # the others hold the same
        state = {name: player.state_dict() for name, player in players.items()} | {"stage": kept} if first else {}
    checkpoint.save(logdir, step, state, manifest, stage.config.training.max_checkpoints, control)
    if stage.export_often and (stage.sharded or stage.ranks.first):
        stage.export(logdir / EXPORT, step)
    if stage.ranks.first:
        show_curves(logdir, stage.name)


def show_curves(logdir: Path, name: str) -> None:
    """Draw what the run has logged into its curves.png."""
    path = logdir / METRICS
    if path.exists():
        write_curves(logdir / CURVES, read_jsonl(path), f"{name}: {logdir.resolve().name}")


def _resume(stage: Stage, logdir: Path, control: ControlGroup) -> int:
    if control.rank == 0:
        checkpoint.clear_leftovers(logdir)
    found = checkpoint.newest(logdir, stage.name, control)
    if control.rank == 0:
        for damaged in checkpoint.folders(logdir):
            beyond = found is None or checkpoint.step_of(damaged) > checkpoint.step_of(found[0])
            if beyond and (damaged / MANIFEST).exists():
                checkpoint.set_aside(damaged)
    control.wait()
    if found is None:
        return 0
    folder, manifest = found
    if manifest["step"] > stage.config.training.steps:
        log.warning(
            "training.steps=%d is below step %d, which %s has reached: there is nothing left to train",
            stage.config.training.steps, manifest["step"], logdir,
        )  # fmt: skip
    check_changes(manifest["config"] if "config" in manifest else {}, stage.config, logdir)
    kept = checkpoint.restore(folder, stage.players, control)
    if kept:
        stage.load_state_dict(kept)
    log.info("resuming %s at step %d of %d", logdir, manifest["step"], stage.config.training.steps)
    return manifest["step"]


class _Journal:
    """What a run says of itself: sinks, progress bar of a terminal, warnings; silent on ranks but the first."""

    def __init__(self, stage: Stage, logdir: Path, start: int, sinks: Sequence[Sink]):
        self.stage, self.logdir, self.sinks = stage, logdir, sinks
        self.rows = [row for row in history(logdir) if row["step"] <= start] if stage.ranks.first else []
        steps, quiet = stage.config.training.steps, not stage.ranks.first
        still = range(start, steps)
        self.bar = tqdm(still, stage.name, steps, initial=start, dynamic_ncols=True, disable=quiet or None)
        self.clock, self.since = time.perf_counter(), start

    def log(self, values: dict[str, Tensor], step: int, batch: dict[str, Any]) -> None:
        """Read the values of a step, the one host sync; refuse NaN and infinity, keeping `batch`; write; warn."""
        averaged = mean_over_ranks(values)
        row = dict(zip(averaged, torch.stack([v.float() for v in averaged.values()]).tolist(), strict=True))
        now = time.perf_counter()
        seconds = (now - self.clock) / max(1, step - self.since)
        self.clock, self.since = now, step
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if self.stage.ranks.first:
            self.write(step, **row, seconds_per_step=seconds)
            log.info(progress_line(step, self.stage.config.training.steps, row, seconds))
            self.rows.append({"step": step} | row)
            for warning in self.stage.diagnose(self.rows) if not bad else []:
                log.warning("step %d: %s", step, warning)
        if bad:
            self.stop_at(bad, step, batch)

    def write(self, step: int, **values: float) -> None:
        for sink in self.sinks:
            sink.write(step, **values)

    def stop_at(self, bad: list[str], step: int, batch: dict[str, Any]) -> NoReturn:
        kept = self.logdir / f"not_finite_rank{self.stage.ranks.rank}.pt"
        given = f"what this step was given is in {kept}"
        try:
            torch.save({"step": step, **batch}, kept)
        except (OSError, RuntimeError) as error:
            if not is_disk_full(error):
                raise
            kept.unlink(missing_ok=True)
            given = f"the disk has no room for what this step was given ({kept})"
        raise NonFiniteLoss(
            f"{', '.join(bad)} not finite at step {step}; the last checkpoint is intact and {given}: lower the "
            "learning rate (training.optimizer.lr) and resume"
        )


def progress_line(step: int, steps: int, row: Mapping[str, float], seconds: float, width: int = 79) -> str:
    """A step as a line of at most `width` columns: as many values as have room, losses first; the time that is left."""
    left = timedelta(seconds=round(seconds * max(0, steps - step)))
    start, end = f"step {step}/{steps}", f"  {seconds:.2f} s a step, {left} left"
    rank = {"loss": 0, "norm": 1}
    names = sorted(row, key=lambda name: (rank.get(name.rpartition("_")[2], 2), list(row).index(name)))
    for name in names:
        cell = f"  {name.removeprefix('generator_')} {row[name]:.3g}"
        if len(start) + len(cell) + len(end) <= width:
            start += cell
    return start + end


@contextmanager
def _saying_no_room(logdir: Path) -> Iterator[None]:
    """Turns the error of any library for a disk that is full into one sentence. Checkpoints have their own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"--logdir {logdir}: the disk is full ({str(error).splitlines()[0]}); the checkpoints that are there are "
            f"whole: make room, and start the same command again"
        ) from error


def _validate(stage: Stage, step: int, logdir: Path, journal: _Journal, control: ControlGroup) -> None:
    if stage.sharded or stage.ranks.first:
        figures = stage.validate(step, logdir / "validation")
        if figures and stage.ranks.first:
            journal.write(step, **{f"validation_{name}": value for name, value in figures.items()})
            log.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    control.wait()


def run(stage: Stage, logdir: Path, sinks: Callable[[int], Sequence[Sink]] | None = None, *, save: bool = True) -> bool:
    """Train until `training.steps` or a signal. Returns whether the end was reached.

    sinks: makes the metric sinks, given the step that the run starts from; None = as the configuration says.
    save: write checkpoints and exports.
    """
    control = ControlGroup(stage.config.training.timeout_s)
    logdir.mkdir(parents=True, exist_ok=True)
    resume = f"start the same command again: {logdir} resumes from its newest checkpoint"
    with exclusive_use(logdir, "--logdir") if control.rank == 0 else nullcontext(), noticing_loss(resume), \
            _saying_no_room(logdir):  # fmt: skip
        start = _resume(stage, logdir, control)
        stage.begin(start, logdir)
        make = sinks or make_sinks(stage.config, logdir)
        made = make(start) if stage.ranks.first else []
        with _Stop() as stop, ExitStack() as stack:
            stack.callback(gc.unfreeze)
            journal = _Journal(stage, logdir, start, [stack.enter_context(sink) for sink in made])
            if not _steps(stage, logdir, journal, stop, control, save):
                return False
            reached = max(start, stage.config.training.steps)
            if stage.config.training.validation_clips:
                _validate(stage, reached, logdir, journal, control)
                if save and stage.ranks.first:
                    show_curves(logdir, stage.name)
        if save:
            _export(stage, logdir, reached, control)
            if stage.ranks.first:
                write_json_atomic(logdir / END, {"steps": reached})
    return True


def make_sinks(
    config: Config, logdir: Path, *, wandb: bool = True, wandb_dir: str | None = None
) -> Callable[[int], list[Sink]]:
    """JSON lines always, and what `training.loggers` names; `wandb` False leaves that one out whatever it says."""

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
    """Whether the run in `logdir` has been trained, validated and exported as far as `config` says."""
    try:
        steps = json.loads((logdir / END).read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return steps == config.training.steps and export_folder(config, logdir).is_dir()


def keep_garbage_small() -> None:
    """Have Python look for garbage among what is made from now on alone: networks, libraries and what the compiler has
    made stay, and to go through them all takes the host long, at a time of its own choosing on each rank."""
    gc.collect()
    gc.freeze()


def _steps(stage: Stage, logdir: Path, journal: _Journal, stop: _Stop, control: ControlGroup, save: bool) -> bool:
    """All steps that are left; whether none is."""
    t, watch = stage.config.training, _Watch()

    def between() -> None:
        if control.any(stop.asked):
            raise _Abandoned

    stage.between, first = between, True
    for step in journal.bar:
        try:
            values = stage.update(step)
        except _Abandoned:
            _leave(stage, logdir, step, journal, watch, control, save)
            return False
        if first:
            keep_garbage_small()
        done, first = step + 1, False
        watch.put(values, done, stage.last_batch())
        stopping, failing = control.each(stop.asked, watch.bad())
        if failing:
            journal.log(*watch.judged)
        saving = stopping or done == t.steps or (t.checkpoint_every and done % t.checkpoint_every == 0)
        if saving or done % t.log_every == 0:  # nothing is saved that was not looked at
            journal.log(values, done, stage.last_batch())
        if saving and save:
            save_checkpoint(stage, logdir, done, control)
        if stopping:
            log.info("stopped by a signal after step %d; the same command resumes", done)
            return False
        if t.validation_clips and t.validate_every and done % t.validate_every == 0 and done < t.steps:
            _validate(stage, done, logdir, journal, control)
    return True


def _leave(
    stage: Stage, logdir: Path, step: int, journal: _Journal, watch: _Watch, control: ControlGroup, save: bool
) -> None:
    """Save what is whole when a signal has come in the middle of step `step` (from 0)."""
    if control.any(watch.bad(drain=True)):
        journal.log(*watch.judged)
    if not all(bool(value.isfinite().all()) for value in sharded_checkpoint.flat(stage.state_dict()).values()):
        journal.stop_at(["what the first half of the step has logged is"], step + 1, stage.last_batch())
    if save:
        save_checkpoint(stage, logdir, step, control)
    log.info("stopped by a signal in step %d, which will be done again; the same command resumes", step + 1)


def _export(stage: Stage, logdir: Path, step: int, control: ControlGroup) -> None:
    folder = export_folder(stage.config, logdir)
    if stage.sharded or stage.ranks.first:
        stage.export(folder, step)
    control.wait()
    log.info("trained weights are in %s", folder)
