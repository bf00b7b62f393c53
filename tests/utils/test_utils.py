"""Seeds, files, prompts, logs, ranks, devices, timers and exits."""

import fcntl
import hashlib
import json
import os
import pty
import random
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from configs.errors import UserError
from pipeline.async_decoder import AsyncDecoder
from utils import files
from utils.device import (
    available_cpus,
    cpu_quotas,
    pick_device,
    pick_dtype,
    release_memory,
    set_threads,
    side_stream,
)
from utils.distributed import Ranks
from utils.files import (
    CHECKOUT,
    HashedFile,
    atomic_folder,
    atomic_path,
    block_hash_of,
    check_writable,
    matches_hash,
    replaceable,
    safe_name,
    sampled_hash,
    sha256_of,
    short_hash,
    write_json_atomic,
)
from utils.logs import JsonlSink, console, get_logger, read_jsonl
from utils.progress import progress_bar
from utils.prompts import check_prompt
from utils.seeds import generator, resolve_seed, sample_seed, stable_hash
from utils.timers import SpanTimer

NASTY = ["a/b\\c", "..", "🚀🎉", "line\nbreak\ttab", "x" * 10_000, "中文提示" * 99, "con", "-rf *", "\u202e?"]
NASTY += ["a" * 59 + "é" * 9, "word " * 99]


def test_seeds_are_the_same_everywhere_and_for_ever():
    # printf '[0, "noise", 3]' | sha256sum, the first 8 bytes, halved; another value would change every video
    assert stable_hash(0, "noise", 3) == 0x68937FC49FC40DE9 >> 1
    assert generator(1, "a").initial_seed() != generator(1, "b").initial_seed()
    assert torch.equal(torch.randn(3, generator=generator(1, "a", 2)), torch.randn(3, generator=generator(1, "a", 2)))
    assert stable_hash(1, "a", 2) != stable_hash(1, "a2") and stable_hash(1, 1) != stable_hash(1, "1")


def test_samples_of_all_seeds_differ():
    assert sample_seed(42, 0) == 42
    seeds = [sample_seed(seed, i) for seed in range(20) for i in range(1, 50)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_path_keeps_the_old_file_on_failure(tmp_path, error):
    path = tmp_path / "new" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("old")
        assert not path.exists() and temporary.suffix == ".txt"
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_atomic_path_takes_the_longest_names(tmp_path):
    path = tmp_path / ("x" * 251 + ".txt")
    with atomic_path(path) as temporary:
        temporary.touch()
    assert path.exists()


def writer(folder: Path, kind: str) -> subprocess.Popen:
    """A process in the middle of writing `folder`/whole, with the process number that all others have, too."""
    code = f"""
import os, sys
os.getpid = lambda: 7  # as in two containers
from utils.files import atomic_folder, atomic_path
with {kind}("whole") as partial:
    file = partial / "file" if partial.is_dir() else partial
    file.write_text("half")
    print(partial.name, flush=True)
    sys.stdin.readline()
    file.write_text("second")
"""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": folder}
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, **options)


@pytest.mark.parametrize("kind", [atomic_path, atomic_folder])
def test_leftovers_of_killed_processes_go_and_those_of_live_ones_stay(tmp_path, kind):
    dead, live = (writer(tmp_path, kind.__name__) for _ in range(2))
    names = [process.stdout.readline().strip() for process in (dead, live)]
    assert names[0] != names[1] and all((tmp_path / name).exists() for name in names)
    dead.kill()
    dead.wait()
    own = [tmp_path / name for name in (".partial-mine", ".partial-12-export", "partial.mp4")]
    for path in own:
        path.touch()
    with kind(tmp_path / "other") as partial:
        (partial / "file" if partial.is_dir() else partial).write_text("x")
        assert not (tmp_path / names[0]).exists() and (tmp_path / names[1]).exists()
    live.communicate("\n", timeout=300)
    assert live.returncode == 0
    whole = tmp_path / "whole"
    assert (whole / "file" if whole.is_dir() else whole).read_text() == "second"
    assert sorted(tmp_path.iterdir()) == sorted([*own, whole, tmp_path / "other"])


def test_leftovers_of_another_machine_go_after_a_day(tmp_path):
    """Its locks may not be visible here."""
    fresh, stale = (tmp_path / f".partial-{'0' * 8}-{digit * 16}-x.mp4" for digit in "12")
    for path in (fresh, stale):
        path.touch()
    os.utime(stale, (time.time() - 90_000,) * 2)
    write_json_atomic(tmp_path / "a.json", {})
    assert sorted(tmp_path.iterdir()) == [fresh, tmp_path / "a.json"]


def test_a_folder_whose_replacing_was_killed_is_put_back(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.json").write_text("first")
    (tmp_path / "whole" / "card.json").write_text("{}")
    code = """
import os
from utils import files
renames = []
def replace(a, b):
    renames.append(a)
    if len(renames) == 2:
        os._exit(9)
    rename(a, b)
rename, os.replace = os.replace, replace
with files.atomic_folder("whole") as partial:
    (partial / "config.json").write_text("second")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment).returncode == 9
    assert not (tmp_path / "whole").exists()
    write_json_atomic(tmp_path / "a.json", {})
    assert (tmp_path / "whole" / "config.json").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 2


def test_json_is_strict(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"prompt": "é🚀\n", "x": [1, 2.5]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"prompt": "é🚀\n", "x": [1, 2.5]}
    with pytest.raises(ValueError):
        write_json_atomic(tmp_path / "b.json", {"x": float("nan")})
    assert not (tmp_path / "b.json").exists()


@pytest.mark.parametrize("prompt", NASTY)
def test_safe_name_works_on_disk(tmp_path, prompt):
    name = safe_name(prompt)
    assert 0 < len(name.encode()) <= 60 and not set(name) & set("/\\:*?\"<>|. \n\t")
    (tmp_path / name).touch()
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_safe_name_is_readable_and_cuts_at_words():
    assert safe_name("A red circle, moving right!") == "A_red_circle_moving_right"
    assert safe_name("one two three", limit=9) == "one_two"
    assert safe_name("one two three", limit=7) == "one_two"


def test_a_hash_is_that_of_the_content(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1
    assert short_hash("a", 1) != short_hash("a1") and len(short_hash("a")) == 10
    before = sampled_hash(path)
    path.write_bytes(b"abd")
    assert sampled_hash(path) != before
    path.write_bytes(b"")
    assert sampled_hash(path) != before


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 64, 1000])
def test_a_block_hash_is_that_of_the_hashes_of_blocks(size, tmp_path, monkeypatch):
    """However the bytes were written, and as a plain loop computes it; any other byte or length gives another."""
    monkeypatch.setattr(files, "HASH_BLOCK", 16)
    path, data = tmp_path / "state", bytes(i * i % 251 for i in range(size))
    blocks = [hashlib.sha256(data[i : i + 16]).digest() for i in range(0, size, 16)]
    expected = f"4MiB-{hashlib.sha256(b''.join(blocks)).hexdigest()}"
    rng = random.Random(size)
    with HashedFile(path) as file:
        rest = data
        while rest:
            count = rng.choice((1, 5, 16, 33, 100))
            file.write(memoryview(rest[:count]))
            rest = rest[count:]
        assert file.hexdigest() == expected and file.tell() == size
    assert path.read_bytes() == data and block_hash_of(path) == expected and matches_hash(path, expected)
    assert matches_hash(path, sha256_of(path))  # as older checkpoints have it
    for other in (data + b"x", data[:-1], bytes([data[0] ^ 1]) + data[1:] if data else b"y"):
        if other != data:
            path.write_bytes(other)
            assert not matches_hash(path, expected)


def test_a_file_is_hashed_while_it_is_written(tmp_path, monkeypatch):
    """In order, whatever becomes of the caller's memory; and a full disk is an error."""

    sha256 = hashlib.sha256

    class Slow:
        def __init__(self):
            self.hash = sha256()
            self.digest = self.hash.digest

        def update(self, data: bytes) -> None:
            time.sleep(0.01)
            self.hash.update(data)

    path, data = tmp_path / "state", bytearray(9 << 20)
    with HashedFile(path) as file:
        monkeypatch.setattr(files.hashlib, "sha256", Slow)
        for value in range(8):
            data[:] = bytes([value]) * len(data)
            assert file.write(memoryview(data)) == len(data)
            data[:] = bytes(len(data))
            file.write(b"end")
        file.flush()
        monkeypatch.undo()
        assert file.hexdigest() == block_hash_of(path)
    assert path.stat().st_size == 8 * (len(data) + 3) and path.read_bytes()[-4:] == b"\x07end"
    with pytest.raises(OSError, match="No space left"), HashedFile("/dev/full") as file:
        torch.save(torch.zeros(1 << 20), file)


def test_folders_that_cannot_be_written_are_refused_and_none_is_made(tmp_path):
    folder = tmp_path / "a" / "b"
    assert check_writable(folder, "out") == folder and not (tmp_path / "a").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="out=.*is a file"):
        check_writable(tmp_path / "file" / "sub", "out")
    with pytest.raises(UserError, match="cannot be written"):
        check_writable("/proc/none", "out")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="out=.*leads nowhere"):
        check_writable(tmp_path / "link", "out")
    with pytest.raises(UserError, match="out=.*too long"):
        check_writable(tmp_path / ("x" * 256), "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


@pytest.mark.parametrize("name", ["x" * 256, "file/below", "link/below", "folder"])
@pytest.mark.parametrize("kind", [atomic_path, atomic_folder])
def test_paths_that_cannot_be_are_refused_before_anything_is_made(tmp_path, kind, name):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    if kind is atomic_folder and name == "folder":
        name = "file"
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be (written|a folder)|is no"), kind(tmp_path / name):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "link"] and (tmp_path / "file").is_file()


def test_files_that_are_written_inside_the_blocks_of_others_appear_with_them(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "a.json") as a, atomic_path(tmp_path / "b") as b:
        for _ in range(2):
            write_json_atomic(a, {})
        assert {path.name for path in tmp_path.iterdir()} == {a.name, b.name}
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with atomic_path(tmp_path / "a.json") as a:
        write_json_atomic(a, {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_is_one_sentence(tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(UserError, match="a cannot be written .No space left"), atomic_path(tmp_path / "a"):
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("prompt", ["", " \n\t", "a\0b", "bad \udcff byte"])
def test_check_prompt_refuses(prompt):
    with pytest.raises(UserError):
        check_prompt(prompt)


def test_jsonl_resumes_without_doubles(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonlSink(path) as sink:
        for step in range(4):
            sink.write(step, loss=torch.tensor(0.5), note="x", bad=float("nan"))
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # killed here
    with JsonlSink(path, resume_step=2) as sink:
        sink.write(3, loss=1)
    rows = read_jsonl(path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[0] == {"step": 0, "loss": 0.5, "note": "x", "bad": "nan"} and rows[3]["loss"] == 1


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "x"}', "\xff", "3", "[" * 100_000])
def test_damaged_metrics_name_file_and_line(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0}}\n{line}\n{{"step": 1}}\n', encoding="latin-1")
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2 is no line of metrics; remove it"):
        read_jsonl(tmp_path / "metrics.jsonl")


def test_drawn_seeds_are_one_for_all_processes(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert resolve_seed(7, Ranks(1, 2, 1)) == 7
    assert len({resolve_seed(-1, Ranks()) for _ in range(4)}) == 4
    with pytest.raises(UserError, match="seed=-1 asks 2 processes for one seed"):
        resolve_seed(-1, Ranks(0, 2, 0))
    found = set()
    for run in "ab":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", run)
        assert resolve_seed(-1, Ranks(0, 2, 0)) == resolve_seed(-1, Ranks(1, 2, 1))
        found.add(resolve_seed(-1, Ranks(1, 2, 1)))
    assert len(found) == 2 and min(found) >= 0


def test_console_speaks_in_the_right_voice(capsys):
    console()
    get_logger("test").info("hello")
    get_logger("test").warning("careful")
    console(quiet=True)
    get_logger("test").info("not shown")
    captured = capsys.readouterr()
    assert captured.out == "hello\n" and captured.err == "warning: careful\n"


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_share_loses_none(world):
    items = list(range(10))
    shares = [Ranks(rank, world).share(items) for rank in range(world)]
    assert sorted(sum(shares, [])) == items and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_ranks_from_env(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert Ranks.from_env() == Ranks(0, 1, 0) and Ranks.from_env().first
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match="RANK=3"):
        Ranks.from_env()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert Ranks.from_env() == Ranks(3, 4, 0)
    monkeypatch.setenv("WORLD_SIZE", "four")
    with pytest.raises(UserError, match="integers"):
        Ranks.from_env()


def test_devices_and_precision():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="device=gpu"):
        pick_device("gpu")
    for name in ("cuda:99", "cuda:300", "cuda:-1", "cuda:", "", "cpu:x"):
        with pytest.raises(UserError, match=f"device={name}"):
            pick_device(name)
    for name in ("meta", "mps", "xpu", "hpu", "ipu"):
        with pytest.raises(UserError, match=f"device={name} is none that this runs on; use auto, cpu, cuda"):
            pick_device(name)
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("float16", torch.device("cpu")) == torch.float16
    with pytest.raises(UserError, match="precision=fp4"):
        pick_dtype("fp4", torch.device("cpu"))
    assert 1 <= available_cpus() <= os.cpu_count()


def test_there_is_one_side_stream_for_each_use(monkeypatch):
    """What is freed stays with its stream: sessions, of which validation makes one each time, would leave theirs."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    gpu = torch.device("cuda", 7)
    first, second = AsyncDecoder(gpu), AsyncDecoder(gpu)
    assert first._beside is second._beside is side_stream(gpu, "decoding")
    assert first._beside is not side_stream(gpu, "capture")
    assert first._beside is not side_stream(torch.device("cuda", 6), "decoding")
    assert AsyncDecoder(gpu, overlap=False)._beside is None
    side_stream.cache_clear()


def test_freed_memory_goes_back_to_the_system():
    def used() -> int:
        return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

    for _ in range(2):  # the first time blocks come from mappings of their own, which are given back at once
        blocks = [torch.ones(2_000_000) for _ in range(40)]
        del blocks[:-1]  # the last one is above them in the heap, which therefore is not cut by itself
    kept = used()
    release_memory()
    assert used() < kept - 250_000_000


def test_timer_names_spans_and_adds_up(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", iter([10.0, 12.0, 12.5, 16.5]).__next__)
    timer = SpanTimer(torch.device("cpu"))
    for name in ("long", "short", "long"):
        timer.mark(name)
    assert timer.spans() == {"long": 2.0 + 4.0, "short": 0.5} and list(timer.spans()) == ["long", "short"]


def test_progress_bar_stays_on_its_line(monkeypatch):
    terminal, ours = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(ours, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with progress_bar("a\nprompt " * 50, 3) as bar:
            for _ in range(3):
                bar.update()
                bar.refresh()  # left to itself, tqdm decides by the clock when to redraw
    parts = []
    with suppress(OSError):  # the end: nobody has the terminal open any more. It may give what was written in parts
        while True:
            parts.append(os.read(terminal, 100_000))
    os.close(terminal)
    shown = b"".join(parts).decode()
    assert "3/3" in shown and "\n" not in shown and shown.count("\r") > 3
    assert not shown.split("\r")[-2].strip(), "it vanishes"


def _spoilt(kind, folder):
    """A folder that must not be replaced, by what is wrong with it."""
    folder.mkdir()
    for name in ("card.json", "config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    if kind == "a note":
        (folder / "note.txt").write_text("mine")
    elif kind == "other weights":
        (folder / "lora.safetensors").write_text("mine")
    elif kind == "a folder inside":
        (folder / "other").mkdir()
    elif kind == "a folder by the name of a file":
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").mkdir()
    elif kind == "a link":
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors").symlink_to(folder.parent)
    elif kind == "no card":
        (folder / "card.json").unlink()
    elif kind == "a card of another program":
        (folder / "card.json").write_text("# model card")


SPOILT = (
    "a note", "other weights", "a folder inside", "a folder by the name of a file", "a link", "no card",
    "a card of another program",
)  # fmt: skip


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", SPOILT)
def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path, kind, linked):
    _spoilt(kind, tmp_path / "there")
    before = sorted((path, path.is_file() and path.read_text()) for path in tmp_path.rglob("*"))
    asked = tmp_path / "there"
    if linked:
        asked = tmp_path.parent / f"{tmp_path.name}-link"
        asked.symlink_to(tmp_path / "there")
    with pytest.raises(UserError, match="not ours to replace"), atomic_folder(asked):
        raise AssertionError("it must be refused before anything is written")
    assert sorted((path, path.is_file() and path.read_text()) for path in tmp_path.rglob("*")) == before


def test_a_folder_of_ours_is_replaced_unless_somebody_writes_into_it_meanwhile(tmp_path):
    folder = tmp_path / "export"
    for text in "ab":
        with atomic_folder(folder) as partial:
            (partial / "card.json").write_text("{}")
            (partial / "config.json").write_text(text)
    assert (folder / "config.json").read_text() == "b" and [p.name for p in tmp_path.iterdir()] == ["export"]
    with pytest.raises(UserError, match="holds note.txt"), atomic_folder(folder) as partial:
        (folder / "note.txt").write_text("mine")
    assert (folder / "config.json").read_text() == "b" and (folder / "note.txt").exists()


def test_a_folder_that_holds_the_run_the_checkout_or_the_working_folder_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for folder, keep in ((tmp_path / "empty", []), (tmp_path / "run", [tmp_path / "run" / "x"]), (CHECKOUT.parent, [])):
        with pytest.raises(UserError, match=r"out=.* is in it"):
            replaceable(folder, "out", keep=keep)
    monkeypatch.chdir(tmp_path)
    assert replaceable(tmp_path / "empty", "out") == tmp_path / "empty"


def test_only_files_are_replaced_by_files(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(UserError, match="is no file"), atomic_path(tmp_path / name):
            raise AssertionError


@pytest.mark.parametrize("version", [1, 2])
def test_quotas_of_the_groups_around_a_process_count(tmp_path, version):
    """A process in a group of its own inside one that may use one and a half CPUs; either version of control groups."""
    (tmp_path / "cgroup").write_text("0::/jobs/mine\n" if version == 2 else "4:cpu,cpuacct:/jobs/mine\n1:memory:/x\n")
    for name, quota in (("jobs", 150), ("jobs/mine", None)):
        folder = tmp_path / ("" if version == 2 else "cpu") / name
        folder.mkdir(parents=True, exist_ok=True)
        if version == 2:
            (folder / "cpu.max").write_text(f"{quota or 'max'} 100\n")
        else:
            (folder / "cpu.cfs_quota_us").write_text(f"{quota or -1}\n")
            (folder / "cpu.cfs_period_us").write_text("100\n")
    assert cpu_quotas(tmp_path, tmp_path / "cgroup") == [1.5]
    assert cpu_quotas(tmp_path / "none", tmp_path / "none") == []


def test_threads_are_those_of_setting_environment_and_machine(monkeypatch):
    """One setting; what it means where it is 0."""
    before = torch.get_num_threads()
    monkeypatch.setattr("utils.device.available_cpus", lambda: 6)
    try:
        for environment, threads, training, expected in (
            ({}, 0, False, 1), ({}, 3, False, 3), ({}, 3, True, 3), ({}, 0, True, 6),
            ({"LOCAL_WORLD_SIZE": "4"}, 0, True, 1), ({"LOCAL_WORLD_SIZE": "2"}, 0, True, 3),
            ({"OMP_NUM_THREADS": "5"}, 0, True, 2), ({"OMP_NUM_THREADS": "5"}, 3, True, 3),
        ):  # fmt: skip
            for name in ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
                monkeypatch.delenv(name, raising=False)
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            torch.set_num_threads(2)
            set_threads(threads, training=training)
            assert torch.get_num_threads() == expected, (environment, threads, training)
    finally:
        torch.set_num_threads(before)


def test_threads_that_wait_do_not_spin(tmp_path):
    """As OpenMP is told before torch is loaded; what the user says goes before."""
    code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); from utils import exits; exits.guard(__name__)"
    for given, said in ({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"):
        env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | given
        show = "assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
        command = [sys.executable, "-c", f"{code}; {show}"]
        assert subprocess.run(command, env=env, capture_output=True, text=True).stdout.strip() == said
