"""The training loop: step, log, validate, save; stop and resume exactly."""

import signal
import time
from pathlib import Path

import torch
from tqdm import tqdm

from configs.load import to_dict
from configs.schema import Config
from trainer import checkpoint
from trainer.stage import Stage
from utils.logs import JsonlSink, get_logger

log = get_logger(__name__)


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


def _save(stage: Stage, logdir: Path, step: int) -> None:
    state = {name: player.state_dict() for name, player in stage.players.items()}
    manifest = {"stage": stage.name, "config": to_dict(stage.config)}
    checkpoint.save(logdir, step, state, manifest, stage.config.training.max_checkpoints)


def _resume(stage: Stage, logdir: Path) -> int:
    found = checkpoint.latest(logdir, stage.name)
    if found is None:
        return 0
    state, manifest = found
    for name, player in stage.players.items():
        player.load_state_dict(state[name])
    log.info("resuming %s at step %d of %d", logdir, manifest["step"], stage.config.training.steps)
    return manifest["step"]


def _log(values: dict[str, torch.Tensor], step: int, seconds: float, sink: JsonlSink, bar: tqdm) -> None:
    names, numbers = list(values), torch.stack([v.float() for v in values.values()]).tolist()  # the one host sync
    row = dict(zip(names, numbers, strict=True))
    sink.write(step, **row, seconds_per_step=seconds)
    bar.set_postfix_str(" ".join(f"{name} {value:.4g}" for name, value in row.items()))
    bad = [name for name, value in row.items() if value != value or abs(value) == float("inf")]
    if bad:
        raise NonFiniteLoss(f"{', '.join(bad)} not finite at step {step}; the last checkpoint is intact: lower the "
                            f"learning rate (training.optimizer.lr) and resume")  # fmt: skip


def _validate(stage: Stage, step: int, logdir: Path, sink: JsonlSink) -> None:
    figures = stage.validate(step, logdir / "validation")
    sink.write(step, **{f"validation_{name}": value for name, value in figures.items()})
    log.info("step %d: %s", step, ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))


def run(stage: Stage, logdir: Path) -> bool:
    """Train until `training.steps` or a signal. Returns whether the end was reached."""
    config: Config = stage.config
    t = config.training
    start = _resume(stage, logdir)
    with _Stop() as stop, JsonlSink(logdir / "metrics.jsonl", resume_step=start) as sink:
        bar = tqdm(range(start, t.steps), initial=start, total=t.steps, desc=stage.name, dynamic_ncols=True)
        clock = time.perf_counter()
        for step in bar:
            values = stage.update(step)
            done = step + 1
            if done % t.log_every == 0 or done == t.steps:
                now = time.perf_counter()
                _log(values, done, (now - clock) / t.log_every, sink, bar)
                clock = now
            if stop.asked or done == t.steps or (t.checkpoint_every and done % t.checkpoint_every == 0):
                _save(stage, logdir, done)
            if stop.asked:
                log.info("stopped by a signal after step %d; the same command resumes", done)
                return False
            if t.validate_every and done % t.validate_every == 0 and done < t.steps:
                _validate(stage, done, logdir, sink)
        if t.validation_clips:
            _validate(stage, t.steps, logdir, sink)
    folder = Path(t.export) if t.export else logdir / "export"
    stage.export(folder, t.steps)
    log.info("trained weights are in %s", folder)
    return True
