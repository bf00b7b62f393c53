"""What a `.pt` or `.pth` file would do if it were read, found out without doing it.

`torch.load(weights_only=True)` runs no code of the file. It does believe the sizes that a file states, it raises what
it likes at damaged ones, and a few classes that it allows can allocate any amount or take for ever to hash. So a file
goes through this dry run first: the same pickle, with stand-ins for every class, and with nothing allocated.

Allowed is what a file of named tensors needs: dictionaries with plain keys, lists, numbers, text, tensors.
"""

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

MAX_PICKLE = 1 << 26  # bytes of the part that names the tensors; 0.2 MB for 1,000 of them
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first object of a file from before torch 1.6

ITEM_SIZES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1}
ITEM_SIZES |= {"Byte": 1, "Bool": 1, "Untyped": 1}
STORAGE = re.compile(rf"torch\.(?:storage\.)?({'|'.join(ITEM_SIZES)})Storage")
HARMLESS = re.compile(
    r"torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch\._tensor\._rebuild_from_type_v2|torch\.(Size|device|Tensor)|torch\.serialization\._get_layout"
    r"|torch\.(float|bfloat|int|uint|complex|bool|half|double|long)\w*"
)


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


class _Inert:
    """Stands for a tensor, and for any other value that is made by a call."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Storage:
    def __init__(self, item_size: int):
        self.item_size = item_size


class _DryRun(pickle._Unpickler):  # the one in Python: that in C believes stated sizes, too
    """Walks a pickle; `storages` are the bytes of each one that it refers to."""

    dispatch = {
        code: act
        for code, act in pickle._Unpickler.dispatch.items()
        if bytes([code])
        not in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8, pickle.DICT, pickle.NEXT_BUFFER)
    }

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return _Keyed
        if match := STORAGE.fullmatch(full):
            return _Storage(ITEM_SIZES[match.group(1)])
        if full in ("torch.Tensor", "torch.nn.parameter.Parameter"):
            return object()  # as an argument only: called, it would allocate what it is told to
        if HARMLESS.fullmatch(full):
            return _Inert
        raise NeedsCode(full)

    def persistent_load(self, pid: Any) -> _Inert:
        kind, storage, key, _, count, *_ = pid
        if kind != "storage" or not isinstance(storage, _Storage) or not isinstance(key, str):
            raise Damaged("a tensor has no storage")
        if not isinstance(count, int) or count < 0:
            raise Damaged(f"a storage has {count} values")
        self.storages[key] = count * storage.item_size
        return _Inert()

    def _empty_dictionary(self) -> None:
        self.append(_Keyed())

    dispatch[pickle.EMPTY_DICT[0]] = _empty_dictionary


def dry_run(path: Path) -> bool:
    """Walk the file; returns whether it is a zip, whose tensors can be mapped.

    Raises:
        NeedsCode: it holds more than tensors, numbers and text.
        Damaged, and any other Exception: it is not what it should be.
    """
    if not zipfile.is_zipfile(path):
        _legacy(path)
        return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        _check_entries(entries, path.stat().st_size)
        (main,) = [e for e in entries if e.filename.endswith("/data.pkl")]
        if main.file_size > MAX_PICKLE:
            raise Damaged(f"{main.file_size:,} bytes of names")
        run = _DryRun(io.BytesIO(archive.read(main)))
    run.load()
    sizes = {e.filename: e.file_size for e in entries}
    folder = main.filename.removesuffix("data.pkl")
    for key, size in run.storages.items():
        if sizes.get(f"{folder}data/{key}") != size:
            raise Damaged(f"storage {key} should have {size:,} bytes")
    return True


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


def _legacy(path: Path) -> None:
    """Files from before torch 1.6: five pickles (magic number, version, system, objects, keys), then the values."""
    with open(path, "rb") as file:
        start = io.BytesIO(file.read(MAX_PICKLE))
    if _DryRun(start).load() != LEGACY_MAGIC:
        raise Damaged("no magic number")
    for _ in range(2):
        _DryRun(start).load()
    run = _DryRun(start)
    run.load()
    _DryRun(start).load()
    if sum(run.storages.values()) > path.stat().st_size:
        raise Damaged(f"it should have {sum(run.storages.values()):,} bytes")
