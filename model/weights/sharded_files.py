"""Checkpoints that several processes have written together: torch's distributed checkpoint, read without running code.

    <folder>/.metadata        names, shapes, and where in which file each part of a tensor is
            /__<rank>_<i>.distcp

Names are `<player>.<part>.<name>` (`generator.module.blocks.0.attn1.to_q.weight`). The metadata is a pickle; nothing
but the few classes that it is made of is ever looked up for it, and tensors are read by torch's safe loader.
"""

import functools
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from configs.errors import UserError
from model.weights.files import Tensors

METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint"
_ALLOWED = {
    f"{_DCP}.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"},
}  # fmt: skip


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # 3.13's pathlib has its classes elsewhere; they come back as what this Python calls them
        module = "pathlib" if module in ("pathlib._local", "pathlib._abc") else module
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


@functools.lru_cache(maxsize=4)
def _metadata(path: Path, changed: int) -> Metadata:
    """What is in `path`; once for all its tensors, which are read one by one."""
    with open(path, "rb") as file:
        return _Metadata(file).load()


class ShardedReader(FileSystemReader):
    """torch's reader, with a reader of metadata that runs no code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / METADATA
        return _metadata(path, path.stat().st_mtime_ns)


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
    """These tensors, put together on the CPU, in one process or in each of several by itself."""
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it is meant to be
        dcp.load(tensors, storage_reader=ShardedReader(folder), no_dist=True)
    return tensors


def open_sharded(field: str, folder: Path) -> dict[str, Tensors]:
    """The parts of a checkpoint (`generator.module`, ...), as `model.weights.files.open_file` has those of a file."""
    try:
        shapes = sharded_shapes(folder)
    except Exception as error:  # a damaged pickle can fail in any way
        reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise UserError(f"{field}: {folder / METADATA} cannot be read ({reason}); choose another checkpoint") from error
    files = tuple(sorted(folder.iterdir()))
    parts: dict[str, dict[str, str]] = {}
    for name in shapes:
        player, part, key = (*name.split(".", 2), "", "")[:3]
        parts.setdefault(f"{player}.{part}", {})[key] = name

    def of(names: dict[str, str]) -> Tensors:
        def read(key: str) -> Tensor:
            return read_whole(folder, {names[key]: shapes[names[key]]})[names[key]]

        return Tensors(files, {key: shapes[name][0] for key, name in names.items()}, read)

    return {part: of(names) for part, names in parts.items()}
