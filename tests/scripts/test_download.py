"""download.py against a hub and a GitHub that run on this machine, and without any network."""

import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from bad_files import WHOLE
from conftest import ROOT
from safetensors.torch import save

from configs.downloads import DOWNLOADS, SMALL, T5, TOKENIZER, VAE
from configs.errors import UserError
from scripts import download

# the table's sizes are those of the published files, of which the hub here has small ones
ON_A_LARGE_DISK = """
import runpy, shutil, sys
from types import SimpleNamespace
shutil.disk_usage = lambda path: SimpleNamespace(free=10**12)
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
NOWHERE = "http://127.0.0.1:9"  # the port of `discard`, on which nobody listens


def student() -> bytes:  # more than the 10 MB that the library writes at once
    file = io.BytesIO()
    torch.save({"generator": {"model.x": torch.zeros(9_000_000)}}, file)
    return file.getvalue()


HF_14B, INDEX = "Wan-AI/Wan2.1-T2V-14B-Diffusers/transformer", "diffusion_pytorch_model.safetensors.index.json"
SHARDS = [f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
FILES = {
    f"{HF_14B}/config.json": b"{}",
    f"{HF_14B}/{INDEX}": json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}).encode(),
    **{f"{HF_14B}/{name}": save({"x": torch.zeros(10)}) for name in SHARDS},
    f"{SMALL}/config.json": b'{"model_type": "t2v"}',
    f"{SMALL}/diffusion_pytorch_model.safetensors": save({"x": torch.zeros(1000)}),
    f"{SMALL}/{VAE}": WHOLE["Wan2.1_VAE.pth"][1],
    f"{SMALL}/{T5}": WHOLE["models_t5_umt5-xxl-enc-bf16.pth"][1],
    **{f"{SMALL}/{name}": b"{}" for name in [*TOKENIZER][1:]},  # the first can be done without
    "gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt": student(),
    "zhuhz22/Causal-Forcing/chunkwise/causal_forcing.pt": student(),
    "gdhe17/Self-Forcing/vidprom_filtered_extended.txt": "a cat\nein Bär\n".encode(),
    "madebyollin/taehv/raw/main/taew2_1.pth": WHOLE["taew2_1.pth"][1],
}


class Hub(http.server.BaseHTTPRequestHandler):
    """The two addresses that huggingface_hub asks for a file, and GitHub's one; ranges, and breaking off once."""

    break_off: set[str] = set()  # files of which the next GET gives a part only
    served: list[str] = []
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        path = self.path.partition("?")[0].strip("/").replace("/resolve/main/", "/")
        content = FILES.get(path)
        if content is None:
            known = any(file.startswith("/".join(path.split("/")[:2]) + "/") for file in FILES)
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0] or 0)
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", "a" * 40)
        large = path.endswith((".pt", ".pth", ".safetensors"))
        git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest() if large else git}"')
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            Hub.served.append(f"{path}@{start}")
            content = content[start:]
            if path in Hub.break_off:
                Hub.break_off.discard(path)
                content = content[: len(content) // 3]
                self.close_connection = True
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def run(*arguments, endpoint: str, **environment) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    home = {"HF_HOME": str(Path(arguments[-1]) / "home"), "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-c", ON_A_LARGE_DISK, str(ROOT / "scripts" / "download.py"), *map(str, arguments)],
        env=kept | home | {"HF_ENDPOINT": endpoint, "GITHUB_ENDPOINT": endpoint} | environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def refused(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_fetch_verify_and_again(hub, tmp_path):
    Hub.served.clear()
    result = run("wan-1.3b", "--dest", tmp_path, endpoint=hub)
    assert result.returncode == 0, result.stderr
    assert "which is optional" in result.stdout and "wan-1.3b: complete in" in result.stdout
    for path, content in FILES.items():
        if path.startswith(SMALL):
            assert (tmp_path / path.removeprefix(f"{SMALL}/")).read_bytes() == content
    fetched = len(Hub.served)
    assert fetched == 7
    assert run("vae", "umt5", "--dest", tmp_path, endpoint=hub).returncode == 0  # parts of the same folder
    assert len(Hub.served) == fetched

    result = run("--verify", "wan-1.3b", "--dest", tmp_path, endpoint=NOWHERE)
    assert result.returncode == 0 and result.stdout.count("as published") == 7
    damaged = bytearray((tmp_path / VAE).read_bytes())
    damaged[len(damaged) // 2] ^= 1  # a value: no header tells
    (tmp_path / VAE).write_bytes(damaged)
    line = refused(run("--verify", "vae", "--dest", tmp_path, endpoint=NOWHERE))
    assert "Wan2.1_VAE.pth is not what was published" in line
    (tmp_path / "config.json").write_text("{")
    result = run("--verify", "wan-1.3b", "--dest", tmp_path, endpoint=NOWHERE)
    assert result.returncode == 2 and result.stdout.count("as published") == 5, "the others are compared"
    assert result.stderr.count("error: ") == 2 and "config.json is not valid JSON" in result.stderr
    (tmp_path / "config.json").write_bytes(FILES[f"{SMALL}/config.json"])
    (tmp_path / VAE).write_bytes(damaged[:-100])
    assert "cut short" in refused(run("vae", "--dest", tmp_path, endpoint=hub))


def test_an_index_is_followed(hub, tmp_path):
    assert run("wan-14b-hf", "--dest", tmp_path, endpoint=hub).returncode == 0
    folder = tmp_path / "transformer"
    assert {path.name for path in folder.iterdir()} == {"config.json", INDEX, *SHARDS}
    (folder / SHARDS[1]).unlink()
    assert "is missing" in refused(run("--verify", "wan-14b-hf", "--dest", tmp_path, endpoint=NOWHERE))
    again = run("wan-14b-hf", "--dest", tmp_path, endpoint=hub)
    assert again.returncode == 0 and (folder / SHARDS[1]).read_bytes() == FILES[f"{HF_14B}/{SHARDS[1]}"]
    assert run("--verify", "wan-14b-hf", "--dest", tmp_path, endpoint=NOWHERE).stdout.count("as published") == 4
    (folder / INDEX).write_text('{"weight_map": {"a": "../../x.safetensors"}}')
    assert "does not name files of its own folder" in refused(run("wan-14b-hf", "--dest", tmp_path, endpoint=hub))


def test_a_file_of_the_hub_is_resumed(hub, tmp_path):
    path = "gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt"
    Hub.served.clear()
    Hub.break_off.add(path)
    run("self-forcing", "--dest", tmp_path, endpoint=hub)  # the library itself may go on at once
    result = run("self-forcing", "--dest", tmp_path, endpoint=hub)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "checkpoints" / "self_forcing_dmd.pt").read_bytes() == FILES[path]
    starts = [int(line.rpartition("@")[2]) for line in Hub.served if line.startswith(path)]
    assert starts[0] == 0 and any(start > 0 for start in starts[1:])


def test_a_file_of_github_is_fetched_and_resumed(hub, tmp_path):
    path = "madebyollin/taehv/raw/main/taew2_1.pth"
    Hub.break_off.add(path)
    assert "was interrupted" in refused(run("taew2.1", "--dest", tmp_path, endpoint=hub))
    assert not (tmp_path / "taew2_1.pth").exists()
    assert run("taew2.1", "--dest", tmp_path, endpoint=hub).returncode == 0
    assert (tmp_path / "taew2_1.pth").read_bytes() == FILES[path]
    result = run("--verify", "taew2.1", "--dest", tmp_path, endpoint=NOWHERE)
    assert "no hash is known" in result.stdout


def test_without_a_network(tmp_path):
    line = refused(run("wan-14b", "--dest", tmp_path, endpoint=NOWHERE))
    assert f"{NOWHERE} cannot be reached" in line and "HF_ENDPOINT" in line
    line = refused(run("taew2.1", "--dest", tmp_path, endpoint=NOWHERE))
    assert "GITHUB_ENDPOINT" in line
    line = refused(run("vae", "--dest", tmp_path, endpoint=NOWHERE, HF_HUB_OFFLINE="1"))
    assert "while HF_HUB_OFFLINE is set" in line


def test_what_the_hub_has_not(hub, tmp_path):
    assert "there is no Efficient-Large-Model/LongLive-1.3B" in refused(
        run("longlive", "--dest", tmp_path, endpoint=hub)
    )
    both = run("longlive", "taew2.1", "--dest", tmp_path, endpoint=hub)
    assert both.returncode == 2 and "taew2.1: complete in" in both.stdout, "what is there is fetched"
    FILES.pop(f"{SMALL}/{T5}", None)
    assert f"has no {T5}; it may have been renamed" in refused(run("umt5", "--dest", tmp_path, endpoint=hub))


@pytest.mark.parametrize(
    "arguments, message",
    [((), "no NAME was given"), (("wan",), "NAME=wan is unknown; use any of wan-1.3b")],
)
def test_unknown_names_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        download.main(list(arguments))


def test_a_full_disk_is_told_before_anything_is_fetched(tmp_path, capsys):
    DOWNLOADS["huge"] = DOWNLOADS["vae"].__class__("", "a/b", ".", {"x.pth": 1e9})
    try:
        assert download.main(["huge", "--dest", str(tmp_path)]) == 2
        assert "huge needs some 1000000000.0 GB" in capsys.readouterr().err
    finally:
        del DOWNLOADS["huge"]


def test_only_what_is_absent_needs_room(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "free_space", lambda _: 1e9)
    for file in (T5, "diffusion_pytorch_model.safetensors"):
        with pytest.raises(UserError, match=r"wan-1\.3b needs some \d+\.\d GB and .* has 1\.0 GB free"):
            download.fetch("wan-1.3b", DOWNLOADS["wan-1.3b"], tmp_path)
        (tmp_path / file).write_bytes(b"")
    monkeypatch.setattr(download, "from_hub", lambda *_: None)
    with pytest.raises(UserError, match=f"is missing.*--dest {tmp_path}"):  # there was room for the rest
        download.fetch("wan-1.3b", DOWNLOADS["wan-1.3b"], tmp_path)


def test_commands_of_other_readmes_fetch_the_same_files_to_the_same_places():
    """Every `hf download` of docs/weights.md, with the name that stands behind it."""
    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if "hf download" in line]
    for line in lines:
        command, name = (part.strip() for part in line.split("#"))
        _, _, source, *files, option, folder = command.split()
        wanted = DOWNLOADS[name]
        assert (source, folder, option) == (wanted.source, wanted.folder, "--local-dir"), line
        assert set(files) <= set(wanted.files), line
    assert {line.split("#")[1].strip() for line in lines} == DOWNLOADS.keys() - {"umt5", "vae", "taew2.1"}


def test_list_and_advice(capsys):
    assert download.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in DOWNLOADS)
    assert all(f" {wanted.folder} " in shown for wanted in DOWNLOADS.values())
    from model.weights.files import DOWNLOAD_OF_FIELD
    from model.weights.files import DOWNLOADS as ADVICE

    advised = {name for _, name in ADVICE} | {name for name in DOWNLOAD_OF_FIELD.values() if name} | {"wan-1.3b"}
    assert advised <= DOWNLOADS.keys()
