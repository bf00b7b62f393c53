"""Activation checkpointing: blocks are computed again by the backward pass, over whole clips but for self-attention."""

import copy

import pytest
import torch
from distill_case import distill_stage
from small_wan import NETWORK, KernelRuns, build, by_chunk, inputs, sizes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model import checkpointing
from model.cache import GraphCache
from model.checkpointing import full_checkpoint, selective_checkpoint
from model.denoiser import ScoreModel

GEOMETRY, CHUNKS = sizes(window=2, sink=1), 4
BLOCKS = {"score": NETWORK["num_layers"], "student": NETWORK["num_layers"] * CHUNKS}  # of a forward pass, or of several


def network(kind: str) -> nn.Module:
    student, score = build()
    return {"student": student, "score": score}[kind]


def backward(model: nn.Module, kind: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Gradients of a clip: seen whole by a score network, chunk by chunk through its cache by a student."""
    x, t, text = inputs(GEOMETRY, CHUNKS * GEOMETRY.chunk_frames)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False):
        if kind == "score":
            v = ScoreModel(model).v(x, t[:, 0], text)
        else:
            v = by_chunk(model, GraphCache(GEOMETRY, NETWORK["num_layers"]), GEOMETRY, x, t, text)
    model.zero_grad()
    weight = torch.randn(v.shape, generator=torch.Generator().manual_seed(3))
    (v * weight).mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def runs(model: nn.Module, kind: str, dtype: torch.dtype = torch.float32) -> KernelRuns:
    with KernelRuns() as seen:
        backward(model, kind, dtype)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BLOCKS)
def test_self_attention_runs_once_a_block_and_pass(monkeypatch, kind, dtype):
    model = network(kind)
    plain = runs(model, kind, dtype)
    model.enable_gradient_checkpointing(selective_checkpoint)
    kept = runs(model, kind, dtype)
    assert (plain.past, plain.text) == (BLOCKS[kind], BLOCKS[kind])
    assert (kept.past, kept.text) == (BLOCKS[kind], 2 * BLOCKS[kind])
    assert kept.linear >= plain.linear + 8 * BLOCKS[kind], "linears are computed again"
    monkeypatch.setattr(checkpointing, "KERNELS", [])
    assert runs(model, kind, dtype).past == 2 * BLOCKS[kind]


@pytest.mark.parametrize("kind", BLOCKS)
def test_all_runs_twice(kind):
    model = network(kind)
    plain = runs(model, kind)
    model.enable_gradient_checkpointing(full_checkpoint)
    again = runs(model, kind)
    assert (again.past, again.text) == (2 * plain.past, 2 * plain.text) == (2 * BLOCKS[kind], 2 * BLOCKS[kind])
    assert again.linear >= plain.linear + 8 * BLOCKS[kind]


def test_whole_clips_keep_self_attention_and_chunks_do_not(tiny_assets):
    stage = distill_stage(tiny_assets, "training.checkpointing=true")
    student, critic = stage.student.model, stage.critic.model
    assert student._gradient_checkpointing_func is full_checkpoint and student.gradient_checkpointing
    assert critic._gradient_checkpointing_func is selective_checkpoint and critic.gradient_checkpointing
    assert not stage.teacher.model.gradient_checkpointing and not stage.averaged.gradient_checkpointing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("how", [selective_checkpoint, full_checkpoint])
def test_gradients_are_the_same(how, kind, dtype):
    model = network(kind)
    plain = backward(model, kind, dtype)
    model.enable_gradient_checkpointing(how)
    twin = copy.deepcopy(model)
    for again in (backward(model, kind, dtype), backward(twin, kind, dtype)):
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("name", ["flash_attention", "cudnn_attention", "efficient_attention"])
def test_what_a_kernel_returns_is_kept(name):
    """Those of GPUs, on the meta device, where they take shapes alone."""
    kernel = getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
    takes = {argument.name for argument in kernel._schema.arguments}
    options = {"attn_bias": None, "compute_log_sumexp": True} if "compute_log_sumexp" in takes else {}
    calls = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func)
            return func(*args, **(kwargs or {}))

    def block(x: Tensor) -> Tensor:
        return kernel(*x.exp().chunk(3, dim=-1), **options)[0].sin()

    x = torch.empty(2, 4, 64, 3 * 32, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with Calls():
        selective_checkpoint(block, x).sum().backward()
    assert calls.count(kernel) == 1 and x.grad.shape == x.shape
    assert calls.count(torch.ops.aten.exp.default) == 2, "all else is computed again"


def test_compiled_blocks_keep_theirs():
    model = network("score")
    plain = backward(model, "score")
    model.enable_gradient_checkpointing(selective_checkpoint)
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    assert runs(model, "score").past == BLOCKS["score"]
    for a, b in zip(plain, backward(model, "score"), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", [selective_checkpoint, full_checkpoint])
def test_no_state_of_random_numbers_is_read(monkeypatch, how):
    """A GPU's cannot be while a CUDA graph is captured."""

    def refuse(*args):
        raise AssertionError("it was read")

    monkeypatch.setattr(torch, "get_rng_state", refuse)
    model = network("score")
    model.enable_gradient_checkpointing(how)
    assert runs(model, "score").text == 2 * BLOCKS["score"]
