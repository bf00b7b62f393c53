"""doctor.py and the checks that inference and training run first."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from packaging.requirements import Requirement
from safetensors.torch import save_file
from weight_layouts import write_wan_folder

from configs.errors import UserError
from configs.load import load_config
from model.memory import GIB
from model.sizes import WAN_1_3B, TransformerSize
from model.weights import load as weights
from model.weights.inspection import inspect_weights
from pipeline import preflight
from scripts import doctor
from trainer.checkpoint import save as checkpoint
from utils import machine

FULL, TRAIN = "configs/wan2.1_t2v_1.3b.yaml", "configs/train_wan2.1_t2v_1.3b.yaml"


def h100(free: float = 79) -> machine.Gpu:
    return machine.Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, int(free * GIB), "580.95.05", "9.0")


def test_it_is_quick_and_imports_nothing_heavy(tiny_assets):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from scripts import doctor;"
        f"code = doctor.main(['--config_path', {str(tiny_assets / 'tiny.yaml')!r}]);"
        "heavy = [m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules];"
        "assert not heavy, heavy; sys.exit(code)"
    )
    begin = os.times()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    took = os.times()  # of the CPU: by the clock it depends on what else the machine does
    assert took.children_user + took.children_system - begin.children_user - begin.children_system < 3
    for name in ("torch ", "attention ", "host memory", "disk ", "student ", "vae ", "tokenizer ", "prompts ",
                 "schedule ", "memory ", "12 GiB card", "80 GiB card"):  # fmt: skip
        assert f"\n{name}" in f"\n{run.stdout}", name
    assert "nothing to mend" in run.stdout and "2 in " in run.stdout
    assert " GB" not in run.stdout and " 0.00 " not in run.stdout.split("memory  ")[0]


def test_missing_files_are_all_told_at_once(capsys, monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: [])
    assert doctor.main(["--config_path", FULL, "model.student=nowhere.pt"]) == 1
    shown = capsys.readouterr().out
    assert shown.count("PROBLEM  ") == 4 and "4 things to mend" in shown
    assert "download.py umt5" in shown and "download.py vae" in shown
    assert "31." in shown.split("40 GiB card")[1].splitlines()[0]  # as configured, sizes of Wan being taken for granted
    assert doctor.main(["--config_path", TRAIN, "--train", "--gpus", "8"]) == 1
    shown = capsys.readouterr().out
    assert "64 = 1 a pass x 8 ranks x 8 accumulated" in shown and "download.py prompts" in shown
    assert "one GPU of 8" in shown and "download.py wan-14b" in shown and "download.py self-forcing" in shown


def test_batch_that_does_not_come_out(capsys):
    doctor.main(["--config_path", TRAIN, "--train", "--gpus", "7"])
    shown = capsys.readouterr().out
    assert "global_batch=64 is not a multiple of training.micro_batch=1 x 7 ranks; try 63" in shown


def test_wrong_settings_end_it():
    with pytest.raises(UserError, match="--gpus=0 is not a number of GPUs"):
        doctor.main(["--gpus", "0"])
    with pytest.raises(UserError, match="--gpus: invalid int value: 'x'; see python scripts/doctor.py --help"):
        doctor.main(["--gpus", "x"])
    with pytest.raises(UserError, match="did you mean"):
        doctor.main(["modle.student=x"])


# --- weights ----------------------------------------------------------------------------------------------------------


def test_peek_knows_every_format(tmp_path, wan, wan_state, student, t5):
    tiny = TransformerSize(dim=128, ffn=40, layers=2, text_dim=12, freq_dim=16)
    payload = {"generator_ema": {f"model.{k}": v for k, v in wan_state.items()}, "generator": dict(wan_state)}
    torch.save(payload, tmp_path / "sf.pt")
    write_wan_folder(tmp_path / "wan", wan_state, 3)
    wan.save_pretrained(tmp_path / "root" / "transformer", max_shard_size="200KB")
    weights.save_network(student, tmp_path / "ours", card={}, ema=student.state_dict())
    save_file(wan_state, tmp_path / "s.safetensors")
    state = {"generator": {"module": student.state_dict(), "average": student.state_dict()}}
    began = {"training": {"init": {"generator": str(tmp_path / "ours")}}}
    checkpoint.save(tmp_path / "run", 5, state, {"stage": "distill", "config": began}, 1)
    for path in ("sf.pt", "wan", "root", "ours", "s.safetensors", "run"):
        found = inspect_weights("student", tmp_path / path)
        assert found.network == tiny and found.kind.startswith("Wan transformer of width 128 with 2 layers"), path
        assert found.size > 100_000
    for path in ("sf.pt", "ours", "run"):
        assert inspect_weights("student", tmp_path / path, use_ema=True).network == tiny
    for path in ("wan", "s.safetensors"):
        with pytest.raises(UserError, match="averaged"):
            inspect_weights("student", tmp_path / path, use_ema=True)
    weights.save_network(t5, tmp_path / "t5")
    assert inspect_weights("text_encoder", tmp_path / "t5").kind == "T5 text encoder (our own)"
    with pytest.raises(UserError, match="is not a Wan 2.1 VAE; it seems to be a T5"):
        inspect_weights("vae", write_t5(tmp_path, t5))
    lora = {"base_model.model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(8, 128)}
    (tmp_path / "adapter").mkdir()
    torch.save({"generator_lora": lora}, tmp_path / "adapter" / "lora.pt")
    assert "LoRA of rank 8" in inspect_weights("lora 0", tmp_path / "adapter", name="model.lora").kind


def write_t5(folder: Path, t5) -> Path:
    torch.save({k: v for k, v in t5.state_dict().items() if "embed_tokens" not in k}, folder / "t5.pth")
    return folder / "t5.pth"


# --- machine ----------------------------------------------------------------------------------------------------------


def test_gpus_are_those_that_are_visible(monkeypatch):
    rows = b"NVIDIA H100 80GB HBM3, 81559, 80994, 580.95.05, 9.0\nNVIDIA RTX 4090, 24564, 20000, 580.95.05, 8.9\n"
    monkeypatch.setattr(machine.shutil, "which", lambda name: name)
    monkeypatch.setattr(machine.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=rows, returncode=0))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second = machine.gpus()
    assert first.name == "NVIDIA H100 80GB HBM3" and first.memory == 81559 << 20 and second.capability == "8.9"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert machine.gpus() == [second]
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert machine.gpus() == []


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """Put a program that prints and ends as told in the place of nvidia-smi."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def write(says: str, code: int = 0, first_line: str = "#!/bin/sh") -> None:
        (tmp_path / "nvidia-smi").write_text(f"{first_line}\nprintf '{says}'\nexit {code}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    return write


@pytest.mark.parametrize(
    ("says", "code", "problem"),
    [
        ("Failed to initialize NVML: Driver/library version mismatch", 18, "nvidia-smi says: Failed to initialize"),
        ("", 9, "nvidia-smi says: nothing"),
        ("Something else\\n", 0, "nvidia-smi says: Something else"),
        ("\\377\\376", 1, "nvidia-smi says: "),
    ],
)
def test_a_broken_driver_is_something_to_mend(nvidia_smi, capsys, says, code, problem):
    nvidia_smi(says, code)
    assert doctor.main([]) == 1
    shown = capsys.readouterr().out
    assert f"PROBLEM  {problem}" in shown and "restart the machine" in shown and "1 thing to mend" in shown


def test_a_driver_that_cannot_be_started(nvidia_smi, monkeypatch):
    nvidia_smi("", first_line="#!/no/such/shell")
    with pytest.raises(UserError, match="cannot be started"):
        machine.gpus()
    monkeypatch.setattr(
        machine.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(subprocess.TimeoutExpired("x", 5))
    )
    with pytest.raises(UserError, match="does not answer within 5 s"):
        machine.gpus()


def test_a_machine_without_a_gpu_has_nothing_to_mend(nvidia_smi):
    nvidia_smi("No devices were found", 6)
    assert machine.gpus() == []


@pytest.mark.parametrize("unknown", ["[N/A]", "[Not Supported]"])
def test_a_gpu_that_takes_the_host_s_memory(nvidia_smi, monkeypatch, unknown):
    nvidia_smi(f"NVIDIA GB10, {unknown}, {unknown}, 580.95.05, 12.1\\n")
    monkeypatch.setattr(machine, "torch_build", lambda: ("2.13.0+cu130", "13.0"))
    (gpu,) = machine.gpus()
    assert gpu.memory is None
    text = str(preflight.check_environment(load_config("configs/tiny.yaml")))
    assert "NVIDIA GB10, the host's memory, sm 12.1" in text and "none that a driver tells of" not in text
    monkeypatch.setattr(machine, "host_memory", lambda: GIB // 2)
    assert "the GPU has 0.5 GiB" in "".join(preflight.check_environment(load_config("configs/tiny.yaml")).problems)


def test_torch_is_the_one_that_setup_asks_for():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    asked = Requirement(re.search('^TORCH = "(.+?)"', setup, re.MULTILINE).group(1))
    versions = [f"2.{minor}.1" for minor in range(9, 20)]
    assert [v for v in versions if v.startswith(preflight.TORCH)] == list(asked.specifier.filter(versions))


def test_idle_gpu_and_old_driver(monkeypatch):
    report = preflight.Report()
    monkeypatch.setattr(machine, "torch_build", lambda: ("2.13.0+cpu", None))
    preflight._machine(report, [h100()])
    assert "built for CPUs" in report.problems[0]
    monkeypatch.setattr(machine, "torch_build", lambda: ("2.13.0+cu130", "13.0"))
    report = preflight.Report()
    preflight._machine(report, [replace(h100(), driver="535.54")])
    assert "driver 535.54 is too old for CUDA 13.0" in report.problems[0]
    monkeypatch.setattr(machine, "torch_build", lambda: ("2.4.0", None))
    report = preflight.Report()
    preflight._machine(report, [])
    assert "torch 2.4.0 is not among those supported" in report.problems[0]


# --- memory -----------------------------------------------------------------------------------------------------------


def test_what_fits_a_card():
    config = load_config(FULL)
    assert preflight.largest_inference(config, {}, 40).startswith("as configured")
    assert "after_use" in preflight.largest_inference(config, {}, 24)
    assert "decode_frames=1" in preflight.largest_inference(config, {}, 16)
    assert "taehv" in preflight.largest_inference(config, {}, 12)
    assert "inference.student=stream" in preflight.largest_inference(config, {}, 8)
    assert preflight.largest_inference(config, {}, 2) == "too small"
    train = load_config(TRAIN)
    counts = [int(preflight.largest_training(train, {}, card).split()[0]) for card in (32, 40, 80)]
    assert counts == sorted(counts, reverse=True)
    assert preflight.largest_training(train, {}, 8).startswith("not even 64")


@pytest.fixture
def full_size(monkeypatch):
    """Weights of Wan's sizes are there, as far as a header tells."""
    found = SimpleNamespace(network=WAN_1_3B, size=11_361_820_672)
    monkeypatch.setattr(preflight, "inspect_weights", lambda *a, **k: found)


def test_inference_is_refused_what_the_gpu_cannot_hold(full_size, monkeypatch):
    config = load_config(FULL)
    preflight.check_inference(config, None)
    preflight.check_inference(config, 80 * GIB)
    with pytest.raises(UserError, match=r"decode needs some 31\.6 GiB and the GPU has 16\.0 GiB; .*doctor\.py"):
        preflight.check_inference(config, 16 * GIB)
    preflight.check_inference(load_config("configs/wan2.1_t2v_1.3b_16gb.yaml"), 16 * GIB)
    monkeypatch.setattr(machine, "free_space", lambda folder: 1000)
    report = preflight.Report()
    preflight._disk(report, Path(config.inference.output_folder), "videos")
    assert "1.0 KiB free for videos in videos, which is too little" in report.problems[0]


def test_training_is_refused_before_it_loads(tiny_assets, tmp_path):
    start = {"student": str(tiny_assets / "student"), "teacher": str(tmp_path / "nowhere")}
    base = load_config(tiny_assets / "tiny.yaml")

    def config(**init):
        training = replace(base.training, stage="distill", init=init, global_batch=8, micro_batch=4)
        return replace(base, training=training)

    with pytest.raises(UserError, match=r"training\.init\.teacher=.*nowhere does not exist"):
        preflight.check_training(config(**start), 1, None)
    good = config(student=start["student"], teacher=start["student"])
    preflight.check_training(good, 2, None)
    fresh = config(student="configs/networks/tiny_transformer.json", teacher=start["student"])
    assert preflight.memory_plan(fresh, {}, training=True).phases[0].parts["student, gradients, AdamW, average"] < 1e9
    with pytest.raises(UserError, match="not a multiple"):
        preflight.check_training(good, 3, None)
    with pytest.raises(UserError, match="GiB and the GPU has 1.0 KiB"):
        preflight.check_training(good, 1, 1000)


@pytest.mark.parametrize(
    ("precision", "capability", "flash3", "said"),
    [
        ("fp8", "9.0", True, "linears and self-attention"),
        ("fp8", "9.0", False, "linears, for want of FlashAttention-3 not self-attention"),
        ("fp8_linears", "12.0", True, "linears"),
        ("fp8_attention", "9.0", True, "self-attention"),
        ("fp8_attention", "10.3", True, "PROBLEM  inference.precision=fp8_attention needs FlashAttention-3: a Hopper"),
        ("fp8_attention", "9.0", False, "`pip install fa3-fwd`; or use inference.precision=auto"),
        ("fp8_linears", "8.6", True, "needs GPUs of sm 8.9 or later and one has 8.6; use inference.precision=auto"),
    ],
)
def test_what_is_float8_on_this_machine(monkeypatch, precision, capability, flash3, said):
    monkeypatch.setattr(machine, "gpus", lambda: [replace(h100(), capability=capability)])
    monkeypatch.setattr(machine, "kernels", lambda: ["sdpa", "cudnn"] + ["fa3"] * flash3)
    report = preflight.check_environment(load_config(FULL, [f"inference.precision={precision}"]))
    (line,) = [text for name, text in report.lines if name == "float8"]
    assert said in line if "inference" in said else line == said
    assert line.startswith("PROBLEM") == any("sm 8.9" in x or "FlashAttention-3" in x for x in report.problems)
    monkeypatch.setattr(machine, "gpus", lambda: [])
    report = preflight.check_environment(load_config(FULL, [f"inference.precision={precision}"]))
    assert "none is here" in dict(report.lines)["float8"] and not any("sm 8.9" in x for x in report.problems)
