"""Prompt files as editors, other systems and accidents make them: read, or refused in one sentence, in no time."""

import os
import time

import pytest

from configs.errors import UserError
from utils.prompts import read_prompts

MB = 1 << 20
READ = {
    "BOM and CRLF": ("\ufeffa red circle\r\na blue square\r\n".encode(), ["a red circle", "a blue square"]),
    "old Mac": (b"one\rtwo", ["one", "two"]),
    "no last line end": (b"one\n\n  two\t", ["one", "two"]),
    "other scripts": ("рыжий кот\n红色的圆\n🔴➡️\n".encode(), ["рыжий кот", "红色的圆", "🔴➡️"]),
    "10 MB of blank lines": (b"\n" * (10 * MB) + b"one", ["one"]),
    "many prompts": (b"a red circle moves right\n" * 50_000, ["a red circle moves right"] * 50_000),
}
REFUSED = {
    "nothing": (b"", "holds no prompt"),
    "BOM alone": (b"\xef\xbb\xbf", "holds no prompt"),
    "NUL": (b"one\ntw\0o\n", "line 2 holds a NUL"),
    "NUL at 10 MB": (b"one\n" * (MB // 4) + b"\0", "NUL"),
    "UTF-16": ("one\ntwo".encode("utf-16"), "not valid UTF-8 at byte 0"),
    "Latin-1": ("größer".encode("latin-1"), "not valid UTF-8 at byte 2"),
    "cut in a character": ("größer".encode()[:3], "not valid UTF-8"),
    "surrogates": (b"one \xed\xa0\x80 two", "not valid UTF-8"),
    "a line of 10 MB": (b"a red circle " * (10 * MB // 13), r"line 1 is 10,\d+,\d+ characters long"),
    "a line of 10 MB among others": (b"one\n" + b"x" * (10 * MB) + b"\ntwo", r"line 2 is 10,485,760 characters"),
    "weights": (b"\x80\x02" + os.urandom(5000), "not valid UTF-8"),
}


@pytest.mark.parametrize("case", READ)
def test_read(tmp_path, case):
    content, prompts = READ[case]
    (tmp_path / "p.txt").write_bytes(content)
    assert read_prompts(tmp_path / "p.txt") == prompts


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    content, message = REFUSED[case]
    (tmp_path / "p.txt").write_bytes(content)
    begin = time.perf_counter()
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(tmp_path / "p.txt")
    assert time.perf_counter() - begin < 2
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(UserError, match="no ordinary file"):
            read_prompts(path)
