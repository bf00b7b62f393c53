"""Losses: gradients against finite differences, whom they reach, what happens to NaN, and the releases' variant."""

import pytest
import torch

from configs.distill_schema import HEADS, FlowLossConfig
from trainer.distill.flow_heads import LearnedHead, build_head
from trainer.distill.losses import critic_loss, dmd_loss, flow_matching_loss, frame_weighting, motion, regression_losses

SHAPE = (2, 5, 3, 4, 4)


def clips(count: int, dtype=torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    return [torch.randn(SHAPE, generator=g, dtype=dtype) for _ in range(count)]


def head_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    head = build_head(FlowLossConfig(head=name), SHAPE[2]).double()
    if name == "learned":
        torch.nn.init.normal_(head.net[-1].weight, std=0.1)  # else it is the identity
    return head.requires_grad_(False)


def gradient(loss_of, x):
    x = x.clone().requires_grad_()
    loss_of(x).backward()
    return x.grad


def frozen_target(loss_of_features, x, features, step=1e-6):
    """Finite differences of sum c (F(x) - target)^2 / 2 in single entries of x, the target held at its value."""
    g = torch.Generator().manual_seed(1)
    entries = [tuple(int(torch.randint(n, (), generator=g)) for n in SHAPE) for _ in range(12)]
    weight, target = loss_of_features
    out = []
    for entry in entries:
        values = []
        for sign in (1, -1):
            y = x.clone()
            y[entry] += sign * step
            values.append((0.5 * weight * (features(y) - target).square()).mean())
        out.append(((values[0] - values[1]) / (2 * step)).item())
    return entries, torch.tensor(out, dtype=torch.float64)


def test_dmd_gradient_is_that_of_finite_differences():
    x, r, f = clips(3)
    g = (f - r) / (x - r).abs().mean((1, 2, 3, 4), keepdim=True)
    entries, expected = frozen_target((1.0, x - g), x, lambda y: y)
    ours = gradient(lambda y: dmd_loss(y, r, f)[0], x)
    torch.testing.assert_close(torch.stack([ours[e] for e in entries]), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ours, g / x.numel())


@pytest.mark.parametrize("name", HEADS)
def test_flow_gradient_is_that_of_finite_differences(name):
    x, r, f = clips(3)
    head = head_of(name)

    def features(y):
        return head(y[:, 1:] - y[:, :-1])

    a, b, c = features(x), features(r), features(f)
    g = (c - b) / (a - b).abs().mean((1, 2, 3, 4), keepdim=True)
    error = (c - b).square().mean((2, 3, 4))
    w = frame_weighting(error).view(2, 4, 1, 1, 1)
    entries, expected = frozen_target((w, a - g), x, features)
    ours = gradient(lambda y: flow_matching_loss(y, r, f, head)[0], x)
    assert ours.abs().max() > 0
    torch.testing.assert_close(torch.stack([ours[e] for e in entries]), expected, rtol=1e-5, atol=1e-9)


def test_frame_weights_by_hand():
    weight = frame_weighting(torch.tensor([[1.0, 3.0, 0.0]]))
    growth = torch.tensor([1.0, 1.2, 1.44])
    expected = 0.7 * (1 + torch.tensor([0.25, 1.0, 1.0])) + 0.3 * growth / growth.mean()
    torch.testing.assert_close(weight[0], expected)
    assert frame_weighting(torch.zeros(1, 3)).isfinite().all()


@pytest.mark.parametrize("name", HEADS)
def test_nothing_but_the_sample_is_moved(name):
    x, r, f = (y.requires_grad_() for y in clips(3))
    head = head_of(name)
    total = dmd_loss(x, r, f)[0] + flow_matching_loss(x, r, f, head)[0]
    total.backward()
    assert x.grad.abs().max() > 0 and r.grad is None and f.grad is None


def test_the_releases_flow_loss_moves_nothing():
    x, r, f = clips(3)
    x.requires_grad_()
    loss, _ = flow_matching_loss(x, r, f, head_of("difference"), gradient_cut=True)
    with_graph, _ = flow_matching_loss(x, r, f, head_of("difference"))
    assert not loss.requires_grad and loss == with_graph and loss > 0


def test_loss_over_some_frames_moves_these_alone():
    x, r, f = clips(3)
    window = slice(2, 5)
    spatial = gradient(lambda y: dmd_loss(y, r, f, frames=window)[0], x)
    flow = gradient(lambda y: flow_matching_loss(y, r, f, head_of("difference"), frames=window)[0], x)
    for g in (spatial, flow):
        assert not g[:, :2].any() and g[:, 2:].abs().amin((0, 2, 3, 4)).min() >= 0 and g[:, 2:].any()
    whole = gradient(lambda y: dmd_loss(y, r, f)[0], x)
    torch.testing.assert_close(spatial[:, 2:], whole[:, 2:] * 5 / 3)


def test_agreement_is_no_nan_and_a_nan_is_not_hidden():
    x, r, _ = clips(3)
    assert dmd_loss(x, x, x)[0] == 0 and flow_matching_loss(x, x, x, head_of("conv"))[0] == 0
    bad = r.clone()
    bad[0, 0, 0, 0, 0] = float("nan")
    assert dmd_loss(x, bad, r)[0].isnan() and flow_matching_loss(x, bad, r, head_of("difference"))[0].isnan()
    assert not dmd_loss(x, x, r)[0].isfinite(), "a difference over no distance is infinite, and is shown"


def test_precision_is_at_least_float32():
    x, r, f = (y.bfloat16() for y in clips(3))
    assert dmd_loss(x, r, f)[0].dtype == torch.float32
    assert dmd_loss(*clips(3))[0].dtype == torch.float64


def test_descent_brings_the_sample_to_the_teacher():
    """With a critic that knows the sample (f = x), following the gradient moves x towards r, and its motion too."""
    for loss_of in (
        lambda x, r: dmd_loss(x, r, x.detach())[0],
        lambda x, r: flow_matching_loss(x, r, x.detach(), head_of("conv"))[0],
    ):
        x, r = clips(2)
        before = motion(x - r).square().mean()
        for _ in range(20):
            x = x - 10 * gradient(lambda y, loss_of=loss_of, r=r: loss_of(y, r), x)
        assert motion(x - r).square().mean() < 0.8 * before


def test_critic_loss_reaches_the_critic_only():
    v, x = clips(2)
    v.requires_grad_(), x.requires_grad_()
    loss, _ = critic_loss(v, x)
    loss.backward()
    torch.testing.assert_close(v.grad, 2 * (v - x).detach() / v.numel())
    assert x.grad is None


def test_regression_moves_the_sample_towards_the_pair():
    x, y = clips(2)
    for index in (0, 1):
        assert gradient(lambda z, i=index: regression_losses(z, y, head_of("difference"))[i], x).abs().max() > 0
    assert all(loss == 0 for loss in regression_losses(y, y, head_of("difference")))


def test_learned_head_starts_as_the_difference_and_learns():
    x, r, f = clips(3, torch.float32)
    torch.manual_seed(0)
    head = LearnedHead(SHAPE[2])
    assert torch.equal(head(motion(x)), motion(x))
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = head.loss(motion(f), motion(r))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
