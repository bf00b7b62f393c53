"""Which attention kernel computes networks in training, and that cuDNN's is never given what it cannot take."""

import logging
from contextlib import contextmanager

import pytest
import torch
from distill_case import distill_config, distill_stage
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from configs.errors import UserError
from configs.load import load_config, to_dict
from model.attention import pick_training_kernel
from model.block_parts import split_blocks
from model.weights.load import load_student
from trainer.checkpoint.resume import check_changes
from trainer.parallel.apply import ParallelPlan, choose_attention
from trainer.registry import build_stage
from utils.distributed import Ranks

BF16 = torch.bfloat16
HOPPER = (9, 0)


@pytest.fixture
def hopper(monkeypatch):
    """As on a Hopper GPU: the choice is made as there, the kernels are the CPU's."""
    monkeypatch.setattr("trainer.parallel.apply.compute_capability", lambda device: HOPPER)


@pytest.fixture
def given(monkeypatch):
    """Dtypes of the queries, keys and values that cuDNN's kernel is given, which is the CPU's here."""
    found, chosen = set(), []

    @contextmanager
    def kernel(backend):
        assert backend is SDPBackend.CUDNN_ATTENTION
        chosen.append(backend)
        yield
        chosen.pop()

    class Given(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if chosen and func == torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
                found.update(x.dtype for x in args[:3])
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr("torch.nn.attention.sdpa_kernel", kernel)
    with Given():
        yield found


def backends(network) -> set[str | None]:
    """What the attention of a network is computed by, in diffusers' words."""
    chosen = (attn.processor._attention_backend for block in network.blocks for attn in (block.attn1, block.attn2))
    return {backend and backend.value for backend in chosen}


@pytest.mark.parametrize(
    "name, capability, dtype, kernel",
    [
        ("auto", None, BF16, "sdpa"),
        ("auto", (8, 9), BF16, "sdpa"),
        ("auto", HOPPER, BF16, "cudnn"),
        ("auto", (12, 0), torch.float16, "cudnn"),
        ("auto", HOPPER, torch.float32, "sdpa"),
        ("sdpa", HOPPER, BF16, "sdpa"),
        ("cudnn", (8, 0), BF16, "cudnn"),
        ("cudnn", HOPPER, torch.float32, "sdpa"),
    ],
)
def test_auto_goes_by_generation_and_precision(name, capability, dtype, kernel):
    assert pick_training_kernel(name, capability, dtype) == kernel


def test_what_cannot_run_is_refused(tiny_assets):
    with pytest.raises(UserError, match=r"attention=cudnn needs a GPU of .* and this one has 7\.5; use auto or sdpa"):
        pick_training_kernel("cudnn", (7, 5), torch.float16)
    with pytest.raises(UserError, match=r"training\.attention=cudnn needs a GPU .* and this device is none; use auto"):
        distill_stage(tiny_assets, "training.attention=cudnn", "training.init.teacher=nowhere")
    with pytest.raises(UserError, match=r"training\.attention=cudnn .* training\.precision=float32 asks for; use"):
        distill_config(tiny_assets, "training.attention=cudnn", "training.precision=float32")
    with pytest.raises(UserError, match=r"training\.attention=sdpa is for stage distill; use auto for stage few_steps"):
        distill_config(tiny_assets, "training.attention=sdpa", "training.stage=few_steps")
    with pytest.raises(UserError, match=r"training\.attention=fa3 is unknown; use one of auto, sdpa, cudnn"):
        distill_config(tiny_assets, "training.attention=fa3")


@pytest.mark.parametrize("rank, average", [(0, None), (2, "_native_cudnn")])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_cudnn_is_given_half_precision_alone(
    tiny_assets, tmp_path, hopper, given, caplog, checkpointing, rank, average
):
    """In the audit, updates of both networks, and validation, where the average computes in float32, or where adapters
    are trained in the precision of the weights that it shares."""
    settings = ["training.precision=bfloat16", f"training.checkpointing={checkpointing}"]
    settings += ["training.validation_clips=2", "training.distill.video_clips=1"]
    settings += [f"training.distill.lora.student_rank={rank}"]
    with caplog.at_level(logging.INFO):
        stage = distill_stage(tiny_assets, *settings)
    assert caplog.text.count("attention of networks in training: cudnn") == 1
    for network in (stage.student.model, stage.critic.model, stage.teacher.model):
        assert backends(network) == {"_native_cudnn"}
    assert backends(stage.averaged) == {average}
    stage.begin(0, tmp_path)
    stage.update(0)
    assert given == {BF16}
    stage.validate(0, tmp_path)
    assert given == {BF16}
    stage.export(tmp_path / "export", 1)
    assert backends(load_student(tmp_path / "export")) == {None}


def test_a_run_may_go_on_with_another(tiny_assets, tmp_path, caplog):
    before, now = (distill_config(tiny_assets, f"training.attention={name}") for name in ("auto", "sdpa"))
    check_changes(to_dict(before), now, tmp_path)
    assert not caplog.text


@pytest.mark.parametrize("name, backend", [("auto", None), ("sdpa", "native")])
def test_float32_is_left_to_torch(tiny_assets, hopper, name, backend):
    stage = distill_stage(tiny_assets, "training.precision=float32", f"training.attention={name}")
    for network in (stage.student.model, stage.critic.model, stage.teacher.model, stage.averaged):
        assert backends(network) == {backend}


def test_ranks_that_share_tokens_use_it_too(tiny_assets, hopper):
    config = distill_config(tiny_assets, "training.precision=bfloat16")
    network = distill_stage(tiny_assets).teacher.model
    split_blocks(network)
    choose_attention(network, ParallelPlan(config.training, torch.device("cpu")), BF16)
    assert backends(network) == {"_native_cudnn"}


def test_a_teacher_in_half_precision_has_cudnn_and_its_average_does_not(hopper, given):
    small = ["model.vae=assets/tiny/vae", "training.flow.first_chunk_batch=2", "training.bank_clips=2"]
    small += ["training.compile=false", "training.global_batch=2", "training.micro_batch=2"]
    small += ["training.flow.bank_cache=null", "training.flow.first_chunk_clips=2"]
    teacher = build_stage(load_config("configs/world/teacher.yaml", small), torch.device("cpu"), Ranks())
    assert backends(teacher.module) == {"_native_cudnn"} and backends(teacher.averaged) == {None}
    teacher.update(0)
    assert given == {BF16}
