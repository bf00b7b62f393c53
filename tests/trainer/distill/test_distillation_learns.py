"""Diagonal distillation against a teacher that is known exactly: the samples become the teacher's."""

import torch
from distill_case import distill_stage

from model.flow import sigma


class KnowsTheData:
    """Score of data in which every latent number is N(mean, deviation^2): its x0 is the posterior mean."""

    mean, deviation = 0.8, 0.5

    def x0(self, x_t, t, text):
        s, variance = sigma(t).view(-1, 1, 1, 1, 1), self.deviation**2
        gain = (1 - s) * variance / ((1 - s) ** 2 * variance + s**2)
        return self.mean + gain * (x_t - (1 - s) * self.mean)


def sampled(stage) -> torch.Tensor:
    plan = stage.planner.draw("generator", 10**6)
    batch = stage._draw("generator", 10**6, 0, plan)
    return stage._sample(plan, batch["text"], batch["noise"], None, grad=False)


def test_samples_become_the_teachers(tiny_assets):
    extra = ["training.steps=90", "training.global_batch=4", "training.micro_batch=4", "training.optimizer.lr=1e-3"]
    extra += ["training.distill.guidance=0", "training.distill.critic_optimizer.lr=3e-3"]
    stage = distill_stage(tiny_assets, *extra)
    stage.teacher = KnowsTheData()
    before = sampled(stage)
    for step in range(90):
        stage.update(step)
    after = sampled(stage)
    assert abs(before.mean() - 0.8) > 0.6 and abs(after.mean() - 0.8) < 0.15
    assert after.std() < before.std() - 0.1, "and so does their spread, from that of noise towards 0.5"
