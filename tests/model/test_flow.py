"""Rectified-flow algebra against hand-computed values, its own inverses and float64."""

import pytest
import torch

from model.flow import add_noise, shift_time, sigma, v_from_x0, v_target, x0_from_v


def sample(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 2, 3, 6, 4, 4, generator=g, dtype=torch.float64).to(dtype)
    return x0, eps


@pytest.mark.parametrize("t, warped", [(1000, 1000), (100, 357.142857), (550, 859.375), (750, 937.5), (500, 833.3333)])
def test_shift_has_the_values_of_the_family(t, warped):
    assert shift_time(float(t), 5.0) == pytest.approx(warped, abs=1e-4)
    assert shift_time(torch.tensor([float(t)]), 5.0).item() == pytest.approx(warped, abs=1e-4)


def test_shift_keeps_its_ends_and_one_is_identity():
    t = torch.linspace(0, 1000, 101)
    assert shift_time(t, 5.0)[0] == 0 and shift_time(t, 5.0)[-1] == 1000
    assert torch.allclose(shift_time(t, 1.0), t)
    assert (shift_time(t, 5.0).diff() > 0).all()


@pytest.mark.parametrize(
    "t", [torch.tensor([933.0629, 20.0]), torch.tensor([[1000.0, 357.14, 20.0], [5.0, 733.0, 250.0]])]
)
def test_each_sample_or_frame_has_its_own_level(t):
    x0, eps = sample()
    x_t = add_noise(x0, eps, t)
    for b in range(2):
        for f in range(3):
            s = (t[b] if t.ndim == 1 else t[b, f]).item() / 1000
            assert torch.allclose(x_t[b, f], (1 - s) * x0[b, f] + s * eps[b, f], atol=1e-6)


def test_v_and_x0_are_inverses():
    x0, eps = sample()
    t = torch.tensor([[1000.0, 357.14, 20.0], [5.0, 733.0, 250.0]])
    x_t, v = add_noise(x0, eps, t), v_target(x0, eps)
    assert torch.allclose(v, eps - x0)
    assert torch.allclose(x0_from_v(x_t, v, t), x0, atol=1e-6)
    assert torch.allclose(v_from_x0(x_t, x0, t), v, atol=1e-4)


def test_algebra_of_bfloat16_is_float32_inside():
    x0, eps = sample(torch.bfloat16)
    t = torch.tensor([933.0629, 357.142857])
    exact = x0_from_v(x0.double(), eps.double(), t.double())
    ours = x0_from_v(x0, eps, t)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, exact.to(torch.bfloat16))
    naive = x0 - (t / 1000).to(torch.bfloat16).view(2, 1, 1, 1, 1) * eps
    assert not torch.equal(naive, exact.to(torch.bfloat16))


def test_float64_stays_float64():
    x0, eps = sample(torch.float64)
    t = torch.tensor([933.0629, 357.142857], dtype=torch.float64)
    exact = (1 - t / 1000).view(2, 1, 1, 1, 1) * x0 + (t / 1000).view(2, 1, 1, 1, 1) * eps
    assert torch.allclose(add_noise(x0, eps, t), exact, atol=1e-14, rtol=0)


def test_timesteps_in_half_precision_are_refused():
    with pytest.raises(AssertionError, match="other timesteps"):
        sigma(torch.tensor([933.0], dtype=torch.bfloat16))


def test_misaligned_timesteps_are_refused():
    x0, eps = sample()
    with pytest.raises(AssertionError, match="t \\[3\\]"):
        add_noise(x0, eps, torch.tensor([1.0, 2.0, 3.0]))
