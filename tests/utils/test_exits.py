"""How programs end: what users and machines do wrong is one sentence by its kind, and our mistakes are tracebacks."""

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from configs.load import CHECKOUT
from utils import exits

PROGRAMS = [CHECKOUT / name for name in ("inference.py", "train.py", "serve.py", "demo.py")]
PROGRAMS += sorted(p for p in (CHECKOUT / "scripts").glob("*.py") if "exits.run" in p.read_text(encoding="utf-8"))


def raised(act) -> BaseException:
    with pytest.raises(BaseException) as caught:
        act()
    return caught.value


def of_path(tmp_path: Path, kind: str) -> str:
    """A path that cannot be opened to be written, and nor to be read."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    return str(tmp_path / {"long": "x" * 300, "under a file": "file/x", "folder": "", "loop": "loop"}[kind])


@pytest.mark.parametrize("kind", ["long", "under a file", "folder", "loop"])
@pytest.mark.parametrize("mode", ["r", "w"])
def test_paths_that_cannot_be_used(tmp_path, kind, mode):
    path = of_path(tmp_path, kind)
    line, code = exits.explain(raised(lambda: open(path, mode)))
    assert code == 2 and line.startswith(f"error: {path[:30]}") and "; " in line and len(line) < 300


FORESEEN = {
    "permission": (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x cannot be used (Permission denied)"),
    "full disk": (OSError(errno.ENOSPC, "No space left on device", "/x"), "make room there"),
    "full disk, no name": (OSError(errno.ENOSPC, "No space left on device"), "a file or a pipe cannot be used"),
    "rename": (OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"), "/a and /b cannot be used"),
    "bytes as a name": (OSError(errno.EIO, "Input/output error", b"/x\xff"), "/x"),
    "a descriptor as a name": (OSError(errno.EBADF, "Bad file descriptor", 7), "a file or a pipe"),
    "pipe": (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
    "memory": (MemoryError("Unable to allocate 8 TiB"), "memory ran out (Unable to allocate 8 TiB)"),
    "memory, no text": (MemoryError(), "memory ran out; take"),
    "GPU memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "(CUDA out of memory)"),
    "host memory of torch": (raised(lambda: torch.empty(1 << 55)), "memory ran out"),
    "locale": (raised(lambda: "größer".encode("ascii")), "cannot be written in ascii"),
    "user": (UserError("a=1 is\nwrong; try 2"), "error: a=1 is wrong; try 2"),
}


@pytest.mark.parametrize("case", FORESEEN)
def test_what_is_foreseen(case):
    error, words = FORESEEN[case]
    line, code = exits.explain(error)
    assert code == 2 and line.startswith("error: ") and words in line and "\n" not in line


OURS = [
    *(kind("x") for kind in (ValueError, KeyError, TypeError, AssertionError, RuntimeError, RecursionError, OSError)),
    raised(lambda: "\ud800".encode()),
    ModuleNotFoundError("No module named 'model.none'", name="model.none"),
    ModuleNotFoundError("No module named 'torch.none'", name="torch.none"),
]


@pytest.mark.parametrize("error", OURS, ids=repr)
def test_mistakes_of_the_program_stay_tracebacks(error):
    assert exits.explain(error) is None


def run(code: str, folder: Path, **options) -> subprocess.CompletedProcess:
    """A program whose `main` is `code`, started as ours are."""
    body = textwrap.indent(textwrap.dedent(code), "    ")
    start = f"import sys\nsys.path.insert(0, {str(CHECKOUT)!r})\nfrom utils import exits\nexits.guard(__name__)\n"
    (folder / "program.py").write_text(f"{start}def main():\n{body}\nexits.run(main)\n", encoding="utf-8")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder} | options
    return subprocess.run([sys.executable, "program.py"], timeout=300, **options)


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_goes_ends_nothing(tmp_path, stream):
    read, write = os.pipe()
    os.close(read)
    code = f"""
        for i in range(10_000):
            print("line", i, file=sys.{stream})
        open("made", "w").close()
    """
    done = run(code, tmp_path, **{stream: write})
    os.close(write)
    assert done.returncode == 0 and (tmp_path / "made").exists() and not done.stderr


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_log_file_grows_line_by_line(tmp_path, stream):
    """What a long run has said is there while it runs, in a file too."""
    code = f"""
        print("step 1", file=sys.{stream})
        print(open("log").read() == "step 1\\n", file=open("seen", "w"))
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(tmp_path / "log", "w") as log:
        run(code, tmp_path, env=environment, **{stream: log})
    assert (tmp_path / "seen").read_text() == "True\n"


def test_a_full_disk_behind_standard_output_is_said_once(tmp_path):
    with open("/dev/full", "w") as full:
        done = run("print('x' * 100_000)", tmp_path, stdout=full)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "No space left" in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_all_output_is_a_code(tmp_path, unbuffered):
    with open("/dev/full", "w") as full:
        options = {"stdout": full, "stderr": full, "env": os.environ | {"PYTHONUNBUFFERED": unbuffered}}
        assert run("print('x')", tmp_path, **options).returncode == 2
        assert run("1 / 0", tmp_path, **options).returncode == 1


def test_a_log_that_a_full_disk_does_not_take_ends_nothing(tmp_path):
    """It goes on as soon as there is room."""
    code = """
import resource
from utils.logs import console, get_logger
console()
log = get_logger("x")
before = resource.getrlimit(resource.RLIMIT_FSIZE)
log.info("first"), log.warning("first")
resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
for _ in range(2000):
    log.info("lost"), log.warning("lost")
resource.setrlimit(resource.RLIMIT_FSIZE, before)
log.info("last"), log.warning("last")
"""
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as err:
        done = run(code, tmp_path, stdout=out, stderr=err)
    assert done.returncode == 0
    for name, line in (("out", "last"), ("err", "warning: last")):
        lines = (tmp_path / name).read_text().splitlines()
        assert lines[0].endswith("first") and lines[-1].endswith(line)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_terminals_that_lack_characters(tmp_path, encoding):
    code = "print('größer \u2192'); print('\u4e2d', file=sys.stderr)"
    done = run(code, tmp_path, env=os.environ | {"PYTHONIOENCODING": encoding}, encoding=encoding)
    assert done.returncode == 0 and r"\u2192" in done.stdout and r"\u4e2d" in done.stderr


def test_standard_output_that_is_closed(tmp_path):
    (tmp_path / "start.sh").write_text('exec "$0" program.py >&-\n')
    run("print('x'); open('made', 'w').close()", tmp_path)
    (tmp_path / "made").unlink()
    subprocess.run(["bash", "-c", 'exec "$0" program.py >&-', sys.executable], cwd=tmp_path, check=True, timeout=300)
    assert (tmp_path / "made").exists()


def test_errors_end_in_a_sentence_or_a_traceback(tmp_path):
    done = run("open('none/x')", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: none/x ")
    done = run("1 / 0", tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_a_python_without_our_packages_is_told_what_to_run(program, tmp_path):
    """-S: the interpreter that .venv was made from, with none of the packages."""
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    command = [sys.executable, "-S", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    if "the following arguments are required" not in line:
        assert " has no package " in line and (
            f".venv/bin/python {program}" in line or exits.WRAPPERS.get(program.name, "-") in line
        )


def test_a_package_that_the_environment_lacks_names_every_file_that_is_needed(monkeypatch):
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    monkeypatch.chdir(CHECKOUT)

    def line(name: str) -> str:
        return exits.explain(ModuleNotFoundError(f"No module named {name!r}", name=name))[0]

    monkeypatch.delitem(sys.modules, "uvicorn", raising=False)
    assert line("uvicorn").endswith("-m pip install -r requirements.txt -r requirements-demo.txt`")
    monkeypatch.delitem(sys.modules, "playwright", raising=False)
    assert line("playwright").endswith("-m pip install -r requirements.txt -r requirements-dev.txt`")
    assert line("regex_of_another").endswith("-m pip install -r requirements.txt`")


def test_a_mistyped_flag_names_the_one_that_was_meant():
    parser = exits.Parser(prog="x.py", allow_abbrev=False)
    parser.add_argument("--seed")
    parser.add_subparsers().add_parser("make").add_argument("--num_samples")
    for given, meant in ((["--sead=3"], "--seed"), (["make", "--num_smaples", "3"], "--num_samples")):
        with pytest.raises(UserError, match=f"unrecognized arguments: .* \\(did you mean {meant}"):
            parser.parse_args(given)
    with pytest.raises(UserError, match="unrecognized arguments: --qqqqqq; see"):
        parser.parse_args(["--qqqqqq"])


@pytest.mark.parametrize("given", ["9" * 19, "9" * 5000, "1_0", "0x10", "1e3", "nan", ""])
def test_flags_of_whole_numbers_take_digits(given):
    parser = exits.Parser(prog="x.py")
    parser.add_argument("--n", type=int)
    assert parser.parse_args(["--n", "010"]).n == 10 and parser.parse_args(["--n=-3"]).n == -3
    with pytest.raises(UserError, match="argument --n: invalid int value") as caught:
        parser.parse_args([f"--n={given}"])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("given", ["nan", "inf", "-inf", "1e999", "x"])
def test_flags_of_numbers_are_finite(given):
    parser = exits.Parser(prog="x.py")
    parser.add_argument("--n", type=float)
    assert parser.parse_args(["--n", "2.5"]).n == 2.5
    with pytest.raises(UserError, match="argument --n: invalid float value"):
        parser.parse_args([f"--n={given}"])


def test_an_old_python_is_told_its_age(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    with pytest.raises(SystemExit) as stop:
        exits.guard("__main__")
    assert stop.value.code == 2 and "is too old, 3.11 or newer is needed" in capsys.readouterr().err
