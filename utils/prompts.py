"""Checks of prompts, and reading of files with prompts: text with one per line, JSON, JSON lines, CSV, TSV."""

import csv
import io
import os
import re
from pathlib import Path
from typing import Any

from configs.errors import UserError, shown
from configs.reading import ordinary_file
from utils.files import parse_json

MAX_PROMPT = 10_000  # characters; a text encoder uses about 2,500, and cleaning time grows with length
MAX_TEXT, MAX_STRUCTURED = 1 << 29, 1 << 25  # bytes of a file with one prompt per line, and of any other
COLUMNS = ("prompt", "prompt_en")  # keys of prompts in objects and tables; the second is VBench's
JSON_SUFFIXES, TABLE_SUFFIXES = (".json", ".jsonl", ".ndjson"), (".csv", ".tsv")
NO_PROMPTS = (".yaml", ".yml", ".toml", ".xml", ".html", ".htm")
JSON_START = re.compile(r'\{\s*["}]|\[[\[\s]*["{\]]')  # prompts may begin with a bracket, but not like this
MARKUP_START = re.compile(r"<\?xml|<!doctype|<html|---\s*$", re.IGNORECASE | re.MULTILINE)


def check_prompt(prompt: str, source: str = "prompt") -> str:
    """`prompt`, if it is valid. Raises a UserError about `source` if it is empty, too long, or not valid text."""
    if not prompt.strip():
        raise UserError(f"{source} is empty; describe the video in a sentence")
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"{source} is {len(prompt):,} characters long; at most {MAX_PROMPT:,} are taken, so shorten it")
    if "\0" in prompt:
        raise UserError(f"{source} holds a NUL character; give plain text")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of a command line that were not UTF-8
        raise UserError(f"{source} is not valid UTF-8 at character {error.start}; save or type it as UTF-8") from error
    return prompt


def read_prompts(path: str | os.PathLike, field: str = "inference.prompts") -> list[str]:
    """The prompts in a UTF-8 file, stripped of white space.

    The format is detected from the content: JSON (strings, or objects with `prompt` or VBench's `prompt_en`, in a list
    or one per line), a table (CSV or TSV with a column `prompt` in the first line), or text with one prompt per line;
    blank lines are ignored. A byte order mark and any line ending are accepted. Raises a UserError that names `field`
    and the line or entry.
    """
    where, text = f"{field}={path}", _read_text(path, field)
    records = _records(text, where, Path(path).suffix.lower())
    if records is not None:
        prompts = [_prompt_of(record, f"{where} entry {i}") for i, record in enumerate(records, start=1)]
    else:
        lines = enumerate(re.split(r"\r\n|\r|\n", text), start=1)  # str.splitlines would also split at rarer characters
        prompts = [_line(line.strip(), f"{where} line {number}") for number, line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{where} holds no prompt; write one a line")
    return prompts


def read_records(path: str | os.PathLike) -> list[Any] | None:
    """Entries of a file of JSON, JSON lines, CSV or TSV (a dict for each row); None where it is plain text."""
    field = "inference.prompts"
    return _records(_read_text(path, field), f"{field}={path}", Path(path).suffix.lower())


def is_story(record: Any) -> bool:
    """Whether an entry is a story or part of one (pipeline/story.py) and no single prompt."""
    return isinstance(record, dict) and bool({"prompts", "at"} & set(record))


def _read_text(path: str | os.PathLike, field: str) -> str:
    ordinary_file(field, path, MAX_TEXT, fix="give a text file with one prompt a line")
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{field}={path} is not valid UTF-8 at byte {error.start}; save it as UTF-8") from error


def _records(text: str, where: str, suffix: str) -> list[Any] | None:
    """Entries of structured text; None for plain lines. Raises UserError for invalid structured text."""
    start = text.lstrip()
    if suffix in NO_PROMPTS or MARKUP_START.match(start):
        raise UserError(f"{where} is no file of prompts; give text with one prompt a line, JSON, or CSV")
    is_json = suffix in JSON_SUFFIXES or bool(JSON_START.match(start))
    delimiter = None if is_json else _delimiter(start.partition("\n")[0], suffix)
    if (is_json or delimiter) and len(text) > MAX_STRUCTURED:
        raise UserError(f"{where} has {len(text):,} characters and at most {MAX_STRUCTURED:,} are read; split it")
    if is_json:
        return _json_records(text, where)
    return _table_records(text, delimiter, where) if delimiter else None


def _json_records(text: str, where: str) -> list[Any]:
    """Items of a list, a single object, or one entry a line."""
    try:
        value = parse_json(text)
        return value if isinstance(value, list) else [value]
    except ValueError as error:
        whole = error
    lines = [line for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    records = []
    for i, line in enumerate(lines, start=1):
        try:
            records.append(parse_json(line))
        except ValueError as error:
            place, problem = (f"{where} entry {i}", error) if records else (where, whole)
            raise UserError(f"{place} is not valid JSON ({problem}); give a list, or one object a line") from error
    return records


def _delimiter(first: str, suffix: str) -> str | None:
    """The delimiter of a table with the first line `first`; None if that is not a header."""
    if suffix in TABLE_SUFFIXES:
        return "\t" if suffix == ".tsv" else max(",;\t", key=first.count)
    for delimiter in ",;\t":
        names = [name.strip().strip('"').lower() for name in first.split(delimiter)]
        if len(names) > 1 and set(names) & set(COLUMNS) and all(re.fullmatch(r"[\w.-]{1,40}", n) for n in names):
            return delimiter
    return None


def _table_records(text: str, delimiter: str, where: str) -> list[dict[str, str]]:
    """A dict for each row below the header."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records = []
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        if not set(header) & set(COLUMNS):
            names = shown(", ".join(header))
            raise UserError(f"{where} has the columns {names} and none is named prompt; name it in the first line")
        for row in rows:
            if len(row) not in (0, len(header)):
                raise UserError(
                    f"{where} line {rows.line_num} has {len(row)} columns and the first line {len(header)}; put quotes "
                    f"around texts that hold a {'tab' if delimiter == chr(9) else delimiter}"
                )
            if row:
                records.append(dict(zip(header, row, strict=True)))
    except csv.Error as error:
        raise UserError(f"{where} line {rows.line_num} is no row of a table ({error}); correct it there") from error
    return records


def _prompt_of(record: Any, where: str) -> str:
    """The prompt of one entry."""
    if is_story(record):
        raise UserError(f"{where} is part of a story, which inference.py alone plays; give single prompts")
    if isinstance(record, dict):
        record = next((record[name] for name in COLUMNS if name in record), None)
    if not isinstance(record, str):
        raise UserError(f"{where} has no prompt; give texts, or objects that name one 'prompt'")
    return check_prompt(record.strip(), where)


def _line(line: str, where: str) -> str:
    """A line of plain text, checked. Raises UserError for JSON among lines of text."""
    if JSON_START.match(line):
        try:
            parse_json(line)
        except ValueError:
            pass  # a sentence that begins with a bracket
        else:
            raise UserError(f"{where} is JSON among lines of text; give one kind")
    return check_prompt(line, where)
