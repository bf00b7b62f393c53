"""Distillation for videos that begin with an image: what is drawn, whom the gradient reaches, what the card says."""

import json

import pytest
import torch
from distill_case import distill_config, distill_stage

from configs.errors import UserError
from model.cache import GraphCache
from pipeline.rollout import PrecomputedNoise, rollout


def test_a_share_of_the_rollouts_begins_with_the_students_own_first_frame(tiny_assets):
    stage = distill_stage(tiny_assets, "training.image_start=0.5")
    drawn = [stage.planner.draw("generator", step) for step in range(200)]
    assert 0.4 < sum(plan.image for plan in drawn) / 200 < 0.6
    assert {hash(plan) for plan in drawn if plan.image}.isdisjoint(hash(plan) for plan in drawn if not plan.image)
    never = distill_stage(tiny_assets).planner
    assert [plan._replace(image=False) for plan in drawn] == [never.draw("generator", step) for step in range(200)]

    plan = drawn[0]._replace(image=True)
    batch = stage._draw("generator", 0, 0, plan)
    assert torch.equal(batch["image"], stage._draw("generator", 0, 0, plan)["image"])
    plain = stage._draw("generator", 0, 0, plan._replace(image=False))
    assert all(torch.equal(plain[name], batch[name]) for name in plain) and "image" not in plain
    assert batch["image"].std() > 0.1 and not torch.equal(*batch["image"].unbind(0))


def test_the_given_frame_is_no_work_of_the_student_and_the_rest_is(tiny_assets):
    """x begins with it; it takes no gradient, and every other frame's gradient reaches the student."""
    stage = distill_stage(tiny_assets, "training.image_start=1")
    plan = stage.planner.draw("generator", 0)
    batch = stage._draw("generator", 0, 0, plan)
    x = stage._sample(plan, batch["text"], batch["noise"], None, grad=True, image=batch["image"])
    assert torch.equal(x[:, :1], batch["image"])
    cache = GraphCache(stage.geometry, 2)
    noise = PrecomputedNoise(batch["noise"], stage.schedule)
    naive = rollout(
        stage.student, stage.schedule, noise, lambda _: batch["text"], cache=cache, exits=plan.exits, grad=False,
        conditioning=batch["image"],
    )  # fmt: skip
    torch.testing.assert_close(x.detach(), naive, atol=1e-5, rtol=0)
    (by_frame,) = torch.autograd.grad(x[:, 1:3].sum(), [stage.student.model.proj_out.weight], retain_graph=True)
    assert by_frame.abs().max() > 0
    (none,) = torch.autograd.grad(x[:, :1].sum(), [stage.student.model.proj_out.weight], allow_unused=True)
    assert none is None or not none.any()
    assert plan.image


def test_a_step_trains_and_the_card_says_so(tiny_assets, tmp_path):
    for share, said in ((1, True), (0, False)):
        stage = distill_stage(tiny_assets, f"training.image_start={share}")
        before = [p.detach().clone() for p in stage.student.model.parameters()]
        logs = stage.update(0)
        assert all(torch.isfinite(value).all() for value in logs.values())
        assert any(not torch.equal(a, b) for a, b in zip(before, stage.student.model.parameters(), strict=True))
        stage.export(tmp_path / str(share), 1)
        card = json.loads((tmp_path / str(share) / "card.json").read_text())
        assert card["trained_image_start"] is said and card["size"] == [32, 48]


SHARES = [["training.image_start=1.5"], ["training.image_start=0.5", "training.stage=codec"]]


@pytest.mark.parametrize("settings", SHARES)
def test_a_share_that_cannot_be_is_refused(tiny_assets, settings):
    with pytest.raises(UserError, match="training.image_start="):
        distill_config(tiny_assets, *settings)
