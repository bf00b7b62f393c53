"""The losses of diagonal distillation, as pure functions.

    x   the student's latents [B, F, C, H, W]; the only argument with a gradient, if any has one
    r   the teacher's guided x0 of a noised copy of x;  f  the critic's x0 of it;  both of x's shape, constants
    sg  stop-gradient

Everything is computed in float32, or in float64 if an input is. NaN and infinity are kept, so that a broken run shows;
only 0 / 0, where student, teacher and critic agree exactly, is 0.
A loss is a scalar; functions with something to plot return (loss, log), the log of detached scalars. `generator_terms`
is their weighted sum, term by term: a new loss is a function and two lines there, and its weight in
configs/distill_schema.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.distill_schema import DistillConfig

Log = dict[str, Tensor]
Head = Callable[[Tensor], Tensor]  # motion [B, N, C, H, W] -> features [B, N, C', H', W']


@dataclass(frozen=True, kw_only=True)
class GeneratorInputs:
    """What the generator's loss is computed from. Latents are [B, F, C, H, W], constant but for x."""

    x: Tensor  # of the student, with a graph
    real: Tensor  # x0 of the teacher
    fake: Tensor  # x0 of the critic
    frames: slice | None = None  # that the loss counts; None = all
    target: Tensor | None = None  # of the teacher's pair that x was made from the noise of
    initial: Tensor | None = None  # of the student that training started from, from the same noise
    head: Head | None = None  # of the motion regression
    head_average: Head | None = None  # its EMA


def generator_terms(s: GeneratorInputs, d: DistillConfig) -> tuple[dict[str, Tensor], Log]:
    """The terms of the generator's loss by name, each times its weight, and what is logged.

        lambda_spatial L + L_reg + gamma (lambda_flow L_F + L_reg^F + lambda_M L_M)

    A term whose weight is 0, or whose input is missing, is left out. The gradient reaches x and the head.
    """
    terms, logs = {}, {}
    if d.spatial_weight:
        loss, logs = dmd_loss(s.x, s.real, s.fake, frames=s.frames)
        terms["spatial"] = d.spatial_weight * loss
    if d.gamma * d.flow.weight:
        f = d.flow
        loss, seen = flow_matching_loss(
            s.x, s.real, s.fake, half=f.half, frame_error=f.frame_error, gradient_cut=f.gradient_cut, frames=s.frames,
        )  # fmt: skip
        terms["flow"], logs = d.gamma * f.weight * loss, logs | seen
    if s.target is not None and d.regression_weight:
        space, flow = regression_losses(s.x, s.target)
        terms["regression"] = d.regression_weight * space
        if d.gamma:
            terms["regression_flow"] = d.gamma * d.regression_weight * flow
    if s.initial is not None:
        loss = motion_regression_loss(s.x, s.initial, s.head, s.head_average, frames=s.frames)
        terms["motion_regression"] = d.gamma * d.motion_regression.weight * loss
    return terms, logs


def term_settings(d: DistillConfig) -> dict[str, str]:
    """The setting that switches each term on, for error messages; empty for a term whose gradient is cut."""
    return {
        "spatial": f"training.distill.spatial_weight={d.spatial_weight}",
        "flow": "" if d.flow.gradient_cut else f"training.distill.flow.weight={d.flow.weight}",
        "regression": f"training.distill.pairs={d.pairs}",
        "regression_flow": f"training.distill.pairs={d.pairs}",
        "motion_regression": f"training.distill.motion_regression.weight={d.motion_regression.weight}",
    }


def dmd_loss(x: Tensor, real_x0: Tensor, fake_x0: Tensor, *, frames: slice | None = None) -> tuple[Tensor, Log]:
    """Distribution matching as a regression (DMD, arXiv 2311.18828, eq. 7 and 8).

        g = (f - r) / mean|x - r|           the mean over all but the batch
        L = 1/2 mean (x - sg(x - g))^2      so that dL/dx = g / numel

    frames: latent frames of the outer mean; None = all. The gradient reaches x in these frames only.
    """
    x, r, f = _precise(x, real_x0, fake_x0)
    g = _normalised(f - r, x - r)
    log = {"dmd_gradient": g.detach().abs().mean()}
    if frames is not None:
        x, g = x[:, frames], g[:, frames]
    return 0.5 * (x - (x - g).detach()).square().mean(), log


def flow_matching_loss(
    x: Tensor,
    real_x0: Tensor,
    fake_x0: Tensor,
    *,
    half: bool = True,
    frame_error: str = "motion",
    gradient_cut: bool = False,
    frames: slice | None = None,
) -> tuple[Tensor, Log]:
    """Flow distribution matching (Diagonal Distillation, arXiv 2603.09488): the same regression, of motion.

        F(y)  = y[:, 1:] - y[:, :-1]
        g_F   = (F(f) - F(r)) / mean|F(x) - F(r)|
        L_F   = 1/2 mean_i w_i (F(x)_i - sg(F(x)_i - g_F,i))^2      so that dL_F/dF(x)_i = w_i g_F,i / numel

    i runs over the differences between neighbouring latent frames; w as in `frame_weighting`. The gradient reaches
    x through F(x).

    half: with the factor 1/2, which diagdistill's flow loss lacks in commit 24ef1c9 (its spatial loss has it).
    frame_error: the error that w depends on. motion: (F(f) - F(r))^2, the error of motion. release:
        (g_F,i - x_{i+1})^2, the gradient against the latents, as in diagdistill's commit 24ef1c9.
    gradient_cut: F(x) is detached, as in diagdistill's commit 4ea418d: the loss is logged and has no gradient.
    frames: as in dmd_loss; a difference counts if both its frames do.
    """
    x, r, f = _precise(x, real_x0, fake_x0)
    of_x, of_r, of_f = (motion(y) for y in (x, r, f))
    of_x = of_x.detach() if gradient_cut else of_x
    of_r, of_f = of_r.detach(), of_f.detach()
    g = _normalised(of_f - of_r, of_x - of_r)
    error = (of_f - of_r if frame_error == "motion" else g - x[:, 1:].detach()).square().flatten(2).mean(2)  # [B, N]
    weight = frame_weighting(error)
    log = {"flow_gradient": g.detach().abs().mean()}
    if frames is not None:
        inside = differences(frames)
        of_x, g, weight = of_x[:, inside], g[:, inside], weight[:, inside]
    square = (of_x - (of_x - g).detach()).square()
    return (0.5 if half else 1.0) * (weight.view(*weight.shape, 1, 1, 1) * square).mean(), log


def frame_weighting(error: Tensor) -> Tensor:
    """Weights [B, N] of N frame differences from the error [B, N] of each, without a graph.

        w_i = 0.7 (1 + e_0..i / e_0..N-1) + 0.3 (1.2^i / mean_j 1.2^j),    e_0..i = sum_{j <= i} error_j

    The numbers are those of diagdistill, in commits 4ea418d and 24ef1c9 alike.
    """
    error = error.detach()
    total = error.sum(1, keepdim=True)
    share = _ratio(error.cumsum(1), total)
    growth = 1.2 ** torch.arange(error.shape[1], device=error.device, dtype=error.dtype)
    return 0.7 * (1 + share) + 0.3 * growth / growth.mean()


def motion_regression_loss(
    x: Tensor, y: Tensor, head: Head, target_head: Head, *, frames: slice | None = None
) -> Tensor:
    """Regression of motion on the initial student (diagdistill, commit 24ef1c9): L_M = mean (h(F(x)) - sg(h'(F(y))))^2.

    y: sample of the initial student from the same noise, constant. The gradient reaches x and the head h, not its EMA
    h'. frames: as in `flow_matching_loss`.
    """
    x, y = _precise(x, y)
    inside = slice(None) if frames is None else differences(frames)
    student, initial = head(motion(x)[:, inside]), target_head(motion(y)[:, inside]).detach()
    return (student - initial).square().mean()


def critic_loss(v: Tensor, target: Tensor, *, frames: slice | None = None) -> Tensor:
    """Flow matching of the critic on the student's samples: L = mean (v_f(x_t) - (eps - x))^2.

    v: [B, F, C, H, W], with the critic's graph. target: eps - x, constant; no gradient reaches the student.
    """
    v, target = _precise(v, target)
    if frames is not None:
        v, target = v[:, frames], target[:, frames]
    return (v - target.detach()).square().mean()


def regression_losses(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """L_reg = mean (x - y)^2 and L_reg^F = mean (F(x) - F(y))^2, for x made from the noise of the teacher's sample y.

    The gradient reaches x.
    """
    x, y = _precise(x, y)
    y = y.detach()
    return (x - y).square().mean(), (motion(x) - motion(y)).square().mean()


def motion(x: Tensor) -> Tensor:
    """[B, F, ...] -> differences between neighbouring frames [B, F - 1, ...]."""
    return x[:, 1:] - x[:, :-1]


def differences(frames: slice) -> slice:
    """Those of `motion` both of whose frames are in `frames`."""
    return slice(frames.start, frames.stop - 1)


def _normalised(difference: Tensor, distance: Tensor) -> Tensor:
    """difference / mean|distance|, the mean over all but the batch; no graph."""
    scale = distance.detach().abs().flatten(1).mean(1)
    return _ratio(difference.detach(), scale.view(-1, *[1] * (difference.ndim - 1)))


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, with 0 / 0 = 0. Anything else that is not finite stays so."""
    return torch.where((a == 0) & (b == 0), torch.zeros_like(a), a / b)


def _precise(*tensors: Tensor) -> tuple[Tensor, ...]:
    """float64 if one of them is, else float32."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return tuple(t.to(dtype) for t in tensors)
