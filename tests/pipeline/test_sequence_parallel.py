"""One stream on several ranks: latents are those of one, whatever the session does, and no rank outlives another.

With DRILLS_GPUS=2 ranks have a GPU each, and steps are CUDA graphs.
"""

import copy
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import network_config
from test_inference_cli import start

from configs.errors import UserError
from configs.geometry import Geometry
from configs.load import load_config
from configs.schema import ScheduleConfig, StreamConfig
from model.attention import Kernels
from model.causal_wan import CausalWanModel
from model.codec import WanCodec
from model.denoiser import Student
from model.fast.student import FastPlan, FastStudent, optimize_student
from model.memory import inference_plan
from model.schedule import Schedule
from model.sequence import SequenceGroup
from pipeline.plan import make_plan
from pipeline.preflight import Report, _sharing
from pipeline.sequence_parallel import ParallelStudent, SequenceRanks, rank_devices
from pipeline.stream import StreamSession
from server.adapters import _student
from utils.distributed import Ranks

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
GPUS = int(os.environ.get("DRILLS_GPUS", "0"))
DEVICE = torch.device("cuda", 0) if GPUS else CPU
CLOSE = dict(atol=1e-4 if GPUS else 1e-5, rtol=0)
FAST = FastPlan(kernels=Kernels("sdpa", "sdpa", "test"), fused_norms=True, cuda_graphs=GPUS > 0)
GEOMETRY = Geometry(height=32, width=64, chunk_frames=3, window_frames=9, position_frames=12)  # 24 tokens a chunk
PROMPTS = ["a red circle moves right", "a blue square moves up"]
THIRD = "a green triangle moves down slowly"


def network() -> CausalWanModel:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "ffn_dim": 128, "num_attention_heads": 4, "attention_head_dim": 24}
    model = CausalWanModel.from_config(network_config("tiny_transformer") | sizes).eval().requires_grad_(False)
    model.proj_out.weight.mul_(4)
    return model.to(DEVICE)


CASES = [(GPUS, FAST)] if GPUS else [(2, None), (4, FAST)]


@pytest.fixture(
    scope="module", params=CASES, ids=lambda case: f"{case[0]} ranks{', fast step' * (case[1] is not None)}"
)
def students(request) -> Iterator[tuple[Student, ParallelStudent]]:
    """One rank's student and that of several, of the same weights; one group of processes for all tests."""
    size, plan = request.param
    alone, shared = network(), network()
    ranks = SequenceRanks(shared, rank_devices(DEVICE, size), plan, None)
    pair = [Student(model) if plan is None else optimize_student(Student(model), plan) for model in (alone, shared)]
    parallel = ParallelStudent(pair[1], ranks)
    yield pair[0], parallel
    parallel.close()


@pytest.fixture
def sessions(students, tiny_vae, tiny_text_encoder):
    """A session of each."""

    vae, text_encoder = (copy.deepcopy(part).to(DEVICE) for part in (tiny_vae, tiny_text_encoder))

    def both(geometry: Geometry = GEOMETRY, **stream) -> list[StreamSession]:
        schedule = Schedule.from_config(ScheduleConfig(steps="32"), StreamConfig(**stream))
        return [StreamSession(s, WanCodec(vae), text_encoder, schedule, geometry) for s in students]

    return both


def alike(ours, theirs) -> None:
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.wait().latents, b.wait().latents, **CLOSE)


@pytest.mark.parametrize("context", ["last_step", "clean", "renoise"])
def test_a_stream_over_the_window_and_with_a_moving_sink(sessions, context):
    one, several = sessions(context=context, context_timestep=200.0)
    alike(several.play(PROMPTS, [3, 4], 7), one.play(PROMPTS, [3, 4], 7))
    assert several.cache_bytes == one.cache_bytes
    assert several._cache.own._keys[0].shape[2] * several.student.ranks.size == one._cache._keys[0].shape[2]


@pytest.mark.parametrize("switch", ["recache", "recache_window", "blend", "cut"])
def test_a_new_prompt(sessions, switch):
    one, several = sessions()
    made = []
    for session in (one, several):
        playing = session.play(PROMPTS, [3, 4], 7)
        made.append(list(islice(playing, 4)))
        session.set_prompt([None, THIRD], switch)
        made[-1] += playing
    alike(*made)


def test_a_start_shares_out_frames_of_several_timesteps(sessions):
    """A rank's tokens are a frame and a half, or less."""
    start = torch.randn(GEOMETRY.latent_shape(1, 4), generator=torch.Generator().manual_seed(5))
    one, several = sessions()
    alike(several.play(PROMPTS, [3, 4], 4, start), one.play(PROMPTS, [3, 4], 4, start))


def test_a_window_without_bound_grows(sessions):
    one, several = sessions(replace(GEOMETRY, window_frames=0, sink_frames=0))
    alike(islice(several.play(PROMPTS[0]), 10), islice(one.play(PROMPTS[0]), 10))


def test_snapshots_cancelling_and_sessions_side_by_side(sessions):
    (one, several), (_, other) = sessions(), sessions()
    playing = several.play(PROMPTS, [3, 4])
    begun = list(islice(playing, 4))
    here = several.snapshot("cpu")
    first = list(islice(playing, 3))
    alike(begun + first, islice(one.play(PROMPTS, [3, 4]), 7))
    several.cancel()
    assert next(playing, None) is None
    for session in (several, other, several):
        session.restore(here)
        again = list(session.resume(3))
        assert all(torch.equal(a.latents, b.latents) for a, b in zip(again, first, strict=True))
    with pytest.raises(UserError, match="taken by another pipeline"):
        list(one.play(PROMPTS, [3, 4], 1))
        several.restore(one.snapshot())


def test_what_is_gone_here_is_forgotten_there(sessions):
    _, several = sessions()
    list(several.play(PROMPTS[0], 0, 1))
    ranks = several.student.ranks
    snapshot = several.snapshot()
    del snapshot
    assert len(ranks._dropped) > 0
    list(several.play(PROMPTS[0], 0, 1))
    assert len(ranks._dropped) < 3


def test_a_rank_that_dies_ends_the_stream_and_the_others(sessions):
    """The last test of a group, which it ends."""
    _, several = sessions()
    playing, ranks = several.play(PROMPTS[0]), several.student.ranks
    next(playing)
    ranks._processes[-1].kill()
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"rank {ranks.size - 1} of the {ranks.size} .* has ended \(SIGKILL\)"):
        for _ in range(1000):
            next(playing).wait()
    assert time.monotonic() - began < 100, "long before an exchange gives up"
    with pytest.raises(UserError, match="has ended"):
        next(several.play(PROMPTS[0]))
    own = several.student.own
    assert not (isinstance(own, FastStudent) and own.graphs), "NCCL would wait for them in the end"
    for process in ranks._processes:
        process.wait(100)


def test_ctrl_c_ends_an_endless_video_and_all_ranks(tiny_assets, tmp_path):
    video = tmp_path / "long.mp4"
    # torch's compiler has child processes of its own
    places = ["device=cuda", "inference.compile=off"] if GPUS else []
    process = start(
        tiny_assets, "--prompt", PROMPTS[0], "--num_output_frames", "0", "--output", str(video),
        "inference.sequence_parallel=2", *places,
    )  # fmt: skip
    grown, deadline = tmp_path / "long.partial.mp4", time.monotonic() + 300
    while not (grown.exists() and grown.stat().st_size > 20_000):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)
    (rank,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert video.exists() and not Path(f"/proc/{rank}").exists()


def test_what_cannot_be_shared_out_is_refused(tiny_assets, monkeypatch):
    config = load_config(tiny_assets / "tiny.yaml", ["inference.sequence_parallel=4"])
    with pytest.raises(UserError, match=r"inference.sequence_parallel=4 does not divide the 18 tokens of a chunk of 3"):
        make_plan(config)
    with pytest.raises(UserError, match=r"sequence_parallel=3 does not divide the 4 attention heads of the student"):
        SequenceRanks(network(), [CPU] * 3, None, None)
    report = Report()
    for degree, gpus in ((4, 8), (3, 2), (3, 0)):
        inference = replace(config.inference, sequence_parallel=degree)
        _sharing(report, replace(config, inference=inference), gpus)
    assert "does not divide the 18 tokens" in report.problems[0]
    assert "=3 needs as many GPUs and there are 2" in report.problems[1] and len(report.problems) == 2
    assert report.lines[-1] == ("one stream", "its tokens are shared by 3 GPUs")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match=r"=2 needs the GPUs 3 to 4 and 4 are visible"):
        rank_devices(torch.device("cuda", 3), 2)
    assert rank_devices(torch.device("cuda", 2), 2) == [torch.device("cuda", 2), torch.device("cuda", 3)]
    with pytest.raises(UserError, match="needs adapters that are merged"):
        load_config(
            tiny_assets / "tiny.yaml", ["inference.sequence_parallel=2", "model.lora=[x]", "model.lora_merge=false"]
        )
    with pytest.raises(UserError, match="inference.sequence_parallel=2 needs the student on the GPU"):
        load_config(tiny_assets / "tiny.yaml", ["inference.sequence_parallel=2", "inference.student=stream"])
    two = load_config(tiny_assets / "tiny.yaml", ["inference.sequence_parallel=2"])
    with pytest.raises(UserError, match="--lora needs one GPU"):
        _student(two, "x", CPU, torch.float32)
    with pytest.raises(UserError, match="inference.sequence_parallel=2 does not divide 3 ranks"):
        Ranks(0, 3, 0).groups(2, "inference.sequence_parallel")
    assert Ranks(6, 8, 2).groups(2, "x") == Ranks(3, 4, 1)


def test_the_memory_plan_shares_keys_and_tokens(tiny_assets):
    one, two = (
        {phase.name: phase.parts for phase in inference_plan(load_config(tiny_assets / "tiny.yaml", settings)).phases}
        for settings in ([], ["inference.sequence_parallel=2"])
    )
    assert two["denoise"]["KV cache"] == one["denoise"]["KV cache"] / 2
    assert one["denoise"]["activations"] / 2 < two["denoise"]["activations"] < one["denoise"]["activations"]
    assert two["denoise"]["student"] == one["denoise"]["student"] and two["decode"].keys() == one["decode"].keys()


class Recorded(SequenceGroup):
    """Sends nothing: what it would send comes back."""

    def _swap(self, sent):
        return sent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_numbers_of_any_type_are_sent_as_they_are(dtype):
    group = Recorded()
    group.size = 2
    q, k, v = (torch.randn(3, 5, 4, 8).to(dtype) for _ in range(3))
    slots = [torch.zeros(3, 30, 2, 8).to(dtype)[:, 10:20] for _ in range(2)]
    for got, x in zip((group.heads_into(q, k, v, *slots), *slots), (q, k, v), strict=True):
        assert torch.equal(got.float(), torch.cat(x.float().chunk(2, dim=2), dim=1))
    back = group.tokens_from(slots[0])
    assert torch.equal(back.float(), k.float())
