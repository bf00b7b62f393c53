"""The training loop: step, log, validate, save; stop and resume exactly."""

import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import torch
from tqdm import tqdm

from configs.load import CHECKOUT, to_dict
from configs.schema import Config
from trainer import checkpoint
from trainer.parallel import Agreement, barrier, mean_over_ranks
from trainer.stage import Stage
from utils.logs import JsonlSink, Sink, get_logger, read_jsonl
from utils.sinks import TensorboardSink, WandbSink

log = get_logger(__name__)

METRICS = "metrics.jsonl"  # in the run's folder


class _Stop:
    """Turns SIGTERM and Ctrl-C into a request that the loop honours after the step in flight."""

    def __enter__(self):
        self.asked = False
        self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, *_):
        self.asked = True

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


class NonFiniteLoss(RuntimeError):
    """A logged value is NaN or infinite."""


def history(logdir: Path) -> list[dict]:
    """What earlier processes of this run have logged of its steps."""
    path = logdir / METRICS
    return [row for row in read_jsonl(path) if "seconds_per_step" in row] if path.exists() else []


def _save(stage: Stage, logdir: Path, step: int) -> None:
    """Every rank takes part in gathering the state; the first one writes it."""
    state = {name: player.state_dict() for name, player in stage.players.items()}
    if stage.ranks.first:
        manifest = {"stage": stage.name, "config": to_dict(stage.config)}
        kept = state | {"stage": stage.state_dict()}
        checkpoint.save(logdir, step, kept, manifest, stage.config.training.max_checkpoints)
    if stage.export_often and (stage.sharded or stage.ranks.first):
        stage.export(logdir / "export", step)


def _resume(stage: Stage, logdir: Path) -> int:
    found = checkpoint.latest(logdir, stage.name)
    if found is None:
        return 0
    state, manifest = found
    for name, player in stage.players.items():
        player.load_state_dict(state[name])
    if "stage" in state:
        stage.load_state_dict(state["stage"])
    log.info("resuming %s at step %d of %d", logdir, manifest["step"], stage.config.training.steps)
    return manifest["step"]


class _Journal:
    """What a run says of itself: sinks, progress bar, warnings; silent on ranks other than the first."""

    def __init__(self, stage: Stage, logdir: Path, start: int, sinks: Sequence[Sink]):
        self.stage, self.logdir, self.sinks = stage, logdir, sinks
        self.rows = [row for row in history(logdir) if row["step"] <= start] if stage.ranks.first else []
        steps, quiet = stage.config.training.steps, not stage.ranks.first
        still = range(start, steps)
        self.bar = tqdm(still, stage.name, steps, initial=start, dynamic_ncols=True, disable=quiet)
        self.clock, self.since = time.perf_counter(), start

    def log(self, values: dict[str, torch.Tensor], step: int) -> None:
        """Read the values of a step, the one host sync; refuse NaN and infinity; write; warn."""
        averaged = mean_over_ranks(values)
        row = dict(zip(averaged, torch.stack([v.float() for v in averaged.values()]).tolist(), strict=True))
        now = time.perf_counter()
        seconds = (now - self.clock) / max(1, step - self.since)
        self.clock, self.since = now, step
        bad = [name for name, value in row.items() if not math.isfinite(value)]
        if self.stage.ranks.first:
            self.write(step, **row, seconds_per_step=seconds)
            self.bar.set_postfix_str(" ".join(f"{name} {value:.4g}" for name, value in row.items()))
            self.rows.append({"step": step} | row)
            for warning in self.stage.diagnose(self.rows) if not bad else []:
                log.warning("step %d: %s", step, warning)
        if bad:
            self._stop_at(bad, step)

    def write(self, step: int, **values: float) -> None:
        for sink in self.sinks:
            sink.write(step, **values)

    def _stop_at(self, bad: list[str], step: int) -> NoReturn:
        kept = self.logdir / f"not_finite_rank{self.stage.ranks.rank}.pt"
        torch.save({"step": step, **self.stage.last_batch()}, kept)
        raise NonFiniteLoss(
            f"{', '.join(bad)} not finite at step {step}; the last checkpoint is intact and what this step was given "
            f"is in {kept}: lower the learning rate (training.optimizer.lr) and resume"
        )


def _validate(stage: Stage, step: int, logdir: Path, journal: _Journal) -> None:
    if stage.sharded or stage.ranks.first:
        figures = stage.validate(step, logdir / "validation")
        if figures and stage.ranks.first:
            journal.write(step, **{f"validation_{name}": value for name, value in figures.items()})
            log.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    barrier()


def run(stage: Stage, logdir: Path, sinks: Callable[[int], Sequence[Sink]] | None = None, *, save: bool = True) -> bool:
    """Train until `training.steps` or a signal. Returns whether the end was reached.

    sinks: makes the metric sinks, given the step that the run starts from; None = as the configuration says.
    save: write checkpoints and exports.
    """
    start = _resume(stage, logdir)
    stage.begin(start, logdir)
    make = sinks or make_sinks(stage.config, logdir)
    made = make(start) if stage.ranks.first else []
    with _Stop() as stop, ExitStack() as stack:
        journal = _Journal(stage, logdir, start, [stack.enter_context(sink) for sink in made])
        if not _steps(stage, logdir, journal, stop, save):
            return False
        if stage.config.training.validation_clips:
            _validate(stage, stage.config.training.steps, logdir, journal)
    if save:
        _export(stage, logdir)
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


def _steps(stage: Stage, logdir: Path, journal: _Journal, stop: _Stop, save: bool) -> bool:
    """All steps that are left; whether none is."""
    t, agreement = stage.config.training, Agreement()
    for step in journal.bar:
        values = stage.update(step)
        done = step + 1
        stopping = agreement.any(stop.asked)
        saving = stopping or done == t.steps or (t.checkpoint_every and done % t.checkpoint_every == 0)
        if saving or done % t.log_every == 0:  # nothing is saved that was not looked at
            journal.log(values, done)
        if saving and save:
            _save(stage, logdir, done)
        if stopping:
            log.info("stopped by a signal after step %d; the same command resumes", done)
            return False
        if t.validation_clips and t.validate_every and done % t.validate_every == 0 and done < t.steps:
            _validate(stage, done, logdir, journal)
    return True


def _export(stage: Stage, logdir: Path) -> None:
    t = stage.config.training
    folder = CHECKOUT / t.export if t.export else logdir / "export"
    if stage.sharded or stage.ranks.first:
        stage.export(folder, t.steps)
    barrier()
    log.info("trained weights are in %s", folder)
