"""Blocks in two parts, before and behind self-attention: compiled or not, they compute what whole blocks did."""

import copy
import threading
from collections.abc import Iterator

import pytest
import torch
from distill_case import distill_stage
from small_wan import build, inputs
from test_checkpointing import BLOCKS, CHUNKS, GEOMETRY, backward, network, runs
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from model.block_parts import BidirectionalBlock, compile_blocks, split_blocks
from model.causal_wan import CausalWanBlock
from model.checkpointing import full_checkpoint, selective_checkpoint
from model.denoiser import ScoreModel
from model.weights.random import random_transformer
from utils.compiling import TRAINING_OPTIONS

pytestmark = pytest.mark.slow

EXACT = dict(rtol=1e-5, atol=1e-8)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


def compiled(model: nn.Module) -> CompileCounterWithBackend:
    """Compile its parts, each as one graph; what counts how often."""
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, backend=counter, fullgraph=True)
    return counter


def parts(model: nn.Module) -> set[int]:
    """The functions that its blocks call, where those are compiled ones."""
    methods = [vars(block).get(name) for block in model.blocks for name in ("pre_attention", "post_attention")]
    return {id(method._torchdynamo_orig_callable.__code__) for method in methods if method is not None}


def assert_close(found: list[Tensor], expected: list[Tensor], **bounds: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **(bounds or EXACT))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_parts_are_the_blocks_of_diffusers_bit_by_bit(weights, autocast):
    x, t, text = inputs(GEOMETRY, CHUNKS * GEOMETRY.chunk_frames)
    score, found = network("score").to(weights), []
    for model in (score, split_blocks(copy.deepcopy(score))):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            v = ScoreModel(model).v(x, t[:, 0], text)
        v.float().square().mean().backward()
        found.append([v, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_students_blocks_are_in_parts_already():
    student, score = build()
    assert split_blocks(student) is student and split_blocks(split_blocks(score)) is score
    assert {type(block) for block in student.blocks} == {CausalWanBlock}
    assert {type(block) for block in score.blocks} == {BidirectionalBlock}


@pytest.mark.parametrize(
    "kind, how", [("score", None), ("score", selective_checkpoint), ("student", None), ("student", full_checkpoint)]
)
def test_gradients_are_the_same(kind, how):
    """Two compilations, for all blocks and chunks; self-attention's kernel is not compiled, and its result is kept."""
    model = network(kind)
    plain = backward(model, kind)
    if how is not None:
        model.enable_gradient_checkpointing(how)
    counter = compiled(model)
    past = 2 if how is full_checkpoint else 1
    seen = runs(model, kind)
    assert (seen.past, seen.text) == (past * BLOCKS[kind], (2 if how else 1) * BLOCKS[kind])
    assert_close(backward(model, kind), plain)
    assert counter.frame_count == 2


def test_gradients_in_bfloat16_are_close():
    model = network("student")
    plain = backward(model, "student", torch.bfloat16)
    model.enable_gradient_checkpointing(selective_checkpoint)
    counter = compiled(model)
    for a, b in zip(backward(model, "student", torch.bfloat16), plain, strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm()
    assert counter.frame_count == 2


@pytest.mark.parametrize("kind, how", [("score", selective_checkpoint), ("student", full_checkpoint)])
def test_another_thread_compiles_nothing(monkeypatch, kind, how):
    """As of a GPU, whose backward pass runs in a thread of torch's."""
    model, inner, counts = network(kind), Tensor.backward, []
    plain = backward(model, kind)
    model.enable_gradient_checkpointing(how)
    counter = compiled(model)

    def elsewhere(loss: Tensor) -> None:
        def run():
            before = counter.frame_count
            inner(loss)
            counts.append(counter.frame_count - before)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    monkeypatch.setattr(Tensor, "backward", elsewhere)
    assert_close(backward(model, kind), plain)
    assert counts == [0] and counter.frame_count == 2


def test_networks_do_not_share_a_limit():
    student, score = build()
    counters = [compiled(student), compiled(score)]
    assert len(parts(student)) == len(parts(score)) == 2 and not parts(student) & parts(score)
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        backward(student, "student")
        backward(score, "score")
    assert [counter.frame_count for counter in counters] == [2, 2]


def test_ten_kinds_of_pass_are_compiled():
    """As many as a student in training has; torch would stop at 8, and say so only in a log."""
    student, _ = build(num_layers=1)
    counter = CompileCounterWithBackend("eager")
    compile_blocks(student, backend=counter, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for batch in range(1, 11):
            x, t, text = inputs(GEOMETRY, GEOMETRY.chunk_frames, batch=batch)
            student(x, t, text)
    assert counter.frame_count == 2 * 10


def test_a_copy_computes_with_its_own_weights():
    score = network("score")
    compiled(score)
    before, twin = backward(score, "score"), copy.deepcopy(score)
    halved = network("score")
    with torch.no_grad():
        for p in (*twin.parameters(), *halved.parameters()):
            p.mul_(0.5)
    assert parts(twin) == parts(score)
    assert all(block.pre_attention.__self__ is block.post_attention.__self__ is block for block in twin.blocks)
    assert_close(backward(twin, "score"), backward(halved, "score"))
    assert_close(backward(score, "score"), before)


def test_a_distillation_compiles_what_a_loss_calls(tiny_assets, monkeypatch):
    """The average, which makes pictures of other sizes, stays as it is; a second cycle compiles nothing."""
    settings = ("training.checkpointing=true", "training.distill.lora.student_rank=3")
    plain, counter = distill_stage(tiny_assets, *settings), CompileCounterWithBackend("aot_eager")
    compiler = torch.compile

    def compile_quickly(part, *, dynamic, options):
        assert options == TRAINING_OPTIONS, "without it gradients are garbage on a GPU"
        return compiler(part, dynamic=dynamic, backend=counter)

    monkeypatch.setattr(torch, "compile", compile_quickly)
    ours = distill_stage(tiny_assets, *settings, "training.compile=true")
    networks = [ours.student.model, ours.critic.model, ours.teacher.model]
    assert [len(parts(model)) for model in networks] == [2, 2, 2] and len(set.union(*map(parts, networks))) == 6
    assert not parts(ours.averaged) and not parts(plain.student.model)
    assert ours.student.model.state_dict().keys() == plain.student.model.state_dict().keys()
    counts = []
    for step in range(4):
        logs, expected = ours.update(step), plain.update(step)
        for name, value in expected.items():
            torch.testing.assert_close(logs[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        counts.append(counter.frame_count)
    assert counts[0] >= 6 and set(counts) == {counts[0]}, "compiled in the first step, and none later"
    assert not torch._dynamo.utils.counters["graph_break"]


def test_gradients_through_inductor_are_the_same():
    """Of one part: a compiler of C++ takes its time."""
    student = network("student")
    plain = backward(student, "student")
    compile_blocks(student)
    for block in student.blocks:
        del block.post_attention
    assert_close(backward(student, "student"), plain, rtol=1e-4, atol=1e-7)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_on_a_gpu(causal):
    """Two blocks of full width, where Triton's reductions are large: torch 2.10 and later had garbage there for a
    gradient (utils/compiling.py). In bfloat16, no further from float32 than plain blocks are."""
    device, text_tokens = torch.device("cuda"), 64
    x = torch.randn(1, 3, 16, 60, 104, device=device)
    text, t = torch.randn(1, text_tokens, 4096, device=device), torch.tensor([500.0], device=device)

    def gradients(half: bool, prepare=None) -> list[Tensor]:
        model = random_transformer("1.3B/2", device, torch.float32, causal=causal).requires_grad_(True)
        model.enable_gradient_checkpointing(full_checkpoint if causal else selective_checkpoint)
        if prepare is not None:
            prepare(model)
        with torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False):
            v = model(x, t, text) if causal else ScoreModel(model).v(x, t, text)
        weight = torch.randn(v.shape, generator=torch.Generator(device).manual_seed(3), device=device)
        (v.float() * weight).mean().backward()
        return [p.grad for p in model.parameters()]

    exact, plain, fast = gradients(False), gradients(True), gradients(True, compile_blocks)
    for a, b, c in zip(exact, plain, fast, strict=True):
        assert (c - a).norm() <= 2 * (b - a).norm() + 1e-3 * a.norm()
