"""Exit of programs: one line and an exit code for wrong input, for what a machine lacks, and for Ctrl-C. Programming
errors keep their tracebacks.
"""

from __future__ import annotations  # so that an older Python reaches the message about its version

import argparse
import difflib
import errno
import io
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO

from configs.errors import UserError, shown

WRONG_INPUT, INTERRUPTED = 2, 130
OLDEST_PYTHON = (3, 11)
LONGEST_MESSAGE = 300  # characters of argparse's message, which quotes all arguments
CHECKOUT = Path(__file__).resolve().parents[1]
OWN = ("configs", "utils", "model", "pipeline", "trainer", "server", "scripts")
WRAPPERS = {"inference.py": "inference.sh", "train.py": "training.sh", "demo.py": "demo.sh", "serve.py": "serve.sh"}
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}  # module -> package

_flag_of: dict[str, str] = {}  # setting -> the flag that set it

# what to do about an error of the operating system
FIXES = {
    errno.ENOSPC: "make room there and run this again",
    errno.EDQUOT: "make room there and run this again",
    errno.EACCES: "change its permissions, or give another path",
    errno.EPERM: "change its permissions, or give another path",
    errno.EROFS: "give a path on a disk that can be written to",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EPIPE: "start what reads it again, and then this",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserErrors, which suggest the flag with the nearest name.

    Integers have at most 18 digits; floats are finite; arguments of type "positive" are integers of 1 or more.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.register("type", int, _whole)
        self.register("type", "positive", _positive)
        self.register("type", float, _finite)

    def error(self, message: str) -> NoReturn:
        hint = self._hint(message) if message.startswith("unrecognized arguments: ") else ""
        text = message if len(message) <= LONGEST_MESSAGE else f"{message[: LONGEST_MESSAGE - 3]}..."
        raise UserError(f"{text}{hint}; see python {self.prog} --help")

    def _hint(self, message: str) -> str:
        unknown = [word.partition("=")[0] for word in message.split()[2:] if word.startswith("-")]
        near = difflib.get_close_matches(unknown[0], self._flags(), n=1) if unknown else []
        return f" (did you mean {near[0]}?)" if near else ""

    def _flags(self) -> list[str]:
        """All flags, including those of subcommands."""
        flags = []
        for action in self._actions:
            flags += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                flags += [flag for parser in action.choices.values() for flag in parser._flags()]
        return flags


def _whole(text: str) -> int:
    if not re.fullmatch("[-+]?[0-9]{1,18}", text):
        raise ValueError(text[:20])
    return int(text)


def _positive(text: str) -> int:
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1; give 1 or more")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text[:20])
    return number


def guard(name: str) -> None:
    """Call in `__main__` before other imports: errors before `run` then end the program as they do in `run`."""
    if name == "__main__":
        _check_python()
        # waiting threads yield their CPU: beside other programs, spinning made training steps 20 times slower. Must be
        # set before torch is loaded
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        sys.excepthook = _end


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with its result, or with the message and code of `explain` for its exception.

    SIGTERM and a closed terminal: clean-up, exit codes 143 and 129. A reader of standard output that goes away
    (`| head -1`) does not end the program.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _terminate)
    with _lasting_streams():
        try:
            code = main() or 0
            sys.stdout.flush()
        except Exception as error:
            code = _say(error)
            if code is None:
                raise
        except KeyboardInterrupt as error:
            code = _say(error)
    sys.exit(code)


class Faults:
    """Bad ones among many inputs: each is named in a line on standard error, and the others are gone on with.

    `code` is the program's exit code in the end, 2 if there was one. `sentences`: what was said.
    """

    def __init__(self) -> None:
        self.sentences: list[str] = []

    @property
    def code(self) -> int:
        return WRONG_INPUT if self.sentences else 0

    def note(self, error: UserError) -> None:
        self.sentences.append(" ".join(_with_flags(str(error)).split()))
        _say(error)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """A UserError inside the block is noted and ends the block alone."""
        try:
            yield
        except UserError as error:
            self.note(error)


def end_now(error: UserError) -> NoReturn:
    """End the process at once with the message and exit code of `error`, from any thread, even if the main one waits.

    Nothing is cleaned up: what was being written stays under its temporary name.
    """
    code = _say(error)
    sys.stderr.flush()
    os._exit(code)


def set_by_flags(flags: Mapping[str, str]) -> None:
    """Name settings in messages by the flags that set them. flags: by name of the setting."""
    _flag_of.clear()
    _flag_of.update(flags)


def _with_flags(sentence: str) -> str:
    """`sentence` with `video.fps=0` as `--fps=0`, for settings that were set by flags."""
    for setting, flag in _flag_of.items():
        end = r"(?!\.?\w)" if "." in setting else "(?==)"  # one without a dot needs a value: it is a word, too
        sentence = re.sub(rf"(?<![\w.-]){re.escape(setting)}{end}", flag, sentence)
    return sentence


def explain(error: BaseException) -> tuple[str, int] | None:
    """The message and the exit code for an expected error; None for a programming error.

    Expected are UserError, Ctrl-C, errors of the operating system (unreadable paths, a full disk, a closed pipe), lack
    of memory, a package that is not installed, and text that cannot be encoded in the locale.
    """
    if isinstance(error, UserError):
        sentence = _with_flags(str(error))
    elif isinstance(error, KeyboardInterrupt):
        return "interrupted: what was finished is kept, the rest has left no file", INTERRUPTED
    elif isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        if not module or module in OWN or module in sys.modules:
            return None
        sentence = _missing_package(module)
    elif isinstance(error, OSError) and error.errno is not None:
        names = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)]
        paths = " and ".join(shown(os.fsdecode(name)) for name in names)
        fix = FIXES.get(error.errno, "check the path" if paths else "mend that and run this again")
        sentence = f"{paths or 'a file or a pipe'} cannot be used ({error.strerror}); {fix}"
    elif isinstance(error, MemoryError) or _is_out_of_memory(error):
        first = str(error).strip().partition("\n")[0].partition(". ")[0]
        reason = f" ({shown(first)})" if first else ""
        sentence = f"memory ran out{reason}; take a smaller size, batch or length: scripts/doctor.py says what fits"
    elif isinstance(error, UnicodeEncodeError) and error.encoding.lower() not in ("utf-8", "utf8"):
        text = ascii(error.object[error.start : error.end])
        sentence = f"{text} cannot be written in {error.encoding}, which this locale asks for; set PYTHONUTF8=1"
    else:
        return None
    return f"error: {' '.join(sentence.split())}", WRONG_INPUT


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory, or the host's in a call of torch, is exhausted. Does not import torch."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _missing_package(module: str) -> str:
    """The message for a package that this Python does not have: what to run instead."""
    program = Path(sys.argv[0]).resolve()
    inside = program.relative_to(CHECKOUT) if program.is_relative_to(CHECKOUT) else program
    here = Path.cwd() == CHECKOUT

    def place(path: Path) -> str:
        return shlex.quote(str(path if here else CHECKOUT / path))

    own = Path(".venv", "bin", "python")
    wrapper = WRAPPERS.get(str(inside))
    start = f"{sys.executable} has no package {module}; "
    if Path(sys.prefix).resolve() != (CHECKOUT / ".venv").resolve() and "VIRTUAL_ENV" not in os.environ:
        made = (CHECKOUT / own).exists()
        if wrapper:
            direct = f"`{place(own)} {place(inside)}` or " if made else ""
            return f"{start}run {direct}`bash {place(Path(wrapper))}`"
        direct = f"`{place(own)} {place(inside)}`"
        first = "" if made else f"`bash {place(Path('inference.sh'))} --dry_run`, which makes .venv, and then "
        return f"{start}run {first}{direct}"
    files = ["requirements.txt", *_listing(DISTRIBUTIONS.get(module, module))]
    return f"{start}run `{sys.executable} -m pip install {' '.join(f'-r {place(Path(file))}' for file in files)}`"


def _listing(distribution: str) -> list[str]:
    """The requirements file, other than requirements.txt, that lists a package; [] if none does."""
    pattern = re.compile(rf"^{re.escape(distribution).replace('_', '[-_]')}\b", re.MULTILINE | re.IGNORECASE)
    names = ("requirements-demo.txt", "requirements-dev.txt")
    return [name for name in names if pattern.search((CHECKOUT / name).read_text(encoding="utf-8"))][:1]


def _check_python() -> None:
    if sys.version_info < OLDEST_PYTHON:
        needed = ".".join(map(str, OLDEST_PYTHON))
        sys.stderr.write(
            f"error: Python {sys.version.split()[0]} is too old, {needed} or newer is needed; run `bash inference.sh`, "
            "which makes .venv with one, and then .venv/bin/python\n"
        )
        sys.exit(WRONG_INPUT)


class _Lasting:
    """A text stream that discards its output once its reader is gone, instead of raising. A full disk raises."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._outlived():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._outlived():
            self._stream.flush()

    def end(self) -> None:
        """Write what is still to be written, or drop it where it cannot be."""
        try:
            self._stream.flush()
        except OSError:
            self._discard()

    @contextmanager
    def _outlived(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self._discard()

    def _discard(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)  # receives buffered and all later output
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def _lasting_streams() -> Iterator[None]:
    """Inside the block, standard output and error accept any character and discard output without a reader."""
    before, lasting = (sys.stdout, sys.stderr), []
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        if stream is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  until the program ends
            continue
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)  # a log file is read as it grows
        lasting.append(_Lasting(stream))
        setattr(sys, name, lasting[-1])
    try:
        yield
    finally:
        for stream in lasting:
            stream.end()
        sys.stdout, sys.stderr = before


def _terminate(signum, frame) -> NoReturn:
    sys.exit(128 + signum)  # unwinds the stack, so that half-written files are removed


def _say(error: BaseException) -> int | None:
    """Print the message for `error` and return its exit code; None for a programming error."""
    explained = explain(error)
    if explained is None:
        return None
    line, code = explained
    for step in (sys.stdout.flush, lambda: sys.stderr.write(line + "\n")):
        with suppress(OSError):  # where a full disk is behind it, the code alone tells
            step()
    return code


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As `sys.excepthook`."""
    code = _say(error)
    if code is None:
        sys.__excepthook__(kind, error, trace)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        _Lasting(stream).end()  # text that is left over and cannot be written would make the exit code 120
    if code is not None:
        sys.exit(code)
