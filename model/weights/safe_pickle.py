"""What a `.pt` or `.pth` file would do if it were read, found out without doing it.

`torch.load(weights_only=True)` runs no code of the file. It does believe the sizes that a file states, it raises what
it likes at damaged ones, and a few classes that it allows can allocate any amount or take for ever to hash. So a file
goes through this dry run first: the same pickle, with stand-ins for every class, and with nothing allocated.

Allowed is what a file of named tensors needs: dictionaries with plain keys, lists, numbers, text, tensors. No torch is
needed for it, so that it also tells what a file holds before anything heavy is imported.
"""

import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_PICKLE = 1 << 26  # bytes of the part that names the tensors; 0.2 MB for 1,000 of them
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first object of a file from before torch 1.6

ITEM_SIZES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1}
ITEM_SIZES |= {"Byte": 1, "Bool": 1, "Untyped": 1}
STORAGE = re.compile(rf"torch\.(?:storage\.)?({'|'.join(ITEM_SIZES)})Storage")


class NeedsCode(Exception):
    """The file names a class or function that no file of tensors needs; its message is that name."""


class Damaged(Exception):
    """The file contradicts itself."""


class _Keyed(OrderedDict):
    """A dictionary whose keys take no time to hash: nested tuples could take for ever."""

    def __setitem__(self, key, value):
        if not isinstance(key, str | int | float | bool | None):
            raise Damaged(f"a key is a {type(key).__name__}")
        super().__setitem__(key, value)


@dataclass(frozen=True)
class StorageRef:
    """Where the values of tensors are: record `key` of the file, `count` values of type `kind`."""

    key: str
    kind: str  # Float, BFloat16, ...
    count: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.count * ITEM_SIZES[self.kind]


@dataclass
class TensorRef:
    """A tensor that was not made. What torch would set on it is ignored."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __setstate__(self, state: Any) -> None:
        pass


class Dropped:
    """Stands for what is not read: in a dry run a harmless value, with `keep_going` any object at all."""

    def __new__(cls, *args: Any, **kwargs: Any):
        return super().__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> "Dropped":
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorRef:
    whole = isinstance(storage, StorageRef) and isinstance(offset, int) and len(shape) == len(stride)
    if not whole or not all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *stride)):
        raise Damaged("a tensor has no sizes")
    return TensorRef(storage, offset, tuple(shape), tuple(stride))


def _first(value: Any, *_: Any) -> Any:
    return value


def _size(shape: Any) -> tuple:
    return tuple(shape)


MAKERS = {
    "collections.OrderedDict": _Keyed,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": lambda make, kind, arguments, state: make(*arguments),
    "torch.Size": _size,
    "torch.Tensor": Dropped(),  # as an argument only: called, it would allocate what it is told to
    "torch.nn.parameter.Parameter": Dropped(),
}
TYPES = re.compile(
    r"torch\.(device|serialization\._get_layout|(float|bfloat|int|uint|complex|bool|half|double|long)\w*)"
)


class _DryRun(pickle._Unpickler):  # the one in Python: that in C believes stated sizes, too
    """Walks a pickle; `storages` are those that it refers to. `keep_going`: past objects, which stay unmade."""

    dispatch = {
        code: act
        for code, act in pickle._Unpickler.dispatch.items()
        if bytes([code])
        not in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8, pickle.DICT, pickle.NEXT_BUFFER)
    }

    def __init__(self, file: io.BytesIO, keep_going: bool = False):
        super().__init__(file)
        self.storages: dict[str, StorageRef] = {}
        self._keep_going = keep_going

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in MAKERS:
            return MAKERS[full]
        if match := STORAGE.fullmatch(full):
            return match.group(1)
        if TYPES.fullmatch(full) or self._keep_going:
            return Dropped
        raise NeedsCode(full)

    def persistent_load(self, pid: Any) -> StorageRef:
        tag, kind, key, _, count, *_ = pid
        if tag != "storage" or kind not in ITEM_SIZES or not isinstance(key, str):
            raise Damaged("a tensor has no storage")
        if not isinstance(count, int) or count < 0:
            raise Damaged(f"a storage has {count} values")
        return self.storages.setdefault(key, StorageRef(key, kind, count))

    def _empty_dictionary(self) -> None:
        self.append(_Keyed())

    dispatch[pickle.EMPTY_DICT[0]] = _empty_dictionary


@dataclass(frozen=True)
class DryRun:
    """What a file holds: `value` with a TensorRef for each tensor. `places`: of a zip, first byte of each storage."""

    value: Any
    zipped: bool  # then its tensors can be mapped
    places: dict[str, int]


def dry_run(path: Path, keep_going: bool = False) -> DryRun:
    """Walk the file.

    Args:
        keep_going: past objects that only their own code could make; they are left out.

    Raises:
        NeedsCode: it holds more than tensors, numbers and text.
        Damaged, and any other Exception: it is not what it should be.
    """
    if not zipfile.is_zipfile(path):
        return DryRun(_legacy(path), False, {})
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        _check_entries(entries, path.stat().st_size)
        (main,) = [e for e in entries if e.filename.endswith("/data.pkl")]
        if main.file_size > MAX_PICKLE:
            raise Damaged(f"{main.file_size:,} bytes of names")
        if not main.CRC:  # torch.save was told to leave the sums out; zipfile checks what is there
            del main.CRC
        run = _DryRun(io.BytesIO(archive.read(main)), keep_going)
    value = run.load()
    by_name = {e.filename: e for e in entries}
    folder = main.filename.removesuffix("data.pkl")
    places = {}
    with open(path, "rb") as file:
        for key, storage in run.storages.items():
            entry = by_name.get(f"{folder}data/{key}")
            if entry is None or entry.file_size != storage.size:
                raise Damaged(f"storage {key} should have {storage.size:,} bytes")
            file.seek(entry.header_offset + 26)  # lengths of name and padding, which may differ from the directory's
            places[key] = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    return DryRun(value, True, places)


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> None:
    """torch writes its records uncompressed, one after another, under plain names."""
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise Damaged(f"{entry.filename[:40]} is compressed")
        if ".." in Path(entry.filename).parts or entry.filename.startswith("/") or "\\" in entry.filename:
            raise Damaged(f"{entry.filename[:40]} lies outside the file")
    names = {entry.filename for entry in entries}
    if len(names) != len(entries) or sum(entry.file_size for entry in entries) > size:
        raise Damaged("records overlap")


def _legacy(path: Path) -> Any:
    """Files from before torch 1.6: five pickles (magic number, version, system, objects, keys), then the values."""
    with open(path, "rb") as file:
        start = io.BytesIO(file.read(MAX_PICKLE))
    if _DryRun(start).load() != LEGACY_MAGIC:
        raise Damaged("no magic number")
    for _ in range(2):
        _DryRun(start).load()
    run = _DryRun(start)
    value = run.load()
    _DryRun(start).load()
    size = sum(storage.size for storage in run.storages.values())
    if size > path.stat().st_size:
        raise Damaged(f"it should have {size:,} bytes")
    return value
