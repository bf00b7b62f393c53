"""Our own kernels and the step through them against the plain operators; Triton's through its interpreter, or a GPU."""

import os
import subprocess
import sys

import kernels_case
import pytest
import torch
from conftest import ROOT
from kernels_case import norm_cases, rows_case, turn_case
from small_wan import build, inputs, sizes, stream_cache
from test_fast_wan import SDPA, compare, play
from torch._dynamo.testing import CompileCounterWithBackend

from configs.schema import InferenceConfig
from model.cache import E4M3
from model.denoiser import Student
from model.fast import ops as fast_kernels
from model.fast.ops import qk_norm_rope, quantize_rows
from model.fast.student import FastPlan, FastStudent, optimize_student

BF16 = torch.bfloat16
WIDE = dict(attention_head_dim=32, text_dim=20, freq_dim=32)  # of multiples of 16, as float8 wants them
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def twins(dtype: torch.dtype = torch.float32, **plan) -> list[Student]:
    """Fast students of the same weights, without and with our kernels."""
    students = [Student(build(**WIDE)[0].to(dtype)) for _ in range(2)]
    pair = [optimize_student(x, FastPlan(kernels=SDPA, fused_norms=i > 0, **plan)) for i, x in enumerate(students)]
    assert [x.step.fused for x in pair] == [False, True]
    return pair


class TestOperators:
    def test_what_torch_asks_of_them(self):
        for _, case in norm_cases(96, BF16):
            torch.library.opcheck(torch.ops.diagonal.residual_norm, (*case, False))
        torch.library.opcheck(qk_norm_rope, turn_case(96, BF16, BF16))
        fake = dict(test_utils="test_faketensor")  # the other checks compare, for which float8 is too new
        for _, case in list(norm_cases(96, BF16))[:3]:
            torch.library.opcheck(torch.ops.diagonal.residual_norm, (*case, True), **fake)
        torch.library.opcheck(qk_norm_rope, turn_case(96, BF16, E4M3), **fake)
        torch.library.opcheck(quantize_rows, (rows_case(96, BF16), True), **fake)

    def test_interpreted_kernels_agree_with_plain_operators(self):
        pytest.importorskip("triton")
        run = subprocess.run(
            [sys.executable, "-W", "ignore", kernels_case.__file__],
            env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr[-2000:]
        assert "every kernel agrees" in run.stdout


class TestStep:
    @pytest.mark.parametrize("plan", [{}, dict(fp8=True), dict(fp8_cache=True), dict(fused_gelu=True)], ids=str)
    def test_same_as_without(self, plan):
        geo = sizes(3, 1)
        for dtype in (BF16,) if "fp8_cache" in plan else (torch.float32, BF16):
            without, own = twins(dtype, **plan)
            compare(play(without, geo, 5), play(own, geo, 5), 0 if dtype is BF16 else 1e-6)

    def test_what_they_do_not_fit_goes_the_other_way(self):
        student = optimize_student(Student(build(**WIDE)[0]), FastPlan(kernels=SDPA, fused_norms=True, fuse_qkv=False))
        assert not student.step.fused
        play(student, sizes(2, 0), 1)

    @pytest.mark.parametrize("fp8, kinds", [(False, 1), (True, 2)])
    def test_nothing_is_compiled_after_the_first_step(self, fp8, kinds):
        """Patches, head, x0 and modulations once; three parts for each kind of block."""
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        geo = sizes(3, 1)
        without, own = twins(BF16, fp8=fp8)
        own = FastStudent(own.model, FastPlan(kernels=SDPA, fused_norms=True, compile=True), backend=counter)
        compare(play(without, geo, 1), play(own, geo, 1), 0.05)
        assert counter.frame_count == 4 + 3 * kinds
        compare(play(without, geo, 6), play(own, geo, 6), 0.05)
        assert counter.frame_count == 4 + 3 * kinds
        torch._dynamo.reset()


def test_a_cpu_has_none():
    assert not FastPlan.from_config(InferenceConfig(compile="blocks"), torch.device("cpu")).fused_norms


@pytest.mark.cuda
@NEEDS_GPU
class TestOnGpu:
    @pytest.mark.parametrize("width", [96, 1536])
    def test_kernels_agree_with_plain_operators(self, width):
        def norm(*case):
            return torch.ops.diagonal.residual_norm(*case)

        kernels_case.compare_norms(norm, width, BF16, "cuda")
        kernels_case.compare_turns(fast_kernels.qk_norm_rope, width, BF16, "cuda")
        for size in (width, 8960):
            kernels_case.compare_rows(fast_kernels.quantize_rows, size, BF16, "cuda")

    @pytest.mark.parametrize("plan", [{}, dict(fp8=True), dict(fp8=True, fp8_cache=True)], ids=str)
    @torch.no_grad()
    def test_a_stream_compiled_and_replayed(self, plan):
        """bfloat16 steps differ by its rounding; a graph's replay is the same numbers as the run before it."""
        torch._dynamo.reset()
        geo = sizes(3, 1)
        students = [Student(build(**WIDE)[0].to("cuda", BF16)) for _ in range(2)]
        plain = optimize_student(students[0], FastPlan(kernels=SDPA, **plan))
        own = optimize_student(
            students[1], FastPlan(kernels=SDPA, fused_norms=True, compile=True, cuda_graphs=True, **plan)
        )
        assert own.step.fused
        latents, _, text = (x.cuda() for x in inputs(geo, 12))
        steps = [(k, t) for k in range(12 // geo.chunk_frames) for t in (900.0, 400.0, 400.0)]
        clips = []
        for student in (plain, own):
            model = student.model
            cache = stream_cache(model, geo, device="cuda", dtype=student.cache_dtype)
            kv = model.text_kv(text.to(BF16))
            clip = (student.x0(latents[:, geo.chunk(k)], t, kv, cache.begin(k), 2 * k) for k, t in steps)
            clips.append([x0.float() for x0 in clip])
        assert own.graphs
        for i, (a, b) in enumerate(zip(*clips, strict=True)):
            assert (a - b).norm() / a.norm() < 0.05, i
        again = zip(clips[1][1::3], clips[1][2::3], strict=True)
        assert all(torch.equal(a, b) for a, b in again)
        torch._dynamo.reset()
