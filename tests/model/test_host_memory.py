"""Loading a set of shards takes the host's memory once: no second copy, and pages of the files are not kept in it."""

import json
import mmap
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from diffusers import WanTransformer3DModel

from model.sizes import TransformerSize
from model.weights.files import open_safetensors
from model.weights.names import original_config, original_name
from scripts.bench.host_peak import HostPeak

NETWORK = TransformerSize(dim=512, ffn=2048, layers=16)  # 270 MB in float32
MOST = 1.3

LOAD = """
import json, sys
import torch
from model.weights.load import load_score, load_student
from scripts.bench.host_peak import HostPeak
torch.set_num_threads(1)
out = []
for path, dtype in json.loads(sys.argv[1]):
    load = load_student if path.endswith(".pt") else load_score
    with HostPeak() as peak:
        model = load(path, "cpu", getattr(torch, dtype))
    assert all(p.dtype in (torch.float32, getattr(torch, dtype)) for p in model.parameters())
    del model
    out.append((peak.own, peak.files))
print(json.dumps(out))
"""


def sparse_folder(folder: Path, network: TransformerSize, shards: int, kind: str) -> int:
    """Write an original Wan folder of sparse files, all zeros; returns their size in bytes."""
    with torch.device("meta"):
        model = WanTransformer3DModel(**network.config)
    shapes = {original_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    (folder / "config.json").write_text(json.dumps(original_config(model.config)), encoding="utf-8")
    each, total, places = -(-len(shapes) // shards), 0, {}
    for i in range(shards):
        file = f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors"
        header, end = {}, 0
        for name in [*shapes][i * each : (i + 1) * each]:
            size = torch.Size(shapes[name]).numel() * {"F32": 4, "BF16": 2}[kind]
            header[name] = {"dtype": kind, "shape": shapes[name], "data_offsets": [end, end := end + size]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
        places |= dict.fromkeys(header, file)
        total += end
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}), encoding="utf-8")
    return total


def test_peak_is_seen():
    """In pages of its own: an allocator may hand out old ones."""
    size, deadline = 50_000_000, time.monotonic() + 300
    with HostPeak() as peak, mmap.mmap(-1, size, mmap.MAP_PRIVATE) as block:
        block.write(b"x" * size)
        while peak.own < 0.9 * size and time.monotonic() < deadline:
            time.sleep(0.01)
    assert 0.9 * size <= peak.own < 3 * size


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_loading_takes_no_second_copy(tmp_path):
    cases, sizes = [], []
    for kind, dtype in (("F32", "bfloat16"), ("BF16", "bfloat16"), ("BF16", "float32")):
        folder = tmp_path / f"{kind}-{dtype}"
        folder.mkdir()
        sizes.append(sparse_folder(folder, NETWORK, 3, kind))
        cases.append((str(folder), dtype))
    state = open_safetensors("", *sorted(Path(cases[1][0]).glob("*.safetensors")))
    torch.save({"generator": {f"model.{name}": state.read(name) for name in state.shapes}}, tmp_path / "sf.pt")
    cases.append((str(tmp_path / "sf.pt"), "bfloat16"))
    run = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(cases)], capture_output=True, text=True, cwd=ROOT, timeout=900
    )
    assert run.returncode == 0, run.stderr
    cast_for_cache, mapped, widened, pickled = json.loads(run.stdout.splitlines()[-1])
    assert cast_for_cache[0] < MOST * sizes[0] / 2, "float32 files, bfloat16 network: half the files"
    assert mapped[0] < 0.3 * sizes[1], "the network's tensors are the map itself"
    assert sum(mapped) < MOST * sizes[1]
    assert widened[0] < MOST * sizes[2] * 2, "twice the files, because the network is"
    assert pickled[0] < 0.3 * sizes[1], "a .pt is mapped, too"
