"""What may be other in the configuration of a run that goes on, and what may not.

A resumed run is the run that was stopped. FREE settings change nothing in its numbers; with TUNED ones, and with those
of ROLLOUT where rollouts are made by them, it goes on from here in another way, which is said; any other change is
refused, unless `training.accept_changes` names it. The number of processes is no setting: it may change as long as
`training.global_batch` stays.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.load import CHECKOUT, as_meant, to_dict
from configs.schema import Config
from model.weights.files import resolve_path
from model.weights.run_folders import EXPORT as EXPORTS
from model.weights.run_folders import MANIFEST, SHARDS, STATE, find_weights
from trainer.checkpoint.save import folders
from utils.files import CARD, replaceable
from utils.logs import get_logger

log = get_logger(__name__)

FREE = (
    "name", "device", "cpu_threads", "inference",
    "training.attention", "training.checkpointing", "training.compile", "training.cuda_graphs",
    "training.sharding", "training.shard_ranks", "training.sequence_parallel",
    "training.sequence_student", "training.timeout_s",
    "training.log_every", "training.loggers", "training.checkpoint_every", "training.max_checkpoints",
    "training.validate_every", "training.validation_clips", "training.export", "training.accept_changes",
    "training.accept_unfinished",
    "training.distill.video_clips", "training.distill.encode_ahead", "training.distill.encoded_prompts",
)  # fmt: skip
# what training.distill.fast_rollout makes rollouts by
ROLLOUT = ("inference.attention", "inference.compile", "inference.cuda_graphs")
KNOBS = ("lr", "betas", "eps", "weight_decay", "warmup_steps", "final_lr_share", "max_grad_norm")
TUNED = (
    "training.steps", "training.micro_batch", "training.precision", "training.ema_decay", "training.ema_start_step",
    "training.distill.spatial_weight", "training.distill.gamma", "training.distill.flow.weight",
    "training.distill.regression_weight", "training.distill.guidance", "training.distill.fake_guidance",
    "training.distill.teacher_fp8", "training.distill.fast_rollout",
    "training.flow", "training.codec",
    *(f"training.{name}.{knob}" for name in ("optimizer", "distill.critic_optimizer") for knob in KNOBS),
)  # fmt: skip


def export_folder(config: Config, logdir: Path) -> Path:
    """Where the trained modules of a run are written to at its end."""
    return CHECKOUT / config.training.export if config.training.export else logdir / EXPORTS


def check_export(config: Config, logdir: Path) -> None:
    """Refuse, before a network is made, an export that would replace what is not an earlier export of ours."""
    if config.training.export:
        replaceable(export_folder(config, logdir), "training.export", keep=[logdir])
    if not config.training.export or config.training.stage == "distill":  # which exports with every checkpoint
        replaceable(logdir / EXPORTS, f"--logdir {logdir}: its folder {EXPORTS}")


def check_starts(config: Config) -> None:
    """Refuse to start from a run of ours that has not reached its last step, before a network is made."""
    for name, source in config.training.init.items() if not config.training.accept_unfinished else ():
        step, steps = _progress(resolve_path(source))
        if step < steps:
            raise UserError(
                f"training.init.{name}={source} is at step {step} of {steps}; let that run reach its end (its own "
                f"command goes on with it), or set training.accept_unfinished=true"
            )


def _progress(path: Path) -> tuple[int, int]:
    """Step and last step of the run that what is read from `path` belongs to; of anything else, twice the same."""
    found = find_weights(path, averaged=False)
    try:
        if found.name in (STATE, SHARDS):
            manifest = json.loads((found.parent / MANIFEST).read_text(encoding="utf-8"))
            return int(manifest["step"]), int(manifest["config"]["training"]["steps"])
        card = json.loads((found / CARD).read_text(encoding="utf-8"))
        return int(card["step"]), int(card["steps"])
    except (OSError, ValueError, KeyError, TypeError):  # whoever loads it says what is wrong with it
        return 0, 0


def check_resumable(config: Config, logdir: Path) -> None:
    """`check_changes` against what `logdir` holds, if anything, before a network is made.

    Refuses a folder with a config.yaml that no run has written.
    """
    file = logdir / "config.yaml"
    if file.exists():
        text = file.read_text(encoding="utf-8", errors="replace")
        if text.strip() and not ("\ntraining:" in text and "\nstream:" in text):
            raise UserError(f"--logdir {logdir} holds a config.yaml that is of no run; choose another --logdir")
    for folder in reversed(folders(logdir)):
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            stage, before = manifest["stage"], manifest["config"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: the one before may be what the run goes on from
        check_stage(stage, config.training.stage, logdir)
        check_changes(before, config, logdir)
        return


def check_stage(before: str, now: str, logdir: Path) -> None:
    """Refuse to go on with a run of another stage."""
    if before != now:
        raise UserError(
            f"--logdir {logdir} holds a run of stage {before} and this is stage {now}; choose another --logdir"
        )


def check_changes(before: dict[str, Any], config: Config, logdir: Path) -> None:
    """Refuse what may not be other than in `before`, the configuration in a checkpoint's manifest; warn of the rest.

    Settings that did not exist then are left out.
    """
    now = dict(_leaves(to_dict(config)))
    changed = {key: (old, now[key]) for key, old in _leaves(as_meant(before)) if key in now and now[key] != old}
    accepted = config.training.accept_changes
    refused = [key for key in changed if not _in(key, (*FREE, *TUNED, *accepted))]
    if refused:
        key = refused[0]
        old, new = changed[key]
        more = f" ({len(refused) - 1} more: {', '.join(refused[1:4])})" if refused[1:] else ""
        raise UserError(
            f"{key}={new} was {old} when {logdir} was saved{more}, and a run goes on as it began; set it back, choose "
            f"another --logdir, or name it in training.accept_changes"
        )
    said = ROLLOUT if config.training.distill.fast_rollout else ()
    for key, (old, new) in changed.items():
        if not _in(key, FREE) or _in(key, said):
            log.warning(
                "%s was %s and is %s from here on: the run is no longer that of one configuration", key, old, new
            )


def _in(key: str, settings: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in settings)


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
