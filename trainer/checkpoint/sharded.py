"""What a sharded run's checkpoint holds: each rank writes its own parts, and any number of ranks reads them back.

Names: `<player>.module.<name>`, `<player>.average.<name>`, `<player>.optimizer.<parameter>.<entry>`, `stage.<...>`.
Nothing is gathered: a rank needs no more memory than the tensor that it is just writing. Tensors that several ranks
hold the same (between the groups of hybrid sharding, counters) are written once.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from configs.errors import UserError
from model.weights.sharded_files import Shapes, ShardedReader, read_whole, sharded_shapes
from trainer.optim.train_state import TrainState
from trainer.parallel.apply import load_optimizer_state, optimized
from trainer.parallel.control_group import ControlGroup

STAGE = "stage"
WRITERS = 1  # threads of a rank; of more, torch (2.11 to 2.13) loses the error of each but the first: a full disk


class ShardError(OSError):
    """Writing or reading failed on some rank; its message is that rank's."""


def _plain(error: CheckpointException) -> ShardError:
    """torch's exception, which holds all ranks' tracebacks and is none that programs expect, as one sentence."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return ShardError(f"rank {rank}: {str(cause).splitlines()[0] if str(cause) else type(cause).__name__}")


def player_tensors(name: str, player: TrainState) -> dict[str, Tensor]:
    """Weights and averages of a player, by their names in a checkpoint; the tensors themselves, not copies."""
    found = {f"{name}.module.{key}": value for key, value in player.module.state_dict().items()}
    if player.average is not None:
        found |= {f"{name}.average.{key}": value for key, value in player.average.module.state_dict().items()}
    return found


def write(folder: Path, players: dict[str, TrainState], kept: dict[str, Any], control: ControlGroup) -> None:
    """Write the players and what the stage keeps besides (nested dictionaries of tensors) into an empty folder."""
    tensors = {f"{STAGE}.{name}": value for name, value in flat(kept).items()}
    for name, player in players.items():
        tensors |= player_tensors(name, player)
        for parameter, p in optimized(player.module, player.optimizer):
            entries = player.optimizer.state[p] if p in player.optimizer.state else {}
            tensors |= {f"{name}.optimizer.{parameter}.{key}": value for key, value in entries.items()}
    odd = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    assert not odd, f"{odd[:3]} are no tensors"
    try:
        writer = FileSystemWriter(folder, thread_count=WRITERS)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: it is
            dcp.save(tensors, storage_writer=writer, process_group=control.group, no_dist=not control.group)
    except CheckpointException as error:
        raise _plain(error) from error


def read(folder: Path, players: dict[str, TrainState], control: ControlGroup) -> dict[str, Any]:
    """Read the players' state into them, whatever number of ranks wrote it; return what the stage kept."""
    shapes = sharded_shapes(folder)
    tensors = {name: torch.zeros(*shapes[name][:1], dtype=shapes[name][1]) for name in _of(shapes, STAGE)}
    optimizers = {name: _entries(name, player, shapes) for name, player in players.items()}
    for name, player in players.items():
        tensors |= player_tensors(name, player)
        for parameter, entries in optimizers[name].items():
            tensors |= {f"{name}.optimizer.{parameter}.{key}": value for key, value in entries.items()}
    lost = sorted(tensors.keys() - shapes.keys())
    if lost:
        raise UserError(
            f"{folder} has no {lost[0]}, which this run needs; it is of another version or of other networks, so "
            f"choose another --logdir"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process: it is
            reader, alone = ShardedReader(folder), not control.group
            dcp.load(tensors, storage_reader=reader, process_group=control.group, no_dist=alone)
    except CheckpointException as error:
        raise _plain(error) from error
    for name, player in players.items():
        load_optimizer_state(player.module, player.optimizer, optimizers[name])
    return _nested({name.removeprefix(f"{STAGE}."): tensors[name] for name in _of(shapes, STAGE)})


def read_state(folder: Path) -> dict[str, Any]:
    """All of it, put together on the CPU: {player: {"module": ..., "average": ..., "optimizer": ...}, "stage": ...}."""
    state: dict[str, Any] = {}
    kept = {}
    for name, value in read_whole(folder, sharded_shapes(folder)).items():
        player, part, key = (*name.split(".", 2), "")[:3]
        if player == STAGE:
            kept[name.removeprefix(f"{STAGE}.")] = value
        else:
            state.setdefault(player, {}).setdefault(part, {})[key] = value
    return state | {STAGE: _nested(kept)}


def _entries(name: str, player: TrainState, shapes: Shapes) -> dict[str, dict[str, Tensor]]:
    """Zeros for a player's optimiser, whose state does not exist before its first step: {parameter: {entry: ...}}."""
    found: dict[str, dict[str, Tensor]] = {}
    known = _of(shapes, f"{name}.optimizer")
    for parameter, p in optimized(player.module, player.optimizer):
        start = f"{name}.optimizer.{parameter}."
        for key in (key.removeprefix(start) for key in known if key.startswith(start)):
            shape, dtype = shapes[start + key]
            same = shape == tuple(p.shape)
            zeros = torch.zeros_like(p, dtype=dtype, requires_grad=False) if same else torch.zeros(shape, dtype=dtype)
            found.setdefault(parameter, {})[key] = zeros
    return found


def _of(shapes: Shapes, prefix: str) -> list[str]:
    return [name for name in shapes if name.startswith(f"{prefix}.")]


def flat(state: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dictionaries, by dotted names."""
    found = {}
    for key, value in state.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _nested(flat: dict[str, Tensor]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, value in flat.items():
        *path, key = name.split(".")
        inner = state
        for part in path:
            inner = inner.setdefault(part, {})
        inner[key] = value
    return state
