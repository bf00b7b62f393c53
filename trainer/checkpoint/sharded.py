"""Sharded checkpoints: each rank writes its own shards, and any number of ranks can read them.

Names: `<state>.module.<name>`, `<state>.average.<name>`, `<state>.optimizer.<parameter>.<entry>`, `stage.<...>`, where
`<state>` names a `TrainState`. Nothing is gathered: a rank needs no more memory than the tensor that it is writing.
Replicated tensors (of hybrid sharding, counters) are written once.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem

from configs.errors import UserError
from model.weights.sharded_files import Shapes, ShardedReader, sharded_shapes
from trainer.optim.train_state import TrainState
from trainer.parallel.apply import load_optimizer_state, optimized, other_networks
from trainer.parallel.control_group import ControlGroup
from utils.files import HashedFile

STAGE = "stage"
WRITERS = 1  # threads of a rank; with more, torch (2.11 to 2.13) drops all errors but the first thread's (full disk)


class ShardError(OSError):
    """Writing or reading failed on some rank; its message is that rank's."""


class _HashingFileSystem(FileSystem):
    """Files are hashed while they are written: `hashes` by name."""

    def __init__(self):
        self.hashes: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with HashedFile(path) as file:
            yield file
            self.hashes[Path(path).name] = file.hexdigest()


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raises torch's exception, which holds the tracebacks of all ranks, as one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # in a single process
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise ShardError(f"rank {rank}: {reason}") from error


def train_state_tensors(name: str, train_state: TrainState) -> dict[str, Tensor]:
    """Trained weights and EMA of a train state by their names in a checkpoint; the tensors themselves, not copies."""
    return {
        f"{name}.{part}.{key}": value
        for part, module in train_state.modules.items()
        for key, value in train_state.saved(module.state_dict()).items()
    }


def write(
    folder: Path, train_states: dict[str, TrainState], stage_state: dict[str, Any], control: ControlGroup
) -> dict[str, str]:
    """Write train states and the stage's own state (nested dictionaries of tensors) into an empty folder.

    Returns the hashes of the files of this rank by their names.
    """
    tensors = {f"{STAGE}.{name}": value for name, value in flat(stage_state).items()}
    for name, train_state in train_states.items():
        tensors |= train_state_tensors(name, train_state)
        for parameter, p in optimized(train_state.module, train_state.optimizer):
            entries = train_state.optimizer.state[p] if p in train_state.optimizer.state else {}
            tensors |= {f"{name}.optimizer.{parameter}.{key}": value for key, value in entries.items()}
    wrong = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    assert not wrong, f"{wrong[:3]} are not tensors"
    with _plain_errors():
        writer = FileSystemWriter(folder, thread_count=WRITERS)
        writer.fs = files = _HashingFileSystem()
        dcp.save(tensors, storage_writer=writer, process_group=control.group, no_dist=not control.group)
    return files.hashes


def read(folder: Path, train_states: dict[str, TrainState], control: ControlGroup) -> dict[str, Any]:
    """Load train states, whatever number of ranks wrote them; return the stage's own state."""
    shapes = sharded_shapes(folder)
    tensors = {name: torch.zeros(*shapes[name][:1], dtype=shapes[name][1]) for name in _of(shapes, STAGE)}
    optimizers = {name: _entries(name, train_state, shapes) for name, train_state in train_states.items()}
    for name, train_state in train_states.items():
        tensors |= train_state_tensors(name, train_state)
        for parameter, entries in optimizers[name].items():
            tensors |= {f"{name}.optimizer.{parameter}.{key}": value for key, value in entries.items()}
    lost = sorted(tensors.keys() - shapes.keys())
    if lost:
        raise lacking(folder, lost[0])
    networks = [f"{name}.{part}" for name, train_state in train_states.items() for part in train_state.modules]
    theirs = {key: tuple(shapes[key][0]) for network in networks for key in _of(shapes, network)}
    other = sorted(key for key, shape in theirs.items() if key not in tensors or shape != tuple(tensors[key].shape))
    if other:
        raise other_networks(other)
    with _plain_errors():
        reader = ShardedReader(folder)
        dcp.load(tensors, storage_reader=reader, process_group=control.group, no_dist=not control.group)
    for name, train_state in train_states.items():
        load_optimizer_state(train_state.module, train_state.optimizer, optimizers[name])
    return _nested({name.removeprefix(f"{STAGE}."): tensors[name] for name in _of(shapes, STAGE)})


def lacking(folder: Path, name: str) -> UserError:
    """That a checkpoint has no `name`."""
    return UserError(
        f"{folder} has no {name}, which this run needs; it is of another version or of other networks or losses: set "
        f"back what was changed, or choose another --logdir"
    )


def _entries(name: str, train_state: TrainState, shapes: Shapes) -> dict[str, dict[str, Tensor]]:
    """Zeros for an optimizer whose state does not exist before its first step: {parameter: {entry: tensor}}."""
    entries: dict[str, dict[str, Tensor]] = {}
    known = _of(shapes, f"{name}.optimizer")
    for parameter, p in optimized(train_state.module, train_state.optimizer):
        start = f"{name}.optimizer.{parameter}."
        for key in (key.removeprefix(start) for key in known if key.startswith(start)):
            shape, dtype = shapes[start + key]
            same = shape == tuple(p.shape)
            zeros = torch.zeros_like(p, dtype=dtype, requires_grad=False) if same else torch.zeros(shape, dtype=dtype)
            entries.setdefault(parameter, {})[key] = zeros
    return entries


def _of(shapes: Shapes, prefix: str) -> list[str]:
    return [name for name in shapes if name.startswith(f"{prefix}.")]


def flat(state: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dictionaries, by dotted names."""
    values = {}
    for key, value in state.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


def _nested(flat: dict[str, Tensor]) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, value in flat.items():
        *path, key = name.split(".")
        inner = state
        for part in path:
            inner = inner.setdefault(part, {})
        inner[key] = value
    return state
