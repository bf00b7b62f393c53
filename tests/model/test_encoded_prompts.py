"""Prompts encoded ahead of time: same bits, no text encoder, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from distill_case import distill_config, distill_stage
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from configs.load import to_yaml
from model.encoded_manifest import MANIFEST, file_name, prompts_hash
from model.encoded_text import EncodedText, EncodingJob
from pipeline.preflight import check_training
from scripts import encode_prompts
from trainer.build import frozen_text_encoder
from trainer.loop import run
from trainer.prompt_bank import check_text_dim, prompt_groups
from utils.logs import read_jsonl

CPU = torch.device("cpu")
CLIPS = ["training.validation_clips=2", "training.distill.video_clips=1", "training.distill.negative_prompt=a blue"]
MANY = ["training.bank_clips=150", "training.open_captions=0.3"]  # more than one batch


def encode(assets: Path, folder: Path, *overrides: str, flags: tuple[str, ...] = ()) -> str:
    """Through the command line; returns the setting that trains on it."""
    config = folder.parent / f"{folder.name}.yaml"
    config.write_text(to_yaml(distill_config(assets, *overrides)))
    assert encode_prompts.main(["--config_path", str(config), "--output_folder", str(folder), *flags]) == 0
    return f"training.distill.encoded_prompts={folder}"


@pytest.fixture(scope="module")
def encoded(tiny_assets, tmp_path_factory) -> str:
    return encode(tiny_assets, tmp_path_factory.mktemp("text") / "encoded", *CLIPS, *MANY)


@pytest.mark.parametrize("ahead", ["true", "false"])
def test_training_is_bit_for_bit_the_same_without_the_text_encoder(tiny_assets, encoded, tmp_path, monkeypatch, ahead):
    more = [*CLIPS, *MANY, f"training.distill.encode_ahead={ahead}", "training.steps=4"]
    run(distill_stage(tiny_assets, *more), tmp_path / "live")

    def refused(*_):
        raise AssertionError("the text encoder is loaded")

    monkeypatch.setattr("trainer.prompt_bank.frozen_text_encoder", refused)
    monkeypatch.setattr("trainer.build.load_text_encoder", refused)
    run(distill_stage(tiny_assets, *more, encoded), tmp_path / "encoded")

    def logged(name: str) -> list[dict]:
        rows = read_jsonl(tmp_path / name / "metrics.jsonl")
        return [{k: v for k, v in row.items() if k != "seconds_per_step"} for row in rows]

    assert any("critic_loss" in row for row in logged("live"))
    assert logged("encoded") == logged("live")


def test_every_prompt_of_the_run_is_there_in_the_encoder_s_own_numbers(tiny_assets, encoded):
    config = distill_config(tiny_assets, *CLIPS, *MANY)
    read = EncodedText(encoded.partition("=")[2], config.model, CPU)
    live = frozen_text_encoder(config, CPU)
    for group in prompt_groups(config):
        for start in range(0, len(group), 64):
            part = group[start : start + 64]
            assert torch.equal(read(part), live(part))


def test_prompts_of_a_file_take_the_place_of_open_captions(tiny_assets, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle moves right\n")
    flags = ("--caption_path", str(tmp_path / "p.txt"))
    encode(tiny_assets, tmp_path / "encoded", "training.open_captions=0.3", flags=flags)
    listed = json.loads((tmp_path / "encoded" / "prompts.json").read_text())
    assert "a red circle moves right" in listed and len(listed) == 2  # and the empty one


def test_bfloat16_on_disk_is_what_bfloat16_training_computes_in(tiny_assets, tmp_path):
    encode(tiny_assets, tmp_path / "half", "training.precision=bfloat16")
    config = distill_config(tiny_assets)
    (prompts, *_), live = prompt_groups(config), frozen_text_encoder(config, CPU)
    read = EncodedText(tmp_path / "half", config.model, CPU)
    assert read.manifest.dtype == "bfloat16"
    assert torch.equal(read(prompts), live(prompts).bfloat16().float())


def test_a_stopped_run_goes_on_and_shares_are_disjoint(tiny_assets, encoded, tmp_path, monkeypatch):
    """Two processes after one another, as torchrun would number them; the first loses a file half way."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}[name])
    monkeypatch.setattr("model.encoded_text.BATCHES", 1)
    folder = tmp_path / "shared"
    encode(tiny_assets, folder, *CLIPS, *MANY)
    first = {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}
    assert first and not (folder / MANIFEST).exists()
    with pytest.raises(UserError, match="is not finished"):
        EncodedText(folder, distill_config(tiny_assets).model, CPU)
    cut = folder / sorted(first)[0]
    cut.write_bytes(cut.read_bytes()[:-10])
    monkeypatch.setenv("RANK", "1")
    encode(tiny_assets, folder, *CLIPS, *MANY)
    assert not (folder / MANIFEST).exists(), "the cut file is the first process's"
    monkeypatch.setenv("RANK", "0")
    encode(tiny_assets, folder, *CLIPS, *MANY)
    untouched = {name: time for name, time in first.items() if name != cut.name}
    assert {name: (folder / name).stat().st_mtime_ns for name in untouched} == untouched
    config = distill_config(tiny_assets)
    whole, parts = (EncodedText(path, config.model, CPU) for path in (encoded.partition("=")[2], folder))
    assert whole.index == parts.index and torch.equal(whole(list(whole.index)), parts(list(parts.index)))


def test_prompts_that_are_added_leave_full_files_alone(tmp_path):
    def job(count: int) -> EncodingJob:
        return EncodingJob(tmp_path, [[f"prompt {i}" for i in range(count)]], text_tokens=4, dim=2, dtype="float32",
                           about={"encoder": "a", "encoder_path": "", "prompts_file": None,
                                  "prompts_file_sha256": None})  # fmt: skip

    def encode(prompts):
        return [torch.zeros(1, 2) for _ in prompts]

    first = job(300)
    for i in first.pending():
        first.write(i, encode)
    assert first.finish() and job(400).pending() == [1]


@pytest.fixture
def copy(encoded, tmp_path) -> Path:
    return shutil.copytree(encoded.partition("=")[2], tmp_path / "copy")


def refuse(assets: Path, copy: Path, match: str, *overrides: str) -> None:
    with pytest.raises(UserError, match=match):
        distill_stage(assets, *CLIPS, *MANY, f"training.distill.encoded_prompts={copy}", *overrides)


def test_what_is_refused_at_start_up(tiny_assets, copy, tmp_path):
    refuse(tiny_assets, tmp_path / "nothing", "does not exist; make it with scripts/encode_prompts.py")
    refuse(tiny_assets, copy, "lacks .* of the run's prompts, such as", "seed=5")
    refuse(tiny_assets, copy, "was made with 12 text tokens and model.text_tokens=9", "model.text_tokens=9")
    other = shutil.copytree(tiny_assets / "text_encoder", tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    text = [f"model.text_encoder={other}", f"model.tokenizer={other}"]
    refuse(tiny_assets, copy, "was made by another text encoder", *text)
    (copy / "prompts.json").write_text("[]")
    refuse(tiny_assets, copy, "is not the list that was encoded")
    file = copy / file_name(0)
    file.write_bytes(file.read_bytes()[:-10])
    refuse(tiny_assets, copy, "text_00000.safetensors is cut short or was changed")
    config = distill_config(tiny_assets, f"training.distill.encoded_prompts={copy}")
    with pytest.raises(UserError, match="text_00000.safetensors is cut short"):
        check_training(config, 1, None)


def change_text(file: Path, copy: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1  # tensors lie in the order of their types and names, so that text is last
    file.write_bytes(content)


def change_ends(file: Path, copy: Path) -> None:
    tensors = load_file(file)
    tensors["ends"][3] += 1
    with safe_open(file, "pt") as whole:
        save_file(tensors, file, metadata=whole.metadata())


def swap_files(file: Path, copy: Path) -> None:
    """Two files in each other's place, the manifest's sizes with them."""
    other = copy / file_name(1)
    one, two = file.read_bytes(), other.read_bytes()
    file.write_bytes(two)
    other.write_bytes(one)
    tell(copy, lambda told: told["sizes"].reverse())


def swap_prompts(file: Path, copy: Path) -> None:
    """Two prompts in each other's place, the manifest's hash with them."""
    listed = json.loads((copy / "prompts.json").read_text())
    listed[5], listed[6] = listed[6], listed[5]
    (copy / "prompts.json").write_text(json.dumps(listed))
    tell(copy, lambda told: told.update(prompts_sha256=prompts_hash(listed)))


def tell(copy: Path, change) -> None:
    told = json.loads((copy / MANIFEST).read_text())
    change(told)
    (copy / MANIFEST).write_text(json.dumps(told))


@pytest.mark.parametrize("change", [change_text, change_ends, swap_files, swap_prompts])
def test_what_was_changed_is_refused_when_it_is_opened_or_read(tiny_assets, copy, change):
    config = distill_config(tiny_assets, *CLIPS, *MANY)
    change(copy / file_name(0), copy)
    with pytest.raises(UserError, match=r"text_0000\d\.safetensors .* make it again with scripts/encode_prompts.py"):
        text = EncodedText(copy, config.model, CPU)
        assert change in (change_text, swap_prompts), "seen when it is opened"
        text(list(text.index))


@pytest.mark.parametrize(
    "change",
    [
        lambda told: told.update(counts=told["counts"][::-1]),
        lambda told: told.update(counts=[str(n) for n in told["counts"]]),
        lambda told: told.update(counts=7),
        lambda told: told.update(sizes=[]),
        lambda told: told.update(sizes=told["sizes"] * 2, counts=told["counts"] * 2, checks=told["checks"] * 2),
        lambda told: told.update(checks=[None] * len(told["checks"])),
        lambda told: told.update(dim=None),
        lambda told: told.update(dim=-1),
        lambda told: told.update(text_tokens="many"),
        lambda told: told.update(dtype="complex64"),
        lambda told: told.update(dtype="float64"),
        lambda told: told.update(more=1),
        lambda told: told.pop("checks"),
        lambda told: told.clear(),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(tiny_assets, copy, change):
    tell(copy, change)
    with pytest.raises(UserError, match=f"training.distill.encoded_prompts={copy}"):
        text = EncodedText(copy, distill_config(tiny_assets).model, CPU)
        text(list(text.index)[:1])


@pytest.mark.parametrize("prompts", ["7", "{}", '[["a"]]', '"a"', "[", "[NaN]"])
def test_a_list_of_prompts_that_is_none_is_refused(tiny_assets, copy, prompts):
    (copy / "prompts.json").write_text(prompts)
    with pytest.raises(UserError, match=r"prompts\.json"):
        EncodedText(copy, distill_config(tiny_assets).model, CPU)


def test_embeddings_of_another_width_are_refused(tiny_assets, encoded):
    text = EncodedText(encoded.partition("=")[2], distill_config(tiny_assets).model, CPU)
    check_text_dim(text, 64)
    with pytest.raises(UserError, match="embeddings of width 64 and training.init.student takes 4096"):
        check_text_dim(text, 4096)


def test_the_encoder_s_files_need_not_be_there(tiny_assets, encoded, tmp_path):
    gone = [f"model.text_encoder={tmp_path / 'gone'}", f"model.tokenizer={tmp_path / 'gone'}"]
    distill_stage(tiny_assets, *CLIPS, *MANY, encoded, *gone)
    check_training(distill_config(tiny_assets, *CLIPS, *MANY, encoded, *gone), 1, None)
