"""Checkpoints of a run: whole or not there, verified when read.

    <logdir>/checkpoint_000200/state.pt       tensors of every player (weights, average, optimiser)
                              /manifest.json  stage, step, schedule, config and the SHA-256 of state.pt

A checkpoint is written aside and renamed. One that does not verify is skipped, with a warning, for the one before.
"""

import json
import os
import shutil
from pathlib import Path

import torch

from configs.errors import UserError
from utils.files import sha256_of
from utils.logs import get_logger

log = get_logger(__name__)

PREFIX = "checkpoint_"


def folders(logdir: Path) -> list[Path]:
    """Checkpoints under `logdir`, oldest first."""
    return sorted(p for p in logdir.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit())


def save(logdir: Path, step: int, state: dict, manifest: dict, keep: int) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest `keep`."""
    final = logdir / f"{PREFIX}{step:06d}"
    aside = logdir / f".partial-{final.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        torch.save(state, aside / "state.pt")
        manifest = manifest | {"step": step, "sha256": sha256_of(aside / "state.pt")}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in folders(logdir)[:-keep]:
        shutil.rmtree(old)
    return final


def verified(folder: Path) -> dict | None:
    """The manifest of `folder`, or None (with a warning) if the checkpoint is not whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["sha256"] == sha256_of(folder / "state.pt"):
            return manifest
        reason = "state.pt does not match its hash"
    except (OSError, ValueError, KeyError) as error:
        reason = str(error)
    log.warning("%s is damaged (%s); falling back to the one before", folder, reason)
    return None


def latest(logdir: Path, stage: str) -> tuple[dict, dict] | None:
    """(state, manifest) of the newest whole checkpoint under `logdir`, or None. Refuses another stage's folder."""
    for folder in reversed(folders(logdir)):
        manifest = verified(folder)
        if manifest is None:
            continue
        if manifest["stage"] != stage:
            raise UserError(
                f"--logdir {logdir} holds a run of stage {manifest['stage']} and this is stage {stage}; "
                f"choose another --logdir"
            )
        return torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=True), manifest
    return None
