"""Files of the method's relatives, and folders that training leaves, as small random files in exactly their layouts."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from weight_layouts import same_output

from configs.errors import UserError
from configs.load import load_config, to_dict
from model.weights import load as weights
from trainer.checkpoint import save as checkpoint
from trainer.distill.networks import initial_network

FSDP = "model._fsdp_wrapped_module."


def nested_units(state: dict) -> dict:
    """Every block its own FSDP unit, as CausVid's trainer has it."""
    return {FSDP + re.sub(r"^(blocks\.\d+\.)", r"\1_fsdp_wrapped_module.", k): v for k, v in state.items()}


def layouts(state: dict, averaged: dict) -> dict[str, dict]:
    plain = {f"model.{k}": v for k, v in state.items()}
    wrapped = {FSDP + k: v for k, v in state.items()}
    return {
        "CausVid, as trained": {"generator": wrapped, "critic": wrapped},
        "CausVid, nested units": {"generator": nested_units(state)},
        "CausVid, bidirectional": {"generator": plain},
        "Causal-Forcing": {"generator": plain, "generator_ema": {FSDP + k: v for k, v in averaged.items()}},
        "Causal-Forcing, ODE": {"generator": nested_units(state), "generator_ema": nested_units(averaged)},
        "StreamDiffusionV2": {"generator": dict(state)},
        "StreamDiffusionV2, state_dict": {"state_dict": dict(state)},
        "LongLive base": {"generator": plain, "critic": plain, "step": 3000},
        "LongLive merged": {
            "generator": plain,
            "checkpoint_format": "longlive_generator_merged_lora",
            "source_generator_ckpt": "base.pt",
            "source_lora_ckpt": "lora.pt",
            "model_name": "Wan2.1-T2V-1.3B",
            "dtype": "bfloat16",
            "merged_lora": True,
        },
        "Diagonal Distillation": {
            "generator": plain,
            "critic": plain,
            "generator_optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-6}]},
            "step": torch.tensor(5),
        },
        "Lightning": {"state_dict": {f"model.diffusion_model.{k}": v for k, v in state.items()}, "epoch": 1},
        "compiled": {"generator": {f"model._orig_mod.{k}": v for k, v in state.items()}},
        "DDP": {"generator": {f"module.model.{k}": v for k, v in state.items()}},
    }


@pytest.mark.parametrize("layout", layouts({}, {}))
def test_student_of_the_family(tmp_path, wan, wan_state, layout):
    averaged = {name: value + 1 for name, value in wan_state.items()}
    payload = layouts(wan_state, averaged)[layout]
    torch.save(payload, tmp_path / "model.pt")
    same_output(weights.load_student(tmp_path / "model.pt"), wan)
    if "generator_ema" in payload:
        again = weights.load_student(tmp_path / "model.pt", use_ema=True)
        assert torch.equal(again.proj_out.bias, wan.proj_out.bias + 1)
    same_output(weights.load_score(tmp_path / "model.pt"), wan)  # a teacher can start from any of them


# --- folders of runs --------------------------------------------------------------------------------------------------


def test_folder_of_a_self_forcing_run(tmp_path, wan_state):
    for step in (50, 100, 1000):
        (tmp_path / f"checkpoint_model_{step:06d}").mkdir()
        state = {f"model.{k}": v * step for k, v in wan_state.items()}
        torch.save({"generator": state}, tmp_path / f"checkpoint_model_{step:06d}" / "model.pt")
    loaded = weights.load_student(tmp_path)
    assert torch.equal(loaded.proj_out.bias, wan_state["head.head.bias"] * 1000)


@pytest.fixture
def run(tmp_path, student):
    """A run of ours that was stopped after its second checkpoint, as trainer/checkpoint/save.py writes it."""
    (tmp_path / "start").mkdir()
    student.save_config(tmp_path / "start")
    start = f"training.init={{student: {tmp_path / 'start'}}}"
    config = load_config("configs/tiny.yaml", [start, f"model.student={tmp_path / 'nowhere'}"])
    for step in (10, 20):
        state = {
            "generator": {
                "module": {k: v + step for k, v in student.state_dict().items()},
                "average": {k: v - step for k, v in student.state_dict().items()},
                "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-6}]},
            },
            "critic": {"module": {k: v * step for k, v in student.state_dict().items()}, "optimizer": {}},
        }
        manifest = {"stage": "distill", "config": to_dict(config)}
        checkpoint.save(tmp_path / "logs", step, state, manifest, keep=2)
    return tmp_path / "logs"


def test_folder_of_our_own_run(run, student):
    bias = student.proj_out.bias
    loaded = weights.load_student(run)
    assert loaded.card == {"stage": "distill", "step": 20} and torch.equal(loaded.proj_out.bias, bias + 20)
    assert torch.equal(weights.load_student(run, use_ema=True).proj_out.bias, bias - 20)
    assert torch.equal(weights.load_score(run, name="model.critic").proj_out.bias, bias * 20)
    start = load_config("configs/tiny.yaml", [f"training.init={{student: {run}, teacher: {run}, critic: {run}}}"])
    for role, expected in (("student", bias + 20), ("teacher", bias + 20), ("critic", bias * 20)):
        network = initial_network(start, role, torch.device("cpu"), causal=role == "student")
        assert torch.equal(network.proj_out.bias, expected), role
    older = weights.load_student(run / "checkpoint_000010")
    assert torch.equal(older.proj_out.bias, bias + 10)
    assert torch.equal(weights.load_student(run / "checkpoint_000010" / "state.pt").proj_out.bias, bias + 10)


def test_export_of_a_run_comes_first(run, student):
    weights.save_network(student, run / "export", card={"stage": "distill", "step": 20}, dtype=None)
    assert torch.equal(weights.load_student(run).proj_out.bias, student.proj_out.bias)
    assert torch.equal(weights.load_student(run, use_ema=True).proj_out.bias, student.proj_out.bias - 20)
    critic = weights.load_score(run, name="training.init.critic")
    assert torch.equal(critic.proj_out.bias, student.proj_out.bias * 20), "an export has none"


def test_run_whose_beginning_is_gone(run, tmp_path):
    (tmp_path / "start" / "config.json").unlink()
    with pytest.raises(UserError, match=r"does not say the sizes.*put the config\.json of that into .*export"):
        weights.load_student(run)


def test_a_damaged_manifest_is_named(run):
    for step in (10, 20):  # a run with one that is whole goes on from there
        (run / f"checkpoint_0000{step}" / "manifest.json").write_text("[")
    with pytest.raises(UserError, match="manifest.json is not valid JSON"):
        weights.load_student(run)
    (run / "checkpoint_000020" / "manifest.json").write_text(json.dumps({"config": [1], "stage": 3}))
    with pytest.raises(UserError, match="does not say the sizes"):
        weights.load_student(run)


def test_an_empty_run_is_refused(tmp_path):
    (tmp_path / "logs").mkdir()
    with pytest.raises(UserError, match=r"model\.student=.*logs has no"):
        weights.load_student(tmp_path / "logs")


def test_files_of_a_check_are_those_that_are_read(tmp_path, run, wan_state):
    """The hash in a video's JSON is of these."""
    plan = weights.plan_transformer("model.student", run, weights.CausalWanModel)
    assert plan.tensors.files == (run / "checkpoint_000020" / "state.pt",)
    save_file(wan_state, tmp_path / "s.safetensors")
    plan = weights.plan_transformer("model.student", tmp_path / "s.safetensors", weights.CausalWanModel)
    assert plan.tensors.files == (tmp_path / "s.safetensors",)
