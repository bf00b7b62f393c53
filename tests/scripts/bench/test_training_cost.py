"""Operations of a distillation's phases, by formula, against those that torch counts in a real update."""

from contextlib import contextmanager

import pytest
import torch
from distill_case import distill_stage
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from configs.geometry import Geometry
from model.sizes import WAN_1_3B, WAN_14B, TransformerSize
from scripts.bench.cost import network_pass, text_keys
from scripts.bench.cycle import cost_of
from scripts.bench.training_cost import BACKWARD, CRITIC, ROLLOUT, SCORE, STUDENT, TEACHER
from trainer.distill import motion_head


@contextmanager
def counting():
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it knows no fused CPU kernel
        yield counter


def fused_attention(q, k, v, *args, **kwargs) -> int:
    """Operations of the CPU's fused kernel, given shapes; those of its backward pass are not counted."""
    return sdpa_flop_count(q, k, v)


FUSED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused_attention}


def counted(owner, method: str, totals: dict[str, int], name) -> None:
    """Add what each call of a method costs to `totals`."""
    inner = getattr(owner, method)

    def wrapped(*args, **kwargs):
        with counting() as counter:
            out = inner(*args, **kwargs)
        totals[name()] = totals.get(name(), 0) + counter.get_total_flops()
        return out

    setattr(owner, method, wrapped)


@pytest.mark.parametrize("context", ["inference", "release"])
@pytest.mark.parametrize(("step", "regression"), [(0, 0), (3, 0), (0, 1)])
def test_every_phase_of_an_update(tiny_assets, monkeypatch, context, step, regression):
    monkeypatch.setattr(motion_head, "HIDDEN", 1)  # its FLOPs are not counted
    motion = f"training.distill.motion_regression={{weight: {regression}}}"
    stage = distill_stage(tiny_assets, f"training.distill.rollout_context={context}", motion)
    seen: dict[str, int] = {}
    counted(stage.student, "x0", seen, lambda: STUDENT if torch.is_grad_enabled() else ROLLOUT)
    counted(stage.student.model, "text_kv", seen, lambda: STUDENT if torch.is_grad_enabled() else ROLLOUT)
    if stage.initial_student is not None:
        counted(stage.initial_student, "x0", seen, lambda: ROLLOUT)
        counted(stage.initial_student.model, "text_kv", seen, lambda: ROLLOUT)
    counted(stage.teacher, "v", seen, lambda: TEACHER)
    counted(stage.critic, "v", seen, lambda: CRITIC if torch.is_grad_enabled() else SCORE)
    cost = cost_of(stage)
    for who, price in (("generator", cost.generator), ("critic", cost.critic_update)):
        plan, batches = stage._batches(who, step)
        family = {"generator": stage.generator_backward, "critic": stage.critic_backward}[who]
        seen.clear()
        with counting() as counter:
            family.once(plan, 1.0, batches[0])
        expected = price(plan.exits)
        forward = sum(seen.values())
        assert seen == {name: flops for name, flops in expected.items() if name != BACKWARD}
        # inputs need no gradient, so the first layers' is not computed; at these sizes that is some percent
        assert counter.get_total_flops() - forward == pytest.approx(expected[BACKWARD], rel=0.04)


@pytest.mark.parametrize("who", ["generator", "critic"])
def test_checkpointing_computes_all_of_a_chunk_again_and_all_but_self_attention_of_a_clip(tiny_assets, who):
    stage = distill_stage(tiny_assets)
    again = distill_stage(tiny_assets, "training.checkpointing=true")
    flops, attention = [], []
    for one in (stage, again):
        plan, batches = one._batches(who, 0)
        family = {"generator": one.generator_backward, "critic": one.critic_backward}[who]
        with FlopCounterMode(display=False, custom_mapping=FUSED) as counter:
            family.once(plan, 1.0, batches[0])
        flops.append(counter.get_total_flops())
        attention.append(sum(counter.get_flop_counts()["Global"][kernel] for kernel in FUSED))
    cost = cost_of(stage)
    price, twice = cost.recomputed(who, plan.exits), cost._score(cost.critic, 1).text
    if who == "generator":  # the student's text keys are made outside of its blocks
        price -= text_keys(cost.student, cost.text_tokens, cost.batch).total
        twice = cost._rollout(plan.exits)[1].attention
    assert flops[1] - flops[0] == pytest.approx(price, rel=0.1)  # all but the ends and the text
    assert attention[1] - attention[0] == twice > 0


def test_a_pass_of_14b_costs_what_it_is_known_to():
    """One pass of the 14B teacher over a clip of 480x832: 0.78 PFLOP in linear layers, 0.88 between tokens."""
    tokens = 21 * Geometry(height=480, width=832).tokens_per_frame
    one = network_pass(WAN_14B, tokens=tokens, keys=tokens, text_tokens=512)
    assert one.linear == pytest.approx(0.78e15, rel=0.02) and one.attention == pytest.approx(0.89e15, rel=0.02)
    assert one.backward(frozen=False) == 2 * one.total > one.backward(frozen=True)
    small = network_pass(WAN_1_3B, tokens=tokens, keys=tokens, text_tokens=512)
    assert text_keys(WAN_1_3B, 512).total < 0.01 * small.total
    assert TransformerSize(dim=64, ffn=128, layers=2).parameters > 0
