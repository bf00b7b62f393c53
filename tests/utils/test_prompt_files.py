"""Prompt files as editors, other systems and accidents make them: read, or refused in one sentence, in no time."""

import os
import time

import pytest

from configs.errors import UserError
from utils.prompts import read_prompts

MB = 1 << 20
READ = {
    "BOM and CRLF": ("\ufeffa red circle\r\na\u2028square\r\n".encode(), ["a red circle", "a\u2028square"]),
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
STRUCTURED = {  # whatever the file is called
    "JSON list": '["a cat", " a dog "]',
    "JSON list over lines": '[\n  "a cat",\n  "a dog"\n]\n',
    "objects": '[{"prompt": "a cat", "id": 1}, {"prompt": "a dog"}]',
    "VBench": '[{"prompt_en": "a cat", "dimension": ["color"]}, {"prompt_en": "a dog", "dimension": []}]',
    "JSON lines": '{"prompt": "a cat"}\n\n{"prompt": "a dog"}\r\n',
    "BOM and JSON": '\ufeff\n["a cat", "a dog"]',
    "table": 'id,prompt\n1,"a cat"\n2,a dog\n',
    "table with semicolons": "prompt;id\r\na cat;1\r\na dog;2\r\n",
    "table with tabs": "Prompt\tid\na cat\t1\n\na dog\t2",
}
PLAIN = [
    "[cinematic] a cat", "[a cat]", "{a cat}", "(a cat)", "a cat, prompt, and a dog", '"a cat"', "[[masked]] a cat",
    'a cat: "x", {y}', "<a cat>", "- a cat", "[1, 2] cats", "prompt",
]  # fmt: skip
NONE = {
    "p.json": {
        "broken": ('[{"prompt": "a cat"', r"is not valid JSON \(Expecting"),
        "text": ("a cat", "is not valid JSON"),
        "number": ("3", "entry 1 has no prompt"),
        "no prompt": ('[{"words": "a cat"}]', "entry 1 has no prompt; give texts, or objects that name one 'prompt'"),
        "prompt of another type": ('{"prompt": ["a cat"]}', "entry 1 has no prompt"),
        "empty list": ("[]", "holds no prompt"),
        "empty prompt": ('["a cat", " "]', "entry 2 is empty"),
        "deep": ("[" * 100_000, "is not valid JSON"),
        "half a character": (r'["\ud800"]', "entry 1 is not valid UTF-8"),
    },
    "p.txt": {
        "broken": ('[{"prompt": "a cat"', "is not valid JSON"),
        "second line broken": ('{"prompt": "a cat"}\n{"prompt": ', "entry 2 is not valid JSON"),
        "a story": ('{"prompts": ["a cat", "a dog"]}', "is part of a story"),
        "JSON among text": ('a cat\n{"prompt": "a dog"}', "line 2 is JSON among lines of text"),
        "XML": ("<?xml version='1.0'?><a/>", "is no file of prompts"),
        "page": ("<!DOCTYPE html><html></html>", "is no file of prompts"),
        "two YAML documents": ("---\n- a cat\n", "is no file of prompts"),
    },
    "p.csv": {
        "no such column": ("id,words\n1,a cat\n", "has the columns id, words and none is named prompt"),
        "comma without quotes": ("id,prompt\n1,a cat, slowly\n", "line 2 has 3 columns and the first line 2"),
        "open quote": ('id,prompt\n1,"a cat', "is no row of a table"),
        "header alone": ("id,prompt\n", "holds no prompt"),
        "nothing": ("", "none is named prompt"),
        "long field": ('id,prompt\n1,"' + "x" * 200_000 + '"', "field larger than"),
    },
    "p.YAML": {"list": ("- a cat\n", "is no file of prompts")},
}


@pytest.mark.parametrize("case", READ)
def test_plain_files_are_read(tmp_path, case):
    content, prompts = READ[case]
    (tmp_path / "p.txt").write_bytes(content)
    assert read_prompts(tmp_path / "p.txt") == prompts


@pytest.mark.parametrize("case", STRUCTURED)
def test_structured_files_are_read_by_their_content(tmp_path, case):
    own = {"J": ".JSONL", "t": ".CSV"}.get("J" if "JSON" in case or case in ("objects", "VBench") else "t")
    for name in ("p", "p.txt", f"p{own}"):
        if not (name == "p.CSV" and "tabs" in case):
            (tmp_path / name).write_text(STRUCTURED[case], encoding="utf-8", newline="")
            assert read_prompts(tmp_path / name) == ["a cat", "a dog"], name


def test_a_table_of_one_column_and_cells_of_several_lines(tmp_path):
    (tmp_path / "p.csv").write_text('prompt\n"a cat, slowly"\n"a dog\nruns"\n')
    (tmp_path / "p.tsv").write_text("prompt\ta\na cat, slowly\t1\n")
    assert read_prompts(tmp_path / "p.csv") == ["a cat, slowly", "a dog\nruns"]
    assert read_prompts(tmp_path / "p.tsv") == ["a cat, slowly"]


@pytest.mark.parametrize("prompt", PLAIN)
def test_sentences_that_begin_or_look_oddly_are_sentences(tmp_path, prompt):
    (tmp_path / "p.txt").write_text(f"{prompt}\n{prompt} again\n")
    assert read_prompts(tmp_path / "p.txt") == [prompt, f"{prompt} again"]


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in NONE.items() for case in cases])
def test_what_is_neither_is_refused_in_a_sentence(tmp_path, name, case):
    content, message = NONE[name][case]
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(("name", "size"), [("p.txt", 1 << 31), ("p.json", (1 << 25) + 1)])
def test_files_too_large_to_be_prompts_are_not_read(tmp_path, name, size):
    with open(tmp_path / name, "wb") as file:
        file.truncate(size)  # sparse
    begin = time.process_time()
    with pytest.raises(UserError, match="at most .* are read"):
        read_prompts(tmp_path / name)
    assert time.process_time() - begin < 2


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_no_text_are_refused(tmp_path, case):
    content, message = REFUSED[case]
    (tmp_path / "p.txt").write_bytes(content)
    begin = time.process_time()
    with pytest.raises(UserError, match=message) as caught:
        read_prompts(tmp_path / "p.txt")
    assert time.process_time() - begin < 2
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(UserError, match="no ordinary file"):
            read_prompts(path)
