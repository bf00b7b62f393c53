"""What a `.pt` or `.pth` file would do if it were read, found out without doing it.

`torch.load(weights_only=True)` runs no code of the file. It does believe the sizes that a file states, it raises what
it likes at damaged ones, and a few classes that it allows can allocate any amount or take for ever to hash. So a file
goes through this dry run first: the same pickle, with stand-ins for every class, and with nothing allocated.

Allowed is what a file of named tensors needs: dictionaries with plain keys, lists, numbers, text, tensors. No torch is
needed for it, so that it also tells what a file holds before anything heavy is imported.
"""

import io
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAX_PICKLE = 1 << 24  # bytes of the part that names the tensors; 0.2 MB for 1,000 of them
MAX_OPCODES = 1_000_000  # of it; some 35 a tensor, and a second or two to walk
MAX_RECORDS, MAX_DIRECTORY = 100_000, 1 << 24  # of a zip, and bytes that list them
MAX_LENGTH = 64  # dimensions of a tensor, arguments of a call, attributes: each use of a long list copies it
MAX_NAME = 300  # characters of a class
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first object of a file from before torch 1.6

ITEM_SIZES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1}
ITEM_SIZES |= {"Byte": 1, "Bool": 1, "Untyped": 1}
STORAGE = re.compile(rf"torch\.(?:storage\.)?({'|'.join(ITEM_SIZES)})Storage")


class NeedsCode(Exception):
    """The file names a class or function that no file of tensors needs; its message is that name."""


class Damaged(Exception):
    """The file contradicts itself."""


class _Keyed(OrderedDict):
    """A dictionary whose keys take no time to hash: nested tuples could take for ever. It begins empty, as torch's do:
    copies of a large one could take for ever, too."""

    def __init__(self):
        super().__init__()

    def __setitem__(self, key, value):
        whole = isinstance(key, int) and key.bit_length() < 64
        if not whole and not isinstance(key, str | float | None):
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
    shape, stride = _size(shape), _size(stride)
    whole = isinstance(storage, StorageRef) and isinstance(offset, int) and len(shape) == len(stride)
    if not whole or not all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *stride)):
        raise Damaged("a tensor has no sizes")
    return TensorRef(storage, offset, shape, stride)


def _first(value: Any, *_: Any) -> Any:
    return value


def _size(shape: Any) -> tuple:
    if not isinstance(shape, tuple | list) or len(shape) > MAX_LENGTH:
        raise Damaged("a tensor has no sizes")
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


class _Counted(dict):
    """What each opcode does, for MAX_OPCODES of them."""

    left = MAX_OPCODES

    def __getitem__(self, code: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Damaged(f"more than {MAX_OPCODES:,} steps to name its tensors")
        return super().__getitem__(code)


class Walk(pickle._Unpickler):  # the one in Python: that in C believes stated sizes, too
    """An unpickler that always ends and allocates no more bytes than the file has. Subclasses decide about classes."""

    dispatch = {
        code: act
        for code, act in pickle._Unpickler.dispatch.items()
        if bytes([code])
        not in (
            pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8, pickle.DICT, pickle.NEXT_BUFFER,
            pickle.NEWOBJ_EX,
        )
    }  # fmt: skip

    def __init__(self, file: io.BytesIO, counted: _Counted | None = None):
        super().__init__(file)
        self.dispatch = _Counted(self.dispatch) if counted is None else counted

    def _short(self, value: Any) -> None:
        if isinstance(value, tuple | list | dict) and len(value) > MAX_LENGTH:
            raise Damaged(f"something is made of {len(value):,} values")

    def _call(self) -> None:
        self._short(self.stack[-1])
        self.load_reduce()

    def _new(self) -> None:
        self._short(self.stack[-1])
        self.load_newobj()

    def _state(self) -> None:
        if not hasattr(self.stack[-2], "__setstate__"):
            self._short(self.stack[-1])
        self.load_build()

    def _stored(self) -> None:
        self._short(self.stack[-1])
        self.load_binpersid()

    dispatch[pickle.REDUCE[0]], dispatch[pickle.NEWOBJ[0]] = _call, _new
    dispatch[pickle.BUILD[0]], dispatch[pickle.BINPERSID[0]] = _state, _stored

    def named(self, module: str, name: str) -> str:
        """The full name of a class."""
        if len(module) + len(name) > MAX_NAME:
            raise Damaged("the name of a class is too long")
        return f"{module}.{name}"


class _DryRun(Walk):
    """Walks a pickle; `storages` are those that it refers to. `keep_going`: past objects, which stay unmade."""

    dispatch = dict(Walk.dispatch)

    def __init__(self, file: io.BytesIO, keep_going: bool = False, counted: _Counted | None = None):
        super().__init__(file, counted)
        self.storages: dict[str, StorageRef] = {}
        self._keep_going = keep_going

    def find_class(self, module: str, name: str) -> Any:
        full = self.named(module, name)
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


def dry_run(source: Path | io.BytesIO, keep_going: bool = False) -> DryRun:
    """Walk a file, or its content.

    Args:
        keep_going: past objects that only their own code could make; they are left out.

    Raises:
        NeedsCode: it holds more than tensors, numbers and text.
        Damaged, and any other Exception: it is not what it should be.
    """
    with nullcontext(source) if isinstance(source, io.BytesIO) else open(source, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        directory = zipfile._EndRecData(file)
        if directory is None:
            file.seek(0)
            return DryRun(_legacy(file, size), False, {})
        if directory[zipfile._ECD_SIZE] > MAX_DIRECTORY or directory[zipfile._ECD_ENTRIES_TOTAL] > MAX_RECORDS:
            raise Damaged("it lists more records than tensors need")
        return _zipped(file, size, keep_going)


def _zipped(file: BinaryIO, size: int, keep_going: bool) -> DryRun:
    """Files of torch 1.6 and newer: one pickle and a record for each storage."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        _check_entries(entries, size)
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


def _legacy(file: BinaryIO, size: int) -> Any:
    """Files from before torch 1.6: five pickles (magic number, version, system, objects, keys), then the values."""
    start = io.BytesIO(file.read(MAX_PICKLE))
    counted = _Counted(_DryRun.dispatch)
    if _DryRun(start, counted=counted).load() != LEGACY_MAGIC:
        raise Damaged("no magic number")
    for _ in range(2):
        _DryRun(start, counted=counted).load()
    run = _DryRun(start, counted=counted)
    value = run.load()
    _DryRun(start, counted=counted).load()
    needed = sum(storage.size for storage in run.storages.values())
    if needed > size:
        raise Damaged(f"it should have {needed:,} bytes")
    return value
