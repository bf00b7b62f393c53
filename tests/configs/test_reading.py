"""The one guard of files that are read."""

import os

import pytest

from configs.errors import UserError
from configs.load import load_config
from configs.reading import ordinary_file
from model.weights.files import read_headers, read_json
from utils.pictures import read_clip, read_picture
from utils.prompts import read_prompts


def test_what_is_no_ordinary_file_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert ordinary_file("x", tmp_path / "file") == ordinary_file("x", tmp_path / "link", 5) == 5
    cases = {
        tmp_path / "pipe": "is no ordinary file; give another path",
        tmp_path: "is no ordinary file",
        "/dev/zero": "is no ordinary file",
        tmp_path / "gone": "does not exist",
        tmp_path / "loop": "cannot be read",
        tmp_path / "file" / "below": "cannot be read",
        tmp_path / ("a" * 300): "cannot be read",
        "a\0b": "cannot be read",
    }
    for path, message in cases.items():
        with pytest.raises(UserError, match="^x=.*" + message):
            ordinary_file("x", path)
    with pytest.raises(UserError, match="has 5 bytes; at most 4 are read"):
        ordinary_file("x", tmp_path / "file", 4)


def test_permission_is_looked_at(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read all
    with pytest.raises(UserError, match="permission denied"):
        ordinary_file("x", tmp_path / "file")


READERS = {
    "picture": lambda path: read_picture(path, (32, 48)),
    "clip": lambda path: read_clip(path, (32, 48), 16, 3),
    "prompts": read_prompts,
    "configuration": lambda path: load_config(path),
    "JSON": lambda path: read_json("x", path),
    "weights": lambda path: read_headers("x", path.with_suffix(".pt")),
}


@pytest.mark.parametrize("reader", READERS)
def test_pipes_hang_no_reader(tmp_path, reader):
    for name in ("pipe", "pipe.pt"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError):
        READERS[reader](tmp_path / "pipe")
