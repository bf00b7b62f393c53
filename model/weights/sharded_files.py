"""Reading of torch's distributed checkpoints without running code from them.

    <folder>/.metadata        names, shapes, and the file and position of each part of a tensor
            /__<rank>_<i>.distcp

Names are `<player>.<part>.<name>` (`generator.module.blocks.0.attn1.to_q.weight`). The metadata is a pickle, for
which only a few classes are allowed; tensors are read by torch's safe loader.
"""

import functools
import io
import math
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from configs.errors import UserError
from configs.reading import ordinary_file
from model.weights.files import StoredTensors
from model.weights.safe_pickle import MAX_LENGTH, MAX_PICKLE, Damaged, Walk, dry_run

METADATA = ".metadata"
SHARD = re.compile(r"__\d{1,9}_\d{1,9}\.distcp")
MAX_PARTS = 1_000_000  # of all tensors together
_DCP = "torch.distributed.checkpoint"
_CLASSES = {
    f"{_DCP}.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "BytesStorageMetadata", "StorageMeta",
    },
    f"{_DCP}.filesystem": {"_StorageInfo"},
    "torch": {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"},
}  # fmt: skip


def _sizes(value: Any) -> torch.Size:
    """A tensor's sizes, checked."""
    plain = isinstance(value, tuple | list) and len(value) <= MAX_LENGTH
    if not plain or not all(type(n) is int and 0 <= n < 1 << 48 for n in value):
        raise Damaged("a tensor has no sizes")
    return torch.Size(value)


class _Keys(dict):
    """A dictionary of the metadata, whose keys are checked to be fast to hash. Starts empty, as torch's do."""

    def __init__(self):
        super().__init__()

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) is MetadataIndex and isinstance(key.fqn, str):
            _sizes(() if key.offset is None else key.offset)
        elif not isinstance(key, str):
            raise Damaged(f"a key is a {type(key).__name__}")
        super().__setitem__(key, value)


def _layout(name: Any) -> torch.layout:
    if name != "torch.strided":
        raise Damaged("a tensor is laid out as none of ours is")
    return torch.strided


def _nowhere(*parts: Any) -> None:
    """Replaces the path at which the checkpoint was written."""


_CALLED = {
    "torch.Size": _sizes,
    "torch.serialization._get_layout": _layout,
    f"{_DCP}.metadata._MEM_FORMAT_ENCODING": lambda value: _MEM_FORMAT_ENCODING(int(value)),
    "collections.OrderedDict": _Keys,
}
for module in ("pathlib", "pathlib._local", "pathlib._abc"):  # 3.13 has its classes elsewhere
    _CALLED |= dict.fromkeys((f"{module}.PosixPath", f"{module}.PurePosixPath"), _nowhere)


class _Metadata(Walk):
    dispatch = {code: act for code, act in Walk.dispatch.items() if bytes([code]) not in (pickle.INST, pickle.OBJ)}

    def find_class(self, module: str, name: str) -> Any:
        full = self.named(module, name)
        if full in _CALLED:
            return _CALLED[full]
        if name not in _CLASSES.get(module, ()):
            raise Damaged(f"it asks for {full}")
        return super().find_class(module, name)

    def _call(self) -> None:
        if not any(self.stack[-2] is made for made in _CALLED.values()):  # classes are filled, and not called
            raise Damaged("it calls what it should not")
        super()._call()

    def _empty_dictionary(self) -> None:
        self.append(_Keys())

    dispatch[pickle.REDUCE[0]], dispatch[pickle.EMPTY_DICT[0]] = _call, _empty_dictionary


@functools.lru_cache(maxsize=4)
def _metadata(path: Path, changed: int) -> Metadata:
    """The metadata in `path`, checked against the files beside it; cached, since tensors are read one by one."""
    ordinary_file("shards", path, MAX_PICKLE, fix="choose another checkpoint")
    metadata = _Metadata(io.BytesIO(path.read_bytes())).load()
    if type(metadata) is not Metadata:
        raise Damaged("it describes no tensors")
    sizes: dict[str, int] = {}
    for place in metadata.storage_data.values():
        name = place.relative_path if type(place) is _StorageInfo else None
        if type(name) is not str or not SHARD.fullmatch(name) or place.transform_descriptors:
            raise Damaged("it names files that are no shards")
        if name not in sizes:
            sizes[name] = ordinary_file("shard", path.parent / name, fix="choose another checkpoint")
        if not 0 <= place.offset <= place.offset + place.length <= sizes[name]:
            raise Damaged(f"{name} is cut short")
    count = 0
    for name, entry in metadata.state_dict_metadata.items():
        if type(entry) is not TensorStorageMetadata:
            continue
        count += len(entry.chunks)
        if count > MAX_PARTS:
            raise Damaged("it has more parts than tensors have")
        item, held = entry.properties.dtype.itemsize, 0
        for chunk in entry.chunks:
            size = math.prod(_sizes(chunk.sizes))
            held += size
            if size * item > metadata.storage_data[MetadataIndex(name, _sizes(chunk.offsets))].length:
                raise Damaged(f"{name[:60]} is larger than its parts")
        if held != math.prod(_sizes(entry.size)):
            raise Damaged(f"{name[:60]} is larger than its parts")
    return metadata


class ShardedReader(FileSystemReader):
    """torch's reader with a safe reader of metadata, and a check of tensors before they are created."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / METADATA
        return _metadata(path, path.stat().st_mtime_ns)

    def _slice_file(self, file: Any, sinfo: _StorageInfo) -> io.BytesIO:
        content = io.BytesIO(super()._slice_file(file, sinfo).read())
        dry_run(content)
        content.seek(0)
        return content


Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def sharded_shapes(folder: Path) -> Shapes:
    """Shape and dtype of every tensor in a folder, by name."""
    described = ShardedReader(folder).read_metadata().state_dict_metadata
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in described.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_whole(folder: Path, shapes: Shapes) -> dict[str, Tensor]:
    """The complete tensors on the CPU; every process reads them independently."""
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as intended
        dcp.load(tensors, storage_reader=ShardedReader(folder), no_dist=True)
    return tensors


def open_sharded(field: str, folder: Path) -> dict[str, StoredTensors]:
    """The parts of a checkpoint (`generator.module`, ...), as `model.weights.files.open_file` has those of a file."""
    def refused(error: BaseException, what: str | Path) -> UserError:
        reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        return UserError(f"{field}: {what} cannot be read ({reason}); choose another checkpoint")

    try:
        shapes = sharded_shapes(folder)
    except Exception as error:  # a damaged pickle can fail in any way
        raise refused(error, folder / METADATA) from error
    files = tuple(sorted(folder.iterdir()))
    parts: dict[str, dict[str, str]] = {}
    for name in shapes:
        player, part, key = (*name.split(".", 2), "", "")[:3]
        parts.setdefault(f"{player}.{part}", {})[key] = name

    def of(names: dict[str, str]) -> StoredTensors:
        def read(key: str) -> Tensor:
            try:
                return read_whole(folder, {names[key]: shapes[names[key]]})[names[key]]
            except CheckpointException as error:  # and so can each tensor's own
                cause, _ = next(iter(error.failures.values()))
                raise refused(cause, f"{folder}: {names[key]}") from error

        return StoredTensors(files, {key: shapes[name][0] for key, name in names.items()}, read)

    return {part: of(names) for part, names in parts.items()}
