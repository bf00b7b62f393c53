"""The fast step against the plain one; which graphs a stream needs; nothing is compiled anew in a steady state."""

import pytest
import torch
from diffusers.models.transformers import transformer_wan
from small_wan import NETWORK, build, inputs, masked_v, sizes, stream_cache
from torch._dynamo.testing import CompileCounterWithBackend

from configs.errors import UserError
from configs.schema import InferenceConfig
from model import fp8
from model.attention import Kernels, attend, pick_kernels
from model.cache import E4M3
from model.causal_wan import chunk_causal_mask
from model.denoiser import Student
from model.fast.student import FastPlan, FastStudent, cache_states, linear_gelu, optimize_student

SDPA = Kernels("sdpa", "sdpa", "test")
PLAN = FastPlan(kernels=SDPA)
STEPS = (900.0, 400.0)


@torch.no_grad()
def play(student: Student, geo, chunks: int, batch: int = 2, texts=None) -> list[torch.Tensor]:
    """x0 of every step of a stream. texts: raw text of each chunk."""
    latents, _, text = inputs(geo, chunks * geo.chunk_frames, batch)
    cache = stream_cache(student.model, geo, batch, dtype=student.cache_dtype)
    made = [student.model.text_kv(t) for t in texts or [text]]
    out = []
    for k in range(chunks):
        for t in STEPS:
            kv = made[min(k, len(made) - 1)]
            out.append(student.x0(latents[:, geo.chunk(k)], t, kv, cache.begin(k), k * geo.chunk_frames))
    return out


def pair(plan: FastPlan = PLAN, **network):
    """Plain and fast students of the same weights."""
    return Student(build(**network)[0]), optimize_student(Student(build(**network)[0]), plan)


def compare(a: list[torch.Tensor], b: list[torch.Tensor], atol: float):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=0)


class FakeRecorder:
    """Replays by running again over the fixed buffers; counts what was recorded."""

    made: list = []

    def __call__(self, work):
        FakeRecorder.made.append(work)
        return work


class TestSameAsPlain:
    @pytest.mark.parametrize("window, sink", [(3, 1), (2, 0), (0, 0)])
    def test_every_step_of_a_stream(self, window, sink):
        geo = sizes(window, sink)
        plain, fast = pair()
        compare(play(plain, geo, 6), play(fast, geo, 6), 2e-6)

    def test_without_fusing_it_is_exact(self):
        """Only the joined product of q, k, v and the patches as a product may round otherwise."""
        geo = sizes(3, 1)
        plain, fast = pair(FastPlan(kernels=SDPA, fuse_qkv=False))
        compare(play(plain, geo, 5), play(fast, geo, 5), 1e-6)

    def test_projections_are_one_matrix_and_hold_no_more(self):
        plain, fast = pair()
        count = [sum(p.numel() for p in s.model.parameters()) for s in (plain, fast)]
        assert count[0] == count[1]
        assert not hasattr(fast.model.blocks[0].attn1, "to_q")

    def test_the_plain_way_stays_open(self):
        geo = sizes(3, 1)
        latents, t, text = inputs(geo, 4)
        plain, fast = pair()
        with torch.no_grad():
            torch.testing.assert_close(plain.x0(latents, t, text), fast.x0(latents, t, text), atol=2e-6, rtol=0)

    def test_gelu_in_the_product(self):
        x, w, b = torch.randn(2, 5, 8), torch.randn(6, 8), torch.randn(6)
        exact = torch.nn.functional.gelu(x @ w.t() + b, approximate="tanh")
        torch.testing.assert_close(linear_gelu(x, w, b), exact, atol=1e-5, rtol=0)
        torch.library.opcheck(linear_gelu, (x, w, b))


class TestGraphs:
    def test_states_of_the_usual_window(self):
        geo = sizes(4, 1)
        assert cache_states(geo, 100) == [(0, 1), (1, 2), (2, 3), (3, 4), (1, 4), (2, 4)]
        assert cache_states(sizes(0, 0), 3) == [(0, 1), (1, 2), (2, 3)]

    def test_one_recording_for_each_state_and_the_same_numbers(self, monkeypatch):
        geo, texts = sizes(3, 1), [inputs(sizes(3, 1), 2, seed=s)[2] for s in (1, 2)]
        plain, fast = pair()
        monkeypatch.setattr(FakeRecorder, "made", [])
        fast.recorder = FakeRecorder
        compare(play(plain, geo, 9, texts=texts), play(fast, geo, 9, texts=texts), 2e-6)
        states = cache_states(geo, 9)
        assert fast.graphs == len(FakeRecorder.made) == len(states) == 4
        tokens = geo.tokens_per_chunk
        (graph_cache,) = fast._graph_caches.values()
        assert sorted(graph_cache.replays) == sorted((own * tokens, end * tokens) for own, end in states)

    def test_another_cache_is_another_book(self):
        geo = sizes(3, 1)
        plain, fast = pair()
        fast.recorder = FakeRecorder
        for batch in (2, 1):
            compare(play(plain, geo, 5, batch), play(fast, geo, 5, batch), 2e-6)

    def test_streams_in_turns_keep_their_graphs(self, monkeypatch):
        """As visitors of the demo do: nothing is recorded anew; what is gone is forgotten."""
        monkeypatch.setattr(FakeRecorder, "made", [])
        geo = sizes(3, 1)
        plain, fast = pair()
        fast.recorder = FakeRecorder
        latents, _, text = inputs(geo, geo.chunk_frames, 2)
        with torch.no_grad():
            kv = fast.model.text_kv(text)
            caches = [stream_cache(fast.model, geo, 2) for _ in range(2)]
            for _ in range(4):
                for cache in caches:
                    got = fast.x0(latents, STEPS[0], kv, cache.begin(0), 0)
            expected = plain.x0(latents, STEPS[0], kv, stream_cache(plain.model, geo, 2).begin(0), 0)
        compare([got], [expected], 2e-6)
        assert len(FakeRecorder.made) == len(fast._graph_caches) == 2
        FakeRecorder.made.clear()
        fast._graph_caches[caches[0]._keys[0]].replays.clear()  # fakes hold the cache; a graph does not
        del caches[0], cache
        assert len(fast._graph_caches) == 1

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_captured_for_caches_that_come_and_go(self):
        """For real: the same numbers in turns (kernels round to TF32), and a graph keeps no cache alive."""
        geo, device = sizes(3, 1), torch.device("cuda")
        plain, fast = Student(build()[0].to(device)), Student(build()[0].to(device))
        fast = optimize_student(fast, FastPlan(kernels=SDPA, cuda_graphs=True))
        latents, _, text = (x.to(device) for x in inputs(geo, geo.chunk_frames, 2))

        def step(student, cache, batch):
            with torch.no_grad():
                kv = student.model.text_kv(text[:batch])
                return student.x0(latents[:batch], STEPS[0], kv, cache.begin(0), 0)

        expected = {n: step(plain, stream_cache(plain.model, geo, n, device=device), n) for n in (1, 2)}
        for batches in ((1, 2), (2, 1), (1,)):
            caches = [(stream_cache(fast.model, geo, n, device=device), n) for n in batches]
            for _ in range(4):
                for cache, n in caches:
                    compare([step(fast, cache, n)], [expected[n]], 5e-3)
            assert len(fast._graph_caches) == fast.graphs == len(batches)
            del caches, cache
            assert not len(fast._graph_caches)

    def test_results_are_not_overwritten(self):
        geo = sizes(3, 1)
        _, fast = pair()
        fast.recorder = FakeRecorder
        out = play(fast, geo, 5)
        assert len({x.data_ptr() for x in out}) == len(out)

    def test_a_window_without_end_stops_recording(self, monkeypatch):
        monkeypatch.setattr("model.fast.student.MAX_GRAPHS", 3)
        geo = sizes(0, 0)
        plain, fast = pair()
        fast.recorder = FakeRecorder
        compare(play(plain, geo, 6), play(fast, geo, 6), 2e-6)
        assert fast.graphs == 3


class TestCompiled:
    def test_nothing_is_compiled_after_the_first_step(self):
        """Six parts, once each, for all blocks, chunks, slots and steps."""
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        geo = sizes(3, 1)
        plain = Student(build()[0])
        fast = FastStudent(build()[0], FastPlan(kernels=SDPA, compile=True), backend=counter)
        compare(play(plain, geo, 1), play(fast, geo, 1), 2e-6)
        assert counter.frame_count == 6
        compare(play(plain, geo, 7), play(fast, geo, 7), 2e-6)
        fast.recorder = FakeRecorder  # what is captured has the layouts of what was compiled
        compare(play(plain, geo, 7), play(fast, geo, 7), 2e-6)
        assert fast.graphs and counter.frame_count == 6
        fast.release_graphs()
        assert not fast.graphs
        torch._dynamo.reset()


class TestFp8:
    def test_a_linear_is_within_the_format(self):
        torch.manual_seed(0)
        linear = torch.nn.Linear(64, 48).bfloat16()
        x = torch.randn(3, 7, 64).bfloat16() * torch.tensor([0.01, 1.0, 100.0])[:, None, None].bfloat16()
        exact = torch.nn.functional.linear(x.float(), linear.weight.float(), linear.bias.float())
        by_row = fp8.Fp8Linear(linear)(x).float()
        error = ((by_row - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).tolist()
        assert max(error) < 0.05, error  # 3 mantissa bits: 2^-4 at most in each number
        assert min(error) > 1e-4, "nothing was rounded"

    def test_a_row_of_zeros_gives_the_bias(self):
        linear = torch.nn.Linear(32, 16).bfloat16()
        out = fp8.Fp8Linear(linear)(torch.zeros(4, 32).bfloat16())
        torch.testing.assert_close(out, linear.bias.detach().expand(4, 16))

    def test_errors_by_layer(self):
        torch.manual_seed(0)
        layers = {"a": torch.nn.Linear(32, 32), "b": torch.nn.Linear(32, 16, bias=False)}
        errors = fp8.layer_errors(layers, {name: torch.randn(5, 32) for name in layers})
        assert set(errors) == {"a", "b"} and all(0.001 < e < 0.06 for e in errors.values())

    def test_a_stream_in_float8_is_off_by_the_rounding_of_the_format(self):
        """First and last block keep their linears; the rest is off by the format's rounding."""
        geo = sizes(3, 1)
        network = dict(attention_head_dim=32, text_dim=32, freq_dim=32)
        plan = FastPlan(kernels=SDPA, fp8=True)
        torch.manual_seed(3)
        plain, fast = Student(build(**network)[0].bfloat16()), None
        fast = optimize_student(Student(build(**network)[0].bfloat16()), plan)
        kinds = [type(block.ffn.net[2]).__name__ for block in fast.model.blocks]
        assert kinds == ["Linear", "Fp8Linear", "Linear"]
        assert type(fast.model.blocks[1].attn1.to_qkv) is fp8.Fp8Linear
        assert type(fast.model.blocks[1].attn2.to_k) is torch.nn.Linear
        latents, _, _ = inputs(geo, 6)
        text = torch.randn(2, 5, 32)
        out = []
        for student in (plain, fast):
            cache = stream_cache(student.model, geo)
            with torch.no_grad():
                kv = student.model.text_kv(text)
                out.append([student.x0(latents[:, geo.chunk(k)], 500.0, kv, cache.begin(k), k * 2) for k in range(3)])
        for exact, rounded in zip(*out, strict=True):
            assert (rounded - exact).norm() / exact.norm() < 0.05
            assert not torch.equal(rounded, exact)

    @torch.no_grad()
    def test_keys_and_values_of_a_stream(self):
        """The plain way through a float8 cache rounds the same keys and values; queries only the fast one rounds."""
        geo = sizes(3, 1)
        exact, plain = (Student(build()[0].bfloat16()) for _ in range(2))
        plain.cache_dtype = E4M3
        fast = optimize_student(Student(build()[0].bfloat16()), FastPlan(kernels=SDPA, fp8_cache=True))
        assert fast.cache_dtype is E4M3
        clips = [torch.cat(play(student, geo, 6)) for student in (exact, plain, fast)]
        for rounded in clips[1:]:
            assert 1e-4 < (rounded - clips[0]).norm() / clips[0].norm() < 0.05
        assert (clips[2] - clips[1]).norm() < (clips[2] - clips[0]).norm()

    @torch.no_grad()
    def test_attention_alone_against_diffusers_network_with_rounded_queries_keys_and_values(self, monkeypatch):
        """Of a whole clip under the chunks' mask; all else in float32."""
        geo, (ours, theirs) = sizes(3, 1), build()
        fast = optimize_student(Student(ours), FastPlan(kernels=SDPA, fp8_cache=True))
        dtypes = set()

        def precise(kernel, *qkv):
            dtypes.add(tuple(part.dtype for part in qkv))
            return attend(kernel, *(part.float() for part in qkv))

        monkeypatch.setattr("model.fast.student.attend", precise)
        x, t, text = inputs(geo, 12)
        mask, original = chunk_causal_mask(geo, 12, "cpu"), transformer_wan.dispatch_attention_fn

        def rounded(q, k, v, **rest):
            if k.shape[1] == len(mask):  # self-attention
                q, k, v = (part.clamp(-448, 448).to(torch.float8_e4m3fn).float() for part in (q, k, v))
            return original(q, k, v, **rest)

        exact = masked_v(theirs, (x, t, text), geo, mask, monkeypatch)
        monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", rounded)
        wanted = masked_v(theirs, (x, t, text), geo, mask, monkeypatch)
        cache, kv = stream_cache(ours, geo, dtype=fast.cache_dtype), ours.text_kv(text)
        chunks = [geo.chunk(k) for k in range(geo.num_chunks(12))]
        x0 = [fast.x0(x[:, s], t[:, s.start], kv, cache.begin(k), s.start) for k, s in enumerate(chunks)]
        v = (x - torch.cat(x0, 1)) / (t / 1000)[:, :, None, None, None]
        off, rounding = (v - wanted).norm(), (wanted - exact).norm()
        assert 1e-3 < rounding / exact.norm() < 0.05 and off < 0.02 * rounding, (off, rounding, exact.norm())
        assert dtypes == {(E4M3,) * 3, (torch.float32,) * 3}

    def test_what_is_too_large_is_clamped(self):
        geo = sizes(3, 1)
        cache = stream_cache(build()[0], geo, dtype=E4M3)
        k = torch.full((2, geo.tokens_per_chunk, *cache._keys[0].shape[2:]), -1e4)
        keys, values = cache.begin(0).put(0, k, k / 1e4)
        assert keys.dtype is torch.float32 and keys.unique().item() == -448 and values.unique().item() == -1
        cache.shift_keys(0, 0, lambda keys, _: -10 * keys)
        assert cache._keys[0][:, : geo.tokens_per_chunk].float().unique().item() == 448

    def test_a_device_without_it_is_refused(self):
        cpu = torch.device("cpu")
        for name in ("fp8", "fp8_linears"):
            with pytest.raises(UserError, match=rf"^inference.precision={name} needs a GPU .*; use inference.pre"):
                FastPlan.from_config(InferenceConfig(precision=name), cpu)
        with pytest.raises(UserError, match=r"fp8_attention needs FlashAttention-3 .* by sdpa on device=cpu; use in"):
            FastPlan.from_config(InferenceConfig(precision="fp8_attention"), cpu)

    def test_which_parts_are_float8(self, monkeypatch):
        gpu, parts = torch.device("cuda", 0), {}
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
        for installed in (["sdpa", "cudnn"], ["sdpa", "cudnn", "fa3"]):
            monkeypatch.setattr("model.attention.machine.kernels", lambda installed=installed: installed)
            for name in ("auto", "fp8", "fp8_linears", "fp8_attention")[: 3 + ("fa3" in installed)]:
                plan = FastPlan.from_config(InferenceConfig(precision=name), gpu)
                parts.setdefault(name, []).append((plan.fp8, plan.fp8_cache))
        assert parts == {
            "auto": [(False, False)] * 2, "fp8": [(True, False), (True, True)], "fp8_linears": [(True, False)] * 2,
            "fp8_attention": [(False, True)],
        }  # fmt: skip
        with pytest.raises(UserError, match="by cudnn on device=cuda:0"):
            FastPlan.from_config(InferenceConfig(precision="fp8_attention", attention="cudnn"), gpu)


class TestKernels:
    def test_auto_goes_by_generation_and_kind(self):
        every = ["sdpa", "cudnn", "fa2", "fa3"]
        picked = {c: pick_kernels("auto", c, every) for c in (None, (7, 5), (8, 0), (8, 9), (9, 0), (10, 0))}
        pairs = {c: (k.self_attention, k.cross_attention) for c, k in picked.items()}
        assert pairs[None] == pairs[(7, 5)] == ("sdpa", "sdpa")
        assert pairs[(8, 0)] == pairs[(8, 9)] == ("flash", "flash")
        assert pairs[(9, 0)] == ("fa3", "cudnn")
        assert pairs[(10, 0)] == ("cudnn", "cudnn")
        assert pick_kernels("auto", (9, 0), ["sdpa", "cudnn"]).self_attention == "cudnn"
        assert "FlashAttention-3 is installed" in str(picked[(9, 0)])

    @pytest.mark.parametrize(
        "name, capability, words",
        [("fa3", (9, 0), "not installed"), ("fa2", (8, 0), "pip install flash-attn"), ("cudnn", None, "needs a GPU")],
    )
    def test_what_cannot_run_is_refused(self, name, capability, words):
        with pytest.raises(UserError, match=words):
            pick_kernels(name, capability, ["sdpa", "cudnn"])

    def test_flash_3_on_another_generation_is_refused(self):
        with pytest.raises(UserError, match="Hopper GPUs only"):
            pick_kernels("fa3", (8, 0), ["sdpa", "fa3"])

    def test_attention_is_softmax(self):
        q, k, v = (torch.randn(2, n, 3, 8, dtype=torch.float64) for n in (4, 6, 6))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(8**0.5).softmax(-1)
        torch.testing.assert_close(attend("sdpa", q, k, v), torch.einsum("bhqk,bkhd->bqhd", weights, v))


@pytest.mark.parametrize(
    "settings, words",
    [(dict(cuda_graphs="on"), "cuda_graphs=on needs a GPU"), (dict(attention="fa3"), "attention=fa3 needs a GPU")],
)
def test_what_a_cpu_cannot_do_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        FastPlan.from_config(InferenceConfig(**settings), torch.device("cpu"))


def test_auto_does_nothing_on_a_cpu():
    assert FastPlan.from_config(InferenceConfig(), torch.device("cpu")).is_noop
    assert NETWORK["num_layers"] == 3
