"""Which settings may change when a run is resumed.

FREE settings do not change the numbers of a run. A change of TUNED ones, and of ROLLOUT ones with
`training.distill.fast_rollout`, is logged as a warning. Any other change is refused, unless `training.accept_changes`
names it. The number of processes may change as long as `training.global_batch` stays.
"""

import json
from pathlib import Path
from typing import Any

from configs.errors import UserError, shown
from configs.load import CHECKOUT, moved, to_dict
from configs.schema import Config
from configs.train_schema import INIT
from model.weights.files import resolve_path
from model.weights.run_folders import EXPORT as EXPORTS
from model.weights.run_folders import MANIFEST, SHARDS, STATE, find_weights
from trainer.checkpoint.save import check_stage, folders
from trainer.checkpoint.sharded import flat
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
# settings of the fast student that training.distill.fast_rollout makes rollouts with
ROLLOUT = ("inference.attention", "inference.compile", "inference.cuda_graphs")
OPTIMIZER = ("lr", "betas", "eps", "weight_decay", "warmup_steps", "final_lr_share", "max_grad_norm")
TUNED = (
    "training.steps", "training.micro_batch", "training.precision", "training.ema_decay", "training.ema_start_step",
    "training.distill.spatial_weight", "training.distill.gamma", "training.distill.flow.weight",
    "training.distill.regression_weight", "training.distill.guidance", "training.distill.fake_guidance",
    "training.distill.teacher_fp8", "training.distill.fast_rollout",
    "training.flow", "training.codec",
    *(f"training.{name}.{setting}" for name in ("optimizer", "distill.critic_optimizer") for setting in OPTIMIZER),
)  # fmt: skip


def export_folder(config: Config, logdir: Path) -> Path:
    """Folder that the trained weights of a run are exported to at its end."""
    return CHECKOUT / config.training.export if config.training.export else logdir / EXPORTS


def check_export(config: Config, logdir: Path) -> None:
    """Refuse, before a network is built, an export that would replace anything but an earlier export of ours."""
    if config.training.export:
        replaceable(export_folder(config, logdir), "training.export", keep=[logdir])
    replaceable(logdir / EXPORTS, f"--logdir {logdir}: its folder {EXPORTS}")  # of those with every checkpoint


def check_init_finished(config: Config) -> None:
    """Refuse, before a network is built, to start from a run of ours that has not reached its last step."""
    for name, source in config.training.init.items() if not config.training.accept_unfinished else ():
        step, steps = _progress(resolve_path(source))
        if step < steps:
            raise UserError(
                f"training.init.{name}={source} is at step {step} of {steps}; finish that run (its own "
                f"command resumes it), or set training.accept_unfinished=true"
            )


def _progress(path: Path) -> tuple[int, int]:
    """Step and last step of the run that `path` belongs to; (0, 0) for anything else."""
    source = find_weights(path)
    try:
        if source.name in (STATE, SHARDS):
            manifest = json.loads((source.parent / MANIFEST).read_text(encoding="utf-8"))
            return int(manifest["step"]), int(manifest["config"]["training"]["steps"])
        card = json.loads((source / CARD).read_text(encoding="utf-8"))
        return int(card["step"]), int(card["steps"])
    except (OSError, ValueError, KeyError, TypeError):  # loading it reports what is wrong
        return 0, 0


def check_resumable(config: Config, logdir: Path) -> None:
    """`check_changes` against the newest checkpoint in `logdir`, if any, before a network is built.

    Refuses a folder with a config.yaml that was not written by a run.
    """
    file = logdir / "config.yaml"
    if file.exists():
        text = file.read_text(encoding="utf-8", errors="replace")
        if text.strip() and not ("\ntraining:" in text and "\nstream:" in text):
            raise UserError(f"--logdir {logdir} holds a config.yaml that no run has written; choose another --logdir")
    for folder in reversed(folders(logdir)):
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            stage, before = manifest["stage"], manifest["config"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged: the run may resume from the one before
        check_stage(stage, config.training.stage, logdir)
        check_changes(before, config, logdir, warn=False)  # once, by who resumes
        return


def check_changes(before: dict[str, Any], config: Config, logdir: Path, *, warn: bool = True) -> None:
    """Refuse changes from `before`, the configuration in a checkpoint's manifest, that are not allowed; warn of others.

    Settings that `before` lacks are ignored, except networks of `training.init`: an older version lacks none of them.
    """
    saved, now = flat(moved(before)), flat(to_dict(config))
    if saved:
        saved, now = ({f"training.init.{role}": None for role in INIT} | values for values in (saved, now))
    changed = {key: (old, now[key]) for key, old in saved.items() if key in now and now[key] != old}
    accepted = config.training.accept_changes
    refused = [key for key in changed if not _in(key, (*FREE, *TUNED, *accepted))]
    if refused:
        key = refused[0]
        old, new = changed[key]
        more = f" ({len(refused) - 1} more: {', '.join(refused[1:4])})" if refused[1:] else ""
        raise UserError(
            f"{key}={shown(new)} was {shown(old)} when {logdir} was saved{more}, and a resumed run keeps it; set it "
            f"back, choose another --logdir, or name it in training.accept_changes"
        )
    reported = ROLLOUT if config.training.distill.fast_rollout else ()
    for key, (old, new) in changed.items() if warn else ():
        if not _in(key, FREE) or _in(key, reported):
            log.warning(
                "%s was %s and is %s from here on: the run is no longer that of one configuration",
                key, shown(old), shown(new),
            )  # fmt: skip


def _in(key: str, settings: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in settings)
