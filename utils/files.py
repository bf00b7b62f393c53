"""Atomic writing of files and folders, locks, hashes, and portable file names."""

import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from configs.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]
PREFIX = ".partial-"  # of temporary names: .partial-<machine>-<random>-<purpose>
_NAMES = re.compile(r"\.partial-(?P<machine>[0-9a-f]{8})-[0-9a-f]{16}-.+", re.DOTALL)
_ASIDE = "-aside"  # suffix of a temporary folder that contains the folder that is being replaced
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
ABANDONED_S = 86_400  # seconds without modification after which a temporary file of another machine counts as abandoned
BLOCK_HASH, HASH_BLOCK, HASH_THREADS = "4MiB-", 4 << 20, 8  # prefix of a block hash, bytes of a block
_used: set[Path] = set()  # folders that this process has locked
_temporary: set[Path] = set()  # paths that blocks of `temporary_path` hold
_cleared: set[Path] = set()  # folders in which this process has removed leftovers


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`, with its suffix; rename it to `path` when the block ends without an error.

    After an exception, Ctrl-C included, the temporary file is removed and `path` is unchanged. Raises UserError if
    `path` is invalid or not a file, and if the disk gets full. A path that an open block has yielded is yielded as it
    is, so that several files can get their names together.
    """
    path = replaceable_file(path)
    if path in _temporary:
        yield path
        return
    digest = hashlib.sha256(path.name.encode()).hexdigest()[:12]  # the name itself may be as long as names get
    with translate_os_errors(path), temporary_path(path, f"{digest}{path.suffix}") as temporary:
        yield temporary
        os.replace(temporary, path)


def replaceable_file(path: str | os.PathLike, field: str = "file") -> Path:
    """`path`, if it is a file or does not exist. Raises a UserError about `field` for a folder, a device or a pipe."""
    path = Path(path)
    with translate_os_errors(path, every=True):
        there = path.exists() and not path.is_file()
    if there:
        raise UserError(f"{field}={path} is there and is no file; choose another name")
    return path


def identity(path: Path) -> tuple[int, int, int] | None:
    """What tells a file from another under its name; None where there is none."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_dev, state.st_ino, state.st_mtime_ns


@dataclass(frozen=True)
class OwnedFolder:
    """A kind of folder that this program writes: the file that marks it, and the names of its contents."""

    marker: str  # JSON, an object
    names: re.Pattern[str]  # of a folder with a slash behind it

    def foreign_entries(self, folder: Path) -> list[str]:
        """Entries of `folder` that are not of this kind, links included; all of them if the marker is missing."""
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        try:
            marked = isinstance(json.loads((folder / self.marker).read_bytes()), dict)
        except (OSError, ValueError):
            marked = False
        named = [f"{entry.name}{'/' * entry.is_dir()}" for entry in entries]
        ours = [marked and not e.is_symlink() and self.names.fullmatch(n) for e, n in zip(entries, named, strict=True)]
        return [name for name, own in zip(named, ours, strict=True) if not own]


CARD, LORA = "card.json", "lora"  # in an export: facts about it; the folder of its adapter, if one was trained
EXPORT = OwnedFolder(
    CARD,
    re.compile(
        r"(card|config|tokenizer|tokenizer_config|special_tokens_map)\.json"
        r"|(model|diffusion_pytorch_model)(\.ema)?(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
        rf"|{LORA}/"
    ),
)


def replaceable(
    folder: str | os.PathLike,
    field: str = "folder",
    *,
    keep: Iterable[str | os.PathLike] = (),
) -> Path:
    """`folder`, resolved, if it may be replaced: it does not exist, is empty, or is an EXPORT without other entries.

    keep: paths that must not lie in it, besides the working directory, the home and the checkout.
    Raises a UserError about `field` otherwise. Everything that replaces a folder uses this check.
    """
    folder = Path(folder)
    check_writable(folder.parent, field)
    with translate_os_errors(folder, every=True), suppress(FileNotFoundError):
        os.lstat(folder)  # refuses names that are too long
    real = Path(os.path.realpath(folder))
    inside = [Path(os.path.realpath(path)) for path in (*keep, CHECKOUT, Path.cwd(), os.path.expanduser("~"))]
    held = next((path for path in inside if path.is_relative_to(real)), None)
    other = "choose a folder that does not exist yet"
    if held is not None:
        raise UserError(f"{field}={folder} would be replaced, and {held} is in it; {other}")
    if not os.path.lexists(real):
        check_writable(real.parent, field)
        return real
    if not real.is_dir():
        raise UserError(f"{field}={folder} is not a folder, and would be replaced by one; {other}")
    if os.path.ismount(real):
        raise UserError(f"{field}={folder} is where a disk is mounted and cannot be replaced; choose a folder in it")
    foreign = EXPORT.foreign_entries(real)
    if foreign:
        more = f" and {len(foreign) - 1} more" * (len(foreign) > 1)
        raise UserError(f"{field}={folder} holds {foreign[0]}{more}, which is not ours to replace; {other}")
    check_writable(real.parent, field)
    return real


@contextmanager
def atomic_folder(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, which replaces `folder` when the block ends without an error.

    Raises UserError if `folder` is not `replaceable`; it is unchanged then.
    """
    folder = replaceable(folder)
    with translate_os_errors(folder), temporary_path(folder, "folder", folder=True) as partial:
        yield partial
        replaceable(folder)  # it may have changed meanwhile
        if not folder.exists():
            os.replace(partial, folder)
            return
        with temporary_path(folder, f"folder{_ASIDE}", folder=True) as aside:
            try:  # folders cannot be replaced in one step, so the old one is moved away first
                os.replace(folder, aside / folder.name)
                os.replace(partial, folder)
            finally:
                if not folder.exists():
                    os.replace(aside / folder.name, folder)


@contextmanager
def temporary_path(beside: Path, ending: str, *, folder: bool = False) -> Iterator[Path]:
    """Yield a new, empty file or folder beside `beside`; it is removed at the end if it still exists.

    The process holds a lock on it inside the block, so that others do not take it for a leftover.
    """
    with translate_os_errors(beside, every=True):
        beside.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.lstat(beside)  # refuses names that are too long
        if beside.exists() and beside.is_dir() != folder:
            wrong = errno.ENOTDIR if folder else errno.EISDIR
            raise OSError(wrong, os.strerror(wrong))
        path, held = _claimed(beside.parent, ending, folder)
    _temporary.add(path)
    try:
        yield path
    finally:
        _temporary.remove(path)
        _remove(path)
        os.close(held)


class DiskFull(UserError):
    """A disk is full or read-only."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, of any library, means that a disk is full or read-only."""
    phrases = ("No space left", "Disk quota exceeded", "File too large", "PytorchStreamWriter", "inline_container")
    return (isinstance(error, OSError) and error.errno in NO_ROOM) or any(words in str(error) for words in phrases)


@contextmanager
def translate_os_errors(path: Path, *, every: bool = False) -> Iterator[None]:
    """Turn an OSError into DiskFull about `path` if the disk is full or read-only; with `every`, else UserError."""
    try:
        yield
    except OSError as error:
        full = error.errno in NO_ROOM
        if not every and not full:
            raise
        message = f"{path} cannot be written ({error.strerror or type(error).__name__})"
        if full:
            raise DiskFull(f"{message}; make room there, or choose another place") from error
        raise UserError(f"{message}; choose another place") from error


def _claimed(parent: Path, ending: str, folder: bool) -> tuple[Path, int]:
    """Create and lock a new temporary path; returns it with its file descriptor."""
    _clear_leftovers(parent)
    while True:
        path = parent / f"{PREFIX}{_machine()}-{secrets.token_hex(8)}-{ending}"
        if folder:
            path.mkdir()
        else:
            path.touch(exist_ok=False)
        held = _locked(path)
        if held is not None:  # otherwise another process removed it before it was locked
            return path, held


def _locked(path: Path) -> int | None:
    """A file descriptor of `path` with a lock that ends with this process; None if it is locked or was removed.

    On file systems without locks there is only the descriptor.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = os.stat(path).st_ino != os.fstat(descriptor).st_ino
    except (BlockingIOError, FileNotFoundError):
        gone = True
    except OSError:
        gone = False
    if gone:
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def exclusive_use(folder: Path, field: str) -> Iterator[None]:
    """Hold an advisory lock on a folder inside the block; blocks may nest.

    Raises a UserError about `field` if another process holds it. The lock ends with the process and leaves no file.
    """
    real = folder.resolve()
    if real in _used:
        yield
        return
    held = _locked(real)
    if held is None:
        raise UserError(f"{field}={folder} is in use by another process; wait for its end, or choose another folder")
    _used.add(real)
    try:
        yield
    finally:
        _used.remove(real)
        os.close(held)


def _clear_leftovers(parent: Path) -> None:
    """Remove temporary files that killed processes have left in `parent`, once per process.

    A temporary file of this machine, its containers included, is a leftover if it is not locked. Locks of other
    machines may not be visible, so their files must also be unmodified for a day.
    """
    parent = parent.absolute()
    if parent in _cleared:
        return
    _cleared.add(parent)
    with os.scandir(parent) as entries:
        names = [(entry, match["machine"]) for entry in entries if (match := _NAMES.fullmatch(entry.name))]
    for entry, machine in names:
        path = Path(entry.path)
        try:
            if machine != _machine() and time.time() - entry.stat(follow_symlinks=False).st_mtime < ABANDONED_S:
                continue
            held = _locked(path)
        except OSError:  # another user's, or removed meanwhile
            continue
        if held is None:
            continue
        try:
            if path.name.endswith(_ASIDE):  # killed between the renames of atomic_folder: undo the first
                for kept in path.iterdir():
                    if not os.path.lexists(parent / kept.name):
                        os.replace(kept, parent / kept.name)
            _remove(path)
        except OSError:
            continue
        finally:
            os.close(held)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@lru_cache(maxsize=1)
def _machine() -> str:
    """Eight hexadecimal digits that identify the running kernel, the same in its containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return hashlib.sha256((boot.read_text() if boot.exists() else platform.node()).encode()).hexdigest()[:8]


def write_json_atomic(path: str | os.PathLike, data: Any) -> None:
    """Write `data` as indented UTF-8 JSON, atomically. Raises ValueError or TypeError for values that JSON lacks."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def finite(value: float) -> float | None:
    """`value`, or None where it is NaN or infinite, which JSON lacks."""
    return value if math.isfinite(value) else None


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError if it is invalid, too deep, or has NaN, infinite or extremely long numbers."""

    def refused(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number")

    def real(digits: str) -> float:
        number = float(digits)
        return number if math.isfinite(number) else refused(digits[:20])

    def whole(digits: str) -> int:
        return int(digits) if len(digits) <= 100 else refused(digits[:20])

    try:
        return json.loads(text, parse_constant=refused, parse_float=real, parse_int=whole)
    except RecursionError as error:
        raise ValueError("too deep") from error


def safe_name(prompt: str, limit: int = 60) -> str:
    """Letters and digits of `prompt` joined by `_`, truncated to `limit` bytes of UTF-8, at a word if possible.

    Names are not unique; add a `short_hash` if they have to be.
    """
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", prompt))
    name = "_".join(words)
    if len(name.encode()) > limit:
        cut = name.encode()[: limit + 1].decode(errors="ignore")
        whole_words = cut.rpartition("_")[0]
        name = whole_words or name.encode()[:limit].decode(errors="ignore")
    return name or "prompt"


def short_hash(*values: str | int) -> str:
    """A hash of `values` with ten hexadecimal digits."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:10]


def sha256_of(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def block_hash_of(path: str | os.PathLike) -> str:
    """The block hash of a file's bytes (see HashedFile), read by several threads."""
    with open(path, "rb") as file, ThreadPoolExecutor(HASH_THREADS) as threads:

        def digest(offset: int) -> bytes:
            return hashlib.sha256(os.pread(file.fileno(), HASH_BLOCK, offset)).digest()

        return _of_blocks(threads.map(digest, range(0, os.fstat(file.fileno()).st_size, HASH_BLOCK)))


def _of_blocks(digests: Iterable[bytes]) -> str:
    return f"{BLOCK_HASH}{hashlib.sha256(b''.join(digests)).hexdigest()}"


def matches_hash(path: str | os.PathLike, value: str) -> bool:
    """Whether a file has the hash `value`: a block hash, or the SHA-256 of the whole file."""
    return value == (block_hash_of(path) if value.startswith(BLOCK_HASH) else sha256_of(path))


class HashedFile:
    """A new file that is written sequentially while threads compute its block hash: the SHA-256 of the SHA-256 digests
    of its blocks of 4 MiB. One thread alone would hash more slowly than disks write.
    """

    def __init__(self, path: str | os.PathLike):
        self._file, self._threads = open(path, "wb"), ThreadPoolExecutor(HASH_THREADS)
        self._blocks: list[Any] = []  # hashes of the blocks so far
        self._filled = 0  # bytes in the last of them; 0 = it is full
        self.fileno, self.flush, self.tell = self._file.fileno, self._file.flush, self._file.tell

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._threads.shutdown()
        self._file.close()

    def write(self, data: bytes | memoryview) -> int:
        """Write all of `data`; the buffer may be reused afterwards."""
        hashed = self._hash(memoryview(data).cast("B"))
        try:
            return self._file.write(data)
        finally:
            for part in hashed:
                part.result()

    def _hash(self, data: memoryview) -> list[Future]:
        """Begin to hash `data`, whose parts belong to different blocks."""
        parts = []
        while data.nbytes:
            if self._filled == 0:
                self._blocks.append(hashlib.sha256())
            part, data = data[: HASH_BLOCK - self._filled], data[HASH_BLOCK - self._filled :]
            parts.append(self._threads.submit(self._blocks[-1].update, part))
            self._filled = (self._filled + part.nbytes) % HASH_BLOCK
        return parts

    def hexdigest(self) -> str:
        """The block hash of what has been written so far."""
        return _of_blocks(block.digest() for block in self._blocks)


def sampled_hash(path: str | os.PathLike, blocks: int = 16, size: int = 65536) -> str:
    """Hash of a file's length and of `blocks` evenly spaced blocks of `size` bytes, including the first and last.

    Distinguishes weights of different training steps without reading gigabytes; not cryptographically secure.
    """
    length = os.path.getsize(path)
    digest = hashlib.sha256(str(length).encode())
    with open(path, "rb") as file:
        for i in range(blocks):
            file.seek(max(0, length - size) * i // (blocks - 1))
            digest.update(file.read(size))
    return digest.hexdigest()


def check_writable(folder: str | os.PathLike, field: str) -> Path:
    """Raise a UserError about `field` if files cannot be created in `folder`. Creates nothing."""
    folder = Path(folder)
    nearest = next(p for p in (folder, *folder.absolute().parents) if os.path.lexists(p))
    if not nearest.is_dir():
        what = "leads nowhere" if nearest.is_symlink() and not nearest.exists() else "is a file"
        raise UserError(f"{field}={folder} cannot be a folder because {nearest} {what}; choose another folder")
    try:
        with suppress(FileNotFoundError):
            os.lstat(folder)  # refuses names that are too long
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(f"{field}={folder} cannot be written to ({error.strerror}); choose another folder") from error
    return folder


def check_file(path: str | os.PathLike, field: str) -> None:
    """Raise a UserError about `field` if no file can be written at `path`. Creates nothing."""
    check_writable(Path(path).parent, field)
    replaceable_file(path, field)
