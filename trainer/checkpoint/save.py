"""Checkpoints of a run: whole or not there, verified when read.

    <logdir>/checkpoint_000200/manifest.json  stage, step, schedule, config and the hash of each file
                              /state.pt       tensors of every train state (weights, EMA, optimizer)
                              /shards/...     of a sharded run instead: the shards of each rank (sharded.py)

A checkpoint is written to a temporary folder, flushed to the disk and renamed, before an older one is removed. One that
does not verify is skipped, with a warning, for the one before. Either form can be read by any number of ranks, sharded
or not.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_crc32_options, set_crc32_options

from configs.errors import UserError
from model.weights import run_folders
from model.weights.run_folders import MANIFEST, SHARDS, STATE
from trainer.checkpoint import sharded as sharded_checkpoint
from trainer.optim.train_state import TrainState
from trainer.parallel.control_group import ControlGroup, FailedElsewhere
from utils.files import HashedFile, OwnedFolder, block_hash_of, is_disk_full, matches_hash
from utils.logs import get_logger

log = get_logger(__name__)

PREFIX, ASIDE, BEFORE = "checkpoint_", ".partial-", "-before"
OURS = OwnedFolder(MANIFEST, re.compile(rf"{re.escape(MANIFEST)}|{re.escape(STATE)}|{SHARDS}/"))


class SaveFailed(UserError):
    """A checkpoint could not be written."""


def folders(logdir: Path) -> list[Path]:
    """Checkpoints under `logdir`, complete or not, in order of their steps."""
    return [p for p in run_folders.checkpoints(logdir) if re.fullmatch(f"{PREFIX}[0-9]+", p.name)]


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix(PREFIX))


def save(
    logdir: Path,
    step: int,
    state: dict[str, Any] | Callable[[Path], dict[str, str]],
    manifest: dict[str, Any],
    keep: int,
    control: ControlGroup | None = None,
) -> Path:
    """Write the checkpoint of `step`, then remove older complete ones so that `keep` are left. All ranks call
    this and fail together.

    state: written by the first rank; or a function with which each rank writes its shards into an empty folder, and
        which returns the hashes of its files by their names.
    Raises SaveFailed, and leaves earlier checkpoints untouched.
    """
    control = control or ControlGroup()
    first, final = control.rank == 0, logdir / f"{PREFIX}{step:06d}"
    aside, hashes = logdir / f"{ASIDE}{final.name}", {}

    def on_first(work: Callable[[], Any]) -> None:
        control.run_on_all("saving", lambda: work() if first else None)

    try:
        on_first(lambda: _make_empty(aside))
        with _without_crc():
            if callable(state):
                written = [item for part in control.gather(state(aside / SHARDS)) for item in part.items()]
                on_first(lambda: hashes.update(files=_hashes(aside, dict(written))))
            else:
                on_first(lambda: hashes.update(sha256=_write(state, aside / STATE)))
        on_first(lambda: _finish(aside, final, manifest | {"step": step, "ranks": control.world} | hashes))
    except (OSError, RuntimeError, FailedElsewhere) as error:
        if isinstance(error, RuntimeError) and not is_disk_full(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        last = [p.name for p in folders(logdir) if step_of(p) < step and run_folders.is_complete(p)]
        raise SaveFailed(
            f"--logdir {logdir}: the checkpoint of step {step} could not be written ({reason}); "
            f"{f'{last[-1]} is intact' if last else 'there is none before it'}; make room, and start the same command "
            f"again"
        ) from error
    finally:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
    if first:
        _prune(logdir, step, keep)
    return final


def _prune(logdir: Path, step: int, keep: int) -> None:
    """Remove complete checkpoints before `step` but for the newest `keep - 1`. Incomplete ones do not count."""
    older = [p for p in folders(logdir) if step_of(p) < step and run_folders.is_complete(p)]
    for folder in older[: max(0, len(older) - (keep - 1))]:
        if not folder.is_symlink() and not OURS.foreign_entries(folder):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _without_crc() -> Iterator[None]:
    """torch.save without a CRC-32 of each tensor, which is slow and not needed: the manifest has SHA-256 hashes."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write(state: dict[str, Any], path: Path) -> str:
    """Write `state` and return its hash."""
    with HashedFile(path) as file:
        torch.save(state, file)
        return file.hexdigest()


def _hashes(aside: Path, written: dict[str, str]) -> dict[str, str]:
    """The hash of each file of a sharded checkpoint; `written`: those of the shards by their names."""
    names = sorted(file.name for file in (aside / SHARDS).iterdir())
    return {f"{SHARDS}/{name}": written.get(name) or block_hash_of(aside / SHARDS / name) for name in names}


def _finish(aside: Path, final: Path, manifest: dict[str, Any]) -> None:
    names = manifest["files"] if "files" in manifest else [STATE]
    manifest = manifest | {"sizes": {name: (aside / name).stat().st_size for name in names}}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False))
    for path in (*(aside / name for name in names), aside / MANIFEST, *{(aside / name).parent for name in names}):
        _flush_to_disk(path)
    before = aside.with_name(f"{aside.name}{BEFORE}")
    if os.path.lexists(final):  # a folder cannot be replaced in one step
        if final.is_symlink() or not final.is_dir() or OURS.foreign_entries(final):
            set_aside(final)
        else:
            os.replace(final, before)
    os.replace(aside, final)
    _flush_to_disk(final.parent)
    shutil.rmtree(before, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    """Return once a file, or a folder's list of files, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some file systems sync files alone
            raise
    finally:
        os.close(descriptor)


def set_aside(folder: Path) -> Path:
    """Rename a folder that is not a complete checkpoint."""
    names = (folder.with_name(f"damaged_{folder.name}{f'_{i}' * bool(i)}") for i in count())
    other = next(name for name in names if not os.path.lexists(name))
    os.rename(folder, other)
    log.warning("%s is not a complete checkpoint and has been renamed to %s", folder, other.name)
    return other


def verified(folder: Path, control: ControlGroup | None = None) -> dict[str, Any] | None:
    """The manifest of `folder`, or None (with a warning) if the checkpoint is damaged. Ranks share the reading."""
    control = control or ControlGroup()
    manifest, reason = None, None
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"] if "files" in manifest else {STATE: manifest["sha256"]}
        own = sorted(files)[control.rank :: control.world]
        wrong = [name for name in own if not matches_hash(folder / name, files[name])]
        reason = f"{wrong[0]} does not match its hash" if wrong else None
        if re.fullmatch(f"{PREFIX}[0-9]+", folder.name) and manifest["step"] != step_of(folder):
            reason = f"it is of step {manifest['step']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) or type(error).__name__
    reasons = [text for text in control.gather(reason) if text]
    if not reasons:
        return manifest
    if control.rank == 0:
        log.warning("%s is damaged (%s); falling back to the one before", folder, reasons[0])
    return None


def check_stage(before: str, now: str, logdir: Path) -> None:
    """Refuse to resume a run of another stage."""
    if before != now:
        raise UserError(
            f"--logdir {logdir} holds a run of stage {before} and this is stage {now}; choose another --logdir"
        )


def newest(logdir: Path, stage: str, control: ControlGroup | None = None) -> tuple[Path, dict[str, Any]] | None:
    """(folder, manifest) of the newest intact checkpoint under `logdir`, or None. Refuses another stage's folder."""
    control = control or ControlGroup()
    names = control.gather([folder.name for folder in folders(logdir)])[0]  # as the first rank sees them
    for folder in (logdir / name for name in reversed(names)):
        manifest = verified(folder, control)
        if manifest is None:
            continue
        check_stage(manifest["stage"], stage, logdir)
        return folder, manifest
    return None


def restore(folder: Path, train_states: dict[str, TrainState], control: ControlGroup | None = None) -> dict[str, Any]:
    """Load train states, on each rank its own part; returns the stage's own state."""
    if (folder / SHARDS).exists():
        return sharded_checkpoint.read(folder / SHARDS, train_states, control or ControlGroup())
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True)
    if lost := sorted(train_states.keys() - state.keys()):
        raise sharded_checkpoint.lacking(folder / STATE, lost[0])
    for name, train_state in train_states.items():
        train_state.load_state_dict(state[name])
    return state["stage"] if "stage" in state else {}


def clear_leftovers(logdir: Path) -> None:
    """Remove what a process that was killed while saving has left; the caller has `exclusive_use` of the folder."""
    for folder in logdir.glob(f"{ASIDE}{PREFIX}*{BEFORE}"):
        final = logdir / folder.name.removeprefix(ASIDE).removesuffix(BEFORE)
        if not os.path.lexists(final):  # killed between the two renames
            os.replace(folder, final)
    for folder in logdir.glob(f"{ASIDE}{PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)
