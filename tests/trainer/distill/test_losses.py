"""Losses: values against loops written from the formulas alone, gradients against finite differences, whom they reach,
what happens to NaN, and the variants of diagdistill's commits."""

import math

import pytest
import torch

from configs.distill_schema import DistillConfig, FlowLossConfig, MotionRegressionConfig
from trainer.distill.losses import (
    GeneratorInputs,
    critic_loss,
    dmd_loss,
    flow_matching_loss,
    frame_weighting,
    generator_terms,
    motion,
    motion_regression_loss,
    regression_losses,
    term_settings,
)
from trainer.distill.motion_head import MotionHead

SHAPE = (2, 5, 3, 4, 4)


def clips(count: int, dtype=torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    return [torch.randn(SHAPE, generator=g, dtype=dtype) for _ in range(count)]


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


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("frame_error", ["motion", "release"])
def test_flow_gradient_is_that_of_finite_differences(half, frame_error):
    x, r, f = clips(3)
    a, b, c = motion(x), motion(r), motion(f)
    g = (c - b) / (a - b).abs().mean((1, 2, 3, 4), keepdim=True)
    error = {"motion": c - b, "release": g - x[:, 1:]}[frame_error].square().mean((2, 3, 4))
    w = frame_weighting(error).view(2, 4, 1, 1, 1) * (1 if half else 2)
    entries, expected = frozen_target((w, a - g), x, motion)
    options = {"half": half, "frame_error": frame_error}
    ours = gradient(lambda y: flow_matching_loss(y, r, f, **options)[0], x)
    assert ours.abs().max() > 0
    torch.testing.assert_close(torch.stack([ours[e] for e in entries]), expected, rtol=1e-5, atol=1e-9)


# --- references: Python loops over single numbers ---------------------------------------------------------------------

WHERE = [tuple(i) for i in torch.cartesian_prod(*map(torch.arange, SHAPE)).tolist()]
MOVES = [i for i in WHERE if i[1] > 0]  # of a difference to the frame before


def difference(x, i):
    return float(x[i]) - float(x[(i[0], i[1] - 1, *i[2:])])


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def reference_gradient(x, r, f, at, where):
    """(f - r) / mean |x - r| of `at(y, i)` for each i."""
    scale = [mean(abs(at(x, i) - at(r, i)) for i in where if i[0] == b) for b in range(SHAPE[0])]
    return {i: (at(f, i) - at(r, i)) / scale[i[0]] for i in where}


def reference_dmd(x, r, f):
    g = reference_gradient(x, r, f, lambda y, i: float(y[i]), WHERE)
    return mean(g[i] ** 2 for i in WHERE) / 2


def reference_flow(x, r, f, half, frame_error):
    g = reference_gradient(x, r, f, difference, MOVES)
    total = []
    for b in range(SHAPE[0]):
        frames = range(1, SHAPE[1])
        of = {"motion": lambda i: difference(f, i) - difference(r, i), "release": lambda i: g[i] - float(x[i])}
        error = [mean(of[frame_error](i) ** 2 for i in MOVES if i[:2] == (b, n)) for n in frames]
        growth = [1.2 ** (n - 1) for n in frames]
        for n in frames:
            weight = 0.7 * (1 + sum(error[:n]) / sum(error)) + 0.3 * growth[n - 1] / mean(growth)
            total += [weight * g[i] ** 2 for i in MOVES if i[:2] == (b, n)]
    return mean(total) * (0.5 if half else 1.0)


def reference_head(head, x, i):
    """One feature of the head at one latent pixel: two matrices with x / (1 + exp(-x)) between them."""
    first, _, second = head.net
    pixel = [difference(x, (*i[:2], c, *i[3:])) for c in range(SHAPE[2])]
    hidden = []
    for row, bias in zip(first.weight.flatten(1).tolist(), first.bias.tolist(), strict=True):
        value = sum(w * v for w, v in zip(row, pixel, strict=True)) + bias
        hidden.append(value / (1 + math.exp(-value)))
    row, bias = second.weight.flatten(1)[i[2]].tolist(), second.bias[i[2]].item()
    return sum(w * h for w, h in zip(row, hidden, strict=True)) + bias


def heads() -> list[MotionHead]:
    torch.manual_seed(0)
    return [MotionHead(SHAPE[2]).double() for _ in range(2)]


def test_values_are_those_of_the_formulas():
    x, r, f = clips(3)
    assert dmd_loss(x, r, f)[0].item() == pytest.approx(reference_dmd(x, r, f), rel=1e-12)
    for half in (True, False):
        for error in ("motion", "release"):
            ours = flow_matching_loss(x, r, f, half=half, frame_error=error)[0].item()
            assert ours == pytest.approx(reference_flow(x, r, f, half, error), rel=1e-12)
    head, average = heads()
    expected = mean((reference_head(head, x, i) - reference_head(average, r, i)) ** 2 for i in MOVES)
    assert motion_regression_loss(x, r, head, average).item() == pytest.approx(expected, rel=1e-12)
    space, flow = regression_losses(x, r)
    assert space.item() == pytest.approx(mean((float(x[i]) - float(r[i])) ** 2 for i in WHERE), rel=1e-12)
    expected = mean((difference(x, i) - difference(r, i)) ** 2 for i in MOVES)
    assert flow.item() == pytest.approx(expected, rel=1e-12)
    assert critic_loss(x, r).item() == pytest.approx(space.item(), rel=1e-12)


def test_motion_regression_against_finite_differences_of_sample_and_head():
    x, y = clips(2)
    head, average = heads()
    x.requires_grad_(), y.requires_grad_()
    loss = motion_regression_loss(x, y, head, average)
    loss.backward()
    assert y.grad is None and all(p.grad is None for p in average.parameters())
    g = torch.Generator().manual_seed(1)
    for p in (x, *head.parameters()):
        for _ in range(4):
            entry = tuple(int(torch.randint(n, (), generator=g)) for n in p.shape)
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    p[entry] += sign * 1e-6
                    values.append(motion_regression_loss(x, y, head, average).item())
                    p[entry] -= sign * 1e-6
            assert p.grad[entry].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-9)


def test_the_released_head():
    """Two layers, 64 hidden channels, kernel 1, 16 channels in and out."""
    shapes = {name: tuple(p.shape) for name, p in MotionHead(16).named_parameters()}
    assert shapes == {
        "net.0.weight": (64, 16, 1, 1), "net.0.bias": (64,), "net.2.weight": (16, 64, 1, 1), "net.2.bias": (16,),
    }  # fmt: skip


def test_nothing_but_the_sample_is_moved():
    x, r, f = (y.requires_grad_() for y in clips(3))
    total = dmd_loss(x, r, f)[0] + flow_matching_loss(x, r, f)[0]
    total.backward()
    assert x.grad.abs().max() > 0 and r.grad is None and f.grad is None


def test_the_flow_loss_of_the_older_commits_moves_nothing():
    x, r, f = clips(3)
    x.requires_grad_()
    loss, _ = flow_matching_loss(x, r, f, gradient_cut=True)
    with_graph, _ = flow_matching_loss(x, r, f)
    assert not loss.requires_grad and loss == with_graph and loss > 0


def test_loss_over_some_frames_moves_these_alone():
    x, r, f = clips(3)
    window = slice(2, 5)
    spatial = gradient(lambda y: dmd_loss(y, r, f, frames=window)[0], x)
    flow = gradient(lambda y: flow_matching_loss(y, r, f, frames=window)[0], x)
    for g in (spatial, flow):
        assert not g[:, :2].any() and g[:, 2:].abs().amin((0, 2, 3, 4)).min() >= 0 and g[:, 2:].any()
    whole = gradient(lambda y: dmd_loss(y, r, f)[0], x)
    torch.testing.assert_close(spatial[:, 2:], whole[:, 2:] * 5 / 3)


    head, average = heads()
    regression = gradient(lambda y: motion_regression_loss(y, r, head, average, frames=window), x)
    assert not regression[:, :2].any() and regression[:, 2:].any()


def test_agreement_is_no_nan_and_a_nan_is_not_hidden():
    x, r, _ = clips(3)
    assert dmd_loss(x, x, x)[0] == 0 and flow_matching_loss(x, x, x)[0] == 0
    bad = r.clone()
    bad[0, 0, 0, 0, 0] = float("nan")
    assert dmd_loss(x, bad, r)[0].isnan() and flow_matching_loss(x, bad, r)[0].isnan()
    assert not dmd_loss(x, x, r)[0].isfinite(), "a difference over no distance is infinite, and is shown"


def test_precision_is_at_least_float32():
    x, r, f = (y.bfloat16() for y in clips(3))
    assert dmd_loss(x, r, f)[0].dtype == torch.float32
    assert dmd_loss(*clips(3))[0].dtype == torch.float64


def test_descent_brings_the_sample_to_the_teacher():
    """With a critic that knows the sample (f = x), following the gradient moves x towards r, and its motion too."""
    for loss_of in (
        lambda x, r: dmd_loss(x, r, x.detach())[0],
        lambda x, r: flow_matching_loss(x, r, x.detach())[0],
    ):
        x, r = clips(2)
        before = motion(x - r).square().mean()
        for _ in range(20):
            x = x - 10 * gradient(lambda y, loss_of=loss_of, r=r: loss_of(y, r), x)
        assert motion(x - r).square().mean() < 0.8 * before


def test_critic_loss_reaches_the_critic_only():
    v, x = clips(2)
    v.requires_grad_(), x.requires_grad_()
    loss = critic_loss(v, x)
    loss.backward()
    torch.testing.assert_close(v.grad, 2 * (v - x).detach() / v.numel())
    assert x.grad is None


def test_regression_moves_the_sample_towards_the_pair():
    x, y = clips(2)
    for index in (0, 1):
        assert gradient(lambda z, i=index: regression_losses(z, y)[i], x).abs().max() > 0
    assert all(loss == 0 for loss in regression_losses(y, y))


def test_terms_have_their_weights_and_each_is_named_with_its_setting():
    """A term whose weight is 0 or whose input is missing is left out; the rest are the losses times their weights."""
    x, r, f, y, start = clips(5)
    whole = GeneratorInputs(x=x, real=r, fake=f, target=y, initial=start, head=lambda m: m, head_average=lambda m: m)
    d = DistillConfig(
        spatial_weight=2.0, gamma=3.0, flow=FlowLossConfig(weight=5.0), regression_weight=7.0,
        motion_regression=MotionRegressionConfig(weight=11.0),
    )  # fmt: skip
    terms, log = generator_terms(whole, d)
    assert terms.keys() == term_settings(d).keys() and log.keys() == {"dmd_gradient", "flow_gradient"}
    space, moved = regression_losses(x, y)
    assert terms["spatial"] == 2 * dmd_loss(x, r, f)[0]
    assert terms["flow"] == 15 * flow_matching_loss(x, r, f)[0]
    assert (terms["regression"], terms["regression_flow"]) == (7 * space, 21 * moved)
    torch.testing.assert_close(terms["motion_regression"], 33 * (motion(x) - motion(start)).square().mean())
    bare = GeneratorInputs(x=x, real=r, fake=f)
    assert generator_terms(bare, DistillConfig(gamma=0.0))[0].keys() == {"spatial"}
    assert generator_terms(bare, DistillConfig(spatial_weight=0.0))[0].keys() == {"flow"}
