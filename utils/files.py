"""Files that are whole or not there, and names that any file system takes."""

import hashlib
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import UserError


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix; move it into place when the block ends well.

    On any failure, Ctrl-C included, the temporary file is removed and `path` stays what it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(path.name.encode()).hexdigest()[:12]  # the name itself may be as long as names get
    temporary = path.parent / f".partial-{os.getpid()}-{digest}{path.suffix}"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; put it in its place, and what was there away, when the block ends well."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".partial-{os.getpid()}-{folder.name}"
    old = partial.with_name(f"{partial.name}-old")
    try:
        partial.mkdir()
        yield partial
        if folder.exists():  # a folder cannot be replaced in one step, so the old one steps aside first
            os.replace(folder, old)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def write_json_atomic(path: str | os.PathLike, data: Any) -> None:
    """Write `data` as indented UTF-8 JSON. Values that JSON cannot hold are an error, not a string."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def safe_name(prompt: str, limit: int = 60) -> str:
    """Letters and digits of `prompt` joined by `_`, at most `limit` bytes of UTF-8, cut at a word where there is one.

    Two prompts can have the same safe name: add a hash (`short_hash`) where that matters.
    """
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt))
    name = "_".join(words)
    if len(name.encode()) > limit:
        cut = name.encode()[: limit + 1].decode(errors="ignore")
        whole_words = cut.rpartition("_")[0]
        name = whole_words or name.encode()[:limit].decode(errors="ignore")
    return name or "prompt"


def short_hash(*values: str | int) -> str:
    """Ten hexadecimal digits that tell `values` from any others."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:10]


def sha256_of(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HashedFile:
    """A new file that is written from start to end, and its SHA-256, which a thread computes beside the writing."""

    def __init__(self, path: str | os.PathLike):
        self._file, self._digest, self._thread = open(path, "wb"), hashlib.sha256(), ThreadPoolExecutor(1)

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        self._file.close()

    def write(self, data: bytes | memoryview) -> int:
        """All of `data`, which is no longer looked at when this returns."""
        hashed = self._thread.submit(self._digest.update, data)
        try:
            return self._file.write(data)
        finally:
            hashed.result()

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        """Of what has been written so far."""
        return self._digest.hexdigest()


def sampled_hash(path: str | os.PathLike, blocks: int = 16, size: int = 65536) -> str:
    """Hash of a file's length and of `blocks` blocks of `size` bytes at even distances, the first and last included.

    Tells weights of different training steps apart without reading gigabytes; not proof against someone who tries.
    """
    length = os.path.getsize(path)
    digest = hashlib.sha256(str(length).encode())
    with open(path, "rb") as file:
        for i in range(blocks):
            file.seek(max(0, length - size) * i // (blocks - 1))
            digest.update(file.read(size))
    return digest.hexdigest()


def check_writable(folder: str | os.PathLike, field: str) -> Path:
    """Refuse, with a UserError about `field`, a folder that files cannot be written to; nothing is left behind."""
    folder = Path(folder)
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise UserError(f"{field}={folder} cannot be a folder because {nearest} is a file; choose another folder")
    probe = nearest / f".writable-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{field}={folder} cannot be written to ({error.strerror}); choose another folder") from error
    return folder
