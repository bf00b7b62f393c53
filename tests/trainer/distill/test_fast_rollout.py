"""Rollouts for the critic by the student's fast copy are those of the student, and follow it."""

import pytest
import torch
from distill_case import distill_config, distill_stage
from test_fast_wan import FakeRecorder

from configs.errors import UserError
from configs.load import load_config
from model.memory import distill_plan
from model.sizes import WAN_1_3B

FAST, PLAIN = (f"training.distill.fast_rollout={on}" for on in ("true", "false"))
LONG = (
    "training.distill.long.max_frames=18", "training.distill.long.switch_share=1", "stream.sink_frames=3",
)  # fmt: skip


def samples(stage, step: int) -> torch.Tensor:
    """What the critic learns from at a step."""
    plan, (batch,) = stage._batches("critic", step)
    names = {"text", "noise", "text_after", "image"}
    with torch.no_grad():
        return stage._sample(plan, grad=False, **{"text_after": None} | {n: x for n, x in batch.items() if n in names})


@pytest.mark.parametrize("overrides", [
    (), ("stream.context=clean",), ("training.distill.rollout_context=release",), ("training.image_start=1",), LONG,
], ids=["last_step", "clean", "release", "image", "recached"])  # fmt: skip
def test_they_are_the_students(tiny_assets, overrides):
    """In float32, of every exit; before an update of the student and after it."""
    plain, fast = (distill_stage(tiny_assets, *overrides, *more) for more in ((), (FAST,)))
    for stage in (plain, fast):
        stage._generator_step(0, 0)
    before = samples(fast, 1)
    for step in range(3):
        torch.testing.assert_close(samples(fast, step), samples(plain, step), rtol=0, atol=2e-5)
    plain._generator_step(3, 1)
    fast._generator_step(3, 1)
    after = samples(plain, 1)
    torch.testing.assert_close(samples(fast, 1), after, rtol=0, atol=2e-5)
    assert (after - before).abs().max() > 1e-3


def test_replayed_graphs_see_new_weights_and_texts(tiny_assets):
    """With what stands in for CUDA graphs: each is recorded once for all updates, and still they are the student's."""
    plain, fast = (distill_stage(tiny_assets, *more) for more in ((), (FAST,)))
    fast.fast_rollout.student.recorder = FakeRecorder
    graphs = []
    for step in range(3):
        for stage in (plain, fast):
            stage._generator_step(step, step)
        torch.testing.assert_close(samples(fast, step), samples(plain, step), rtol=0, atol=5e-5)
        graphs.append(fast.fast_rollout.student.graphs)
    assert graphs[0] > 0 and graphs[1] == graphs[2]


def test_autocast_is_for_the_student_alone(tiny_assets):
    """The twin computes in the type of its weights, within an update too, and the student has its autocast back."""
    stage = distill_stage(tiny_assets, FAST, "training.precision=bfloat16")
    step, seen = stage.fast_rollout.student.step, []

    def watched(*inputs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return step(*inputs)

    stage.fast_rollout.student.step = watched
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        samples(stage, 0)
        assert torch.is_autocast_enabled("cpu")
    assert seen and not any(seen)
    assert stage.fast_rollout.student.model.blocks[0].attn1.to_qkv.weight.dtype == torch.bfloat16


def test_the_twin_has_no_gradient_and_no_other_weights(tiny_assets):
    stage = distill_stage(tiny_assets, FAST)
    samples(stage, 0)
    trained = {id(p) for train_state in stage.train_states.values() for p in train_state.parameters}
    replica = list(stage.fast_rollout.student.model.parameters())
    assert not any(p.requires_grad or id(p) in trained for p in replica)
    assert sum(p.numel() for p in replica) == sum(p.numel() for p in stage.student.model.parameters())


def test_what_it_takes_is_planned():
    """Weights in bfloat16, a window of keys and values, and activations of a chunk, which graphs hold."""
    file = "configs/train_wan2.1_t2v_1.3b.yaml"
    plain, fast = (distill_plan(load_config(file, more), gpus=8) for more in ([PLAIN], [FAST]))
    activations, text = 4680 * 2 * (2 * 8960 + 5 * 1536), 4 * 30 * 512 * 1536
    expected = WAN_1_3B.inference_bytes + 4 * 30 * 12 * 1560 * 1536 + activations + 2 * text
    assert fast.peak.parts["fast student"] == expected
    assert fast.peak.total > plain.peak.total + fast.peak.parts["fast student"]


@pytest.mark.parametrize("setting", ["training.distill.lora.student_rank=4", "training.cuda_graphs=true"])
def test_what_it_does_not_go_with(tiny_assets, setting):
    with pytest.raises(UserError, match="fast_rollout=true .*; set fast_rollout=false or"):
        distill_config(tiny_assets, FAST, setting)
