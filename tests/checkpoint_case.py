"""What checkpoints hold, read whole by one process."""

from pathlib import Path
from typing import Any

import torch

from model.weights.run_folders import SHARDS, STATE
from model.weights.sharded_files import read_whole, sharded_shapes
from trainer.checkpoint import save as checkpoint
from trainer.checkpoint.sharded import STAGE, _nested


def read_state(folder: Path) -> dict[str, Any]:
    """Of shards: {name: {"module": ..., "average": ..., "optimizer": ...}, "stage": ...}."""
    state: dict[str, Any] = {}
    stage_state = {}
    for name, value in read_whole(folder, sharded_shapes(folder)).items():
        owner, part, key = (*name.split(".", 2), "")[:3]
        if owner == STAGE:
            stage_state[name.removeprefix(f"{STAGE}.")] = value
        else:
            state.setdefault(owner, {}).setdefault(part, {})[key] = value
    return state | {STAGE: _nested(stage_state)}


def latest(logdir: Path, stage: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(state, manifest) of the newest intact checkpoint; None if there is none."""
    newest = checkpoint.newest(logdir, stage)
    if newest is None:
        return None
    folder, manifest = newest
    if (folder / SHARDS).exists():
        return read_state(folder / SHARDS), manifest
    return torch.load(folder / STATE, map_location="cpu", weights_only=True, mmap=True), manifest
