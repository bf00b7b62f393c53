"""Every format to every other: same bits there and back, from shards, in little memory, whole or not at all."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from test_lora import expected, longlive, output, pairs
from weight_layouts import WAN_CONFIG, original, write_wan_folder

from configs.errors import UserError
from model.weights import export as weight_export
from model.weights import load as weights
from model.weights.export import LazyTensor, write_safetensors
from model.weights.lora import LoraAdapters, plan_lora
from scripts.convert_checkpoint import main


def convert(*arguments) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.fixture
def mixed(wan) -> dict[str, torch.Tensor]:
    """Original names; matrices in bfloat16, the rest in float32, as people mix them."""
    return {n: v.bfloat16() if v.ndim == 2 else v for n, v in original(wan).items()}


@pytest.fixture
def checkpoint(tmp_path, mixed) -> Path:
    averaged = {f"model.{name}": value.float() * 1.5 for name, value in mixed.items()}
    generator = {f"model.{name}": value for name, value in mixed.items()}
    torch.save({"generator": generator, "generator_ema": averaged, "critic": generator}, tmp_path / "sf.pt")
    return tmp_path / "sf.pt"


def test_self_forcing_there_and_back(tmp_path, checkpoint):
    convert(checkpoint, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again.pt")
    before, after = (torch.load(p, weights_only=True) for p in (checkpoint, tmp_path / "again.pt"))
    assert list(after) == ["generator", "generator_ema"]
    for part in after:
        same(after[part], before[part])
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize("middle, shards", [("ours", 1), ("diffusers", 3), ("self-forcing", 3)])
def test_original_there_and_back(tmp_path, mixed, middle, shards):
    folder = write_wan_folder(tmp_path / "wan", mixed, shards)
    between = tmp_path / ("m.pt" if middle == "self-forcing" else "m")
    convert(folder, between, "--to", middle)
    convert(between, tmp_path / "again", "--to", "wan")
    same(tensors(tmp_path / "again"), mixed)
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == WAN_CONFIG


@pytest.mark.parametrize("middle", ["ours", "wan", "self-forcing"])
def test_diffusers_there_and_back(tmp_path, wan, middle):
    wan.save_pretrained(tmp_path / "d", max_shard_size="200KB")
    between = tmp_path / ("m.pt" if middle == "self-forcing" else "m")
    convert(tmp_path / "d", between, "--to", middle)
    convert(between, tmp_path / "again", "--to", "diffusers")
    same(tensors(tmp_path / "again"), {name: value.detach() for name, value in wan.state_dict().items()})
    again = WanTransformer3DModel.from_pretrained(tmp_path / "again")
    assert torch.equal(output(again), output(wan))


def test_a_part_of_a_checkpoint_can_be_chosen(tmp_path, checkpoint, wan):
    bias = wan.proj_out.bias
    convert(checkpoint, tmp_path / "ema", "--use_ema", "--to", "diffusers")
    assert torch.equal(weights.load_score(tmp_path / "ema").proj_out.bias, bias * 1.5)
    convert(checkpoint, tmp_path / "critic.pt", "--part", "critic")
    assert list(torch.load(tmp_path / "critic.pt", weights_only=True)) == ["critic"]
    assert torch.equal(weights.load_score(tmp_path / "critic.pt", name="model.critic").proj_out.bias, bias)


def test_card_is_kept(tmp_path, student):
    weights.save_network(student, tmp_path / "a", card={"stage": "distill", "step": 3}, dtype=None)
    convert(tmp_path / "a", tmp_path / "b")
    assert weights.load_student(tmp_path / "b").card == {"stage": "distill", "step": 3}


def test_lora_is_merged(tmp_path, wan, student):
    values = pairs(wan)
    torch.save(longlive(values), tmp_path / "lora.pt")
    torch.save({"generator": {f"model.{n}": v for n, v in original(wan).items()}}, tmp_path / "base.pt")
    lora = tmp_path / "lora.pt"
    twice = ("--lora", lora, "--lora", lora, "--lora_scale", 0.5, "--lora_scale", 1)
    convert(tmp_path / "base.pt", tmp_path / "m", *twice)
    merged = weights.load_student(tmp_path / "m")
    torch.testing.assert_close(output(merged), output(expected(wan, (values, 1.5))), rtol=0, atol=1e-5)
    loras = LoraAdapters(student)
    loras.add(plan_lora(lora), 1.5)
    loras.merge_and_unload()
    torch.testing.assert_close(output(merged), output(student), rtol=0, atol=1e-5)
    assert merged.card["merged_lora"] == [{"file": "lora.pt"}] * 2


def test_precision_is_changed_and_what_does_not_fit_is_refused(tmp_path, wan):
    wan.save_pretrained(tmp_path / "d")
    convert(tmp_path / "d", tmp_path / "half", "--dtype", "bfloat16")
    found = tensors(tmp_path / "half")
    same(found, {name: value.detach().bfloat16() for name, value in wan.state_dict().items()})
    broken = {name: value.detach().clone() for name, value in wan.state_dict().items()}
    broken["proj_out.bias"][0] = 1e6
    save_file(broken, tmp_path / "d" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"proj_out\.bias holds values that torch\.float16 does not"):
        convert(tmp_path / "d", tmp_path / "float16", "--dtype", "float16")
    assert not (tmp_path / "float16").exists() and not list(tmp_path.glob(".partial*"))


def test_shards_are_those_of_diffusers(tmp_path, wan):
    lazy = {n: LazyTensor(tuple(v.shape), v.dtype, v.detach) for n, v in wan.state_dict().items()}
    weight_export.write("diffusers", tmp_path / "d", lazy, dict(wan.config), limit=200_000)
    assert len(list(tmp_path.glob("d/*-of-*.safetensors"))) > 3
    same(WanTransformer3DModel.from_pretrained(tmp_path / "d").state_dict(), wan.state_dict())
    assert torch.equal(weights.load_student(tmp_path / "d").proj_out.bias, wan.proj_out.bias)


def test_file_is_byte_for_byte_that_of_the_library(tmp_path, mixed):
    save_file(mixed, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    lazy = {n: LazyTensor(tuple(v.shape), v.dtype, lambda v=v: v) for n, v in mixed.items()}
    write_safetensors(tmp_path / "ours.safetensors", lazy)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


class Settings:
    """An object in a checkpoint, as trainers pickle their arguments."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_tensors_without_objects(tmp_path, wan, mixed):
    generator = {f"model.{name}": value for name, value in mixed.items()}
    wide = torch.arange(12.0).reshape(3, 4)
    payload = {"generator": generator, "args": Settings(tmp_path / "executed"), "step": 3, "view": {"t": wide.T[1:]}}
    torch.save(payload, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"convert_checkpoint\.py --tensors_only"):
        weights.load_student(tmp_path / "x.pt")
    convert("--tensors_only", tmp_path / "x.pt", tmp_path / "y.pt")
    assert not (tmp_path / "executed").exists()
    found = torch.load(tmp_path / "y.pt", weights_only=True)
    same(found["generator"], generator)
    assert found["step"] == 3 and torch.equal(found["view"]["t"], wide.T[1:])
    assert torch.equal(weights.load_student(tmp_path / "y.pt").proj_out.bias, wan.proj_out.bias)


def test_overwrite_replaces_what_we_made_and_nothing_else(tmp_path, checkpoint):
    """Twice into the same folder; not where somebody has put something beside, nor where it is not ours."""
    out = tmp_path / "out"
    for _ in range(2):
        convert(checkpoint, out, "--overwrite")
    (out / "notes.txt").write_text("mine")
    for there in (out, tmp_path):
        with pytest.raises(UserError, match="OUT="):
            convert(checkpoint, there, "--overwrite")
    with pytest.raises(UserError, match="OUT=.* is no file"):
        convert(checkpoint, out, "--overwrite", "--to", "self-forcing")
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nowhere", "out"), "IN=.*nowhere does not exist"),
        (("sf.pt", "sf.pt", "--overwrite"), "is what is read"),
        (("sf.pt", "taken"), "exists; give --overwrite"),
        (("sf.pt", "out", "--to", "self-forcing"), r"not the name of a \.pt"),
        (("sf.pt", "out", "--lora", "sf.pt"), "--lora=.*holds no generator_lora; it seems to be a Wan transformer"),
        (("sf.pt", "out", "--lora_scale", "1"), "given 1 times for 0 adapters"),
        (("--tensors_only", "sf.pt", "out"), "makes a .pt"),
        (("sf.pt", "out.safetensors"), "OUT=out.safetensors is the name of a file, and ours is a folder"),
        (("sf.pt", "out.pt", "--to", "wan"), "OUT=out.pt is the name of a file, and wan is a folder"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(tmp_path, checkpoint, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        convert(*arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"needs 0\.0 GB and 0\.0 GB are free"):
        convert(checkpoint, tmp_path / "out")


MEMORY = """
import sys
sys.path[:0] = [sys.argv[3]]
from pathlib import Path
from scripts.convert_checkpoint import main
import model.weights.export, diffusers, transformers
def anonymous():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) << 10
from utils.progress import tqdm
update = tqdm.update
def watch(self, n=1):
    global most
    most = max(most, anonymous())
    return update(self, n)
tqdm.update = watch
for form, name in (("wan", "out"), ("self-forcing", "out.pt")):
    start = most = anonymous()
    main([sys.argv[1], sys.argv[2] + "/" + name, "--to", form])
    print("anonymous bytes", most - start)
"""


def test_no_second_copy_in_memory(tmp_path):
    """100 MB of shards go through in the memory of a few tensors (8 MB each), less than one shard has."""
    config = WAN_CONFIG | {"num_layers": 5, "ffn_dim": 16_384}
    with torch.device("meta"):
        model = WanTransformer3DModel(num_attention_heads=1, attention_head_dim=128, num_layers=5, ffn_dim=16_384,
                                      text_dim=12, freq_dim=16)  # fmt: skip
    state = {n: torch.rand(v.shape) for n, v in original(model.to_empty(device="cpu")).items()}
    size = sum(value.nbytes for value in state.values())
    assert size > 80e6
    source = write_wan_folder(tmp_path / "in", state, 3)
    (source / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", MEMORY, str(source), str(tmp_path), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    peaks = [int(line.split()[2]) for line in run.stdout.splitlines() if line.startswith("anonymous bytes")]
    assert len(peaks) == 2 and max(peaks) < 0.35 * size
