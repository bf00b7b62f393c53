"""Custom operators for the memory-bound parts of a step: one kernel each on a GPU, plain torch elsewhere.

    residual_norm   residual addition, norm and modulation, quantization to float8
    qk_norm_rope    norms of queries and keys, rotary embedding, writing of keys and values into their slots
    quantize_rows   GELU and quantization to float8
    linear_gelu     GELU in the epilogue of a matrix product (a kernel of torch)

Tokens [B, L, D] are frame-major. `modulation` [B, 1 or F, 6, D], float32, holds AdaLN's shift, scale and gate
of self-attention and of the feed-forward for each frame. Float8 is e4m3 with a scale per row, as in model/fp8.py.
Values are rounded at the same places as in model/causal_wan.py. Operators are opaque to torch.compile, which does not
change the layouts of their inputs.
"""

import torch
from torch import Tensor
from torch.nn import functional

from model.cache import cast_for_cache
from model.causal_wan import _gate, _modulate, _rotate
from model.fp8 import E4M3, quantize

GATE, FFN_GATE, SHIFT, FFN_SHIFT = 2, 5, 0, 3  # rows of a modulation; a scale follows its shift
NONE = -1


@torch.library.custom_op(
    "diagonal::residual_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor? branch, Tensor modulation, int gate, int shift, Tensor? weight, Tensor? bias, "
    "float eps, bool scaled) -> Tensor[]",
)
def _residual_norm(x, branch, modulation, gate, shift, weight, bias, eps, scaled):
    if x.is_cuda:
        from model.fast import triton_kernels

        dtype = E4M3 if scaled else x.dtype
        return triton_kernels.residual_norm(x, branch, modulation, gate, shift, weight, bias, eps, dtype, scaled)
    return reference_residual_norm(x, branch, modulation, gate, shift, weight, bias, eps, scaled)


@_residual_norm.register_fake
def _(x, branch, modulation, gate, shift, weight, bias, eps, scaled):
    out = [] if branch is None else [x.new_empty(x.shape)]
    if shift >= 0 or weight is not None:
        out.append(x.new_empty(x.shape, dtype=E4M3 if scaled else x.dtype))
    if scaled:
        out.append(x.new_empty(x.shape[0] * x.shape[1], 1, dtype=torch.float32))
    return out


def reference_residual_norm(x, branch, modulation, gate, shift, weight, bias, eps, scaled) -> list[Tensor]:
    """What the kernel computes, in torch."""
    rows, out = modulation.unsqueeze(3).unbind(2), []
    if branch is not None:
        x = x + branch if gate < 0 else (x.float() + _gate(branch.float(), rows[gate])).type_as(x)
        out.append(x)
    if shift < 0 and weight is None:
        return out
    weight, bias = (None if y is None else y.float() for y in (weight, bias))
    y = functional.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
    y = (y if shift < 0 else _modulate(y, rows[shift], rows[shift + 1])).type_as(x)
    if not scaled:
        return [*out, y]
    value, scale = quantize(y.flatten(0, 1))
    return [*out, value.view_as(y), scale]


def residual_norm(
    x: Tensor,
    modulation: Tensor,
    *,
    branch: Tensor | None = None,
    gate: int = NONE,
    shift: int = NONE,
    affine: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    scaled: bool = False,
) -> list[Tensor]:
    """x [B, L, D] -> list of those asked for: x + gate * branch, its layer norm, the norm's float8 scales [B L, 1].

    branch: added to x, multiplied by row `gate` of the modulation in float32 if one is given. shift: its row with
    the shift of the norm; the scale is the row after it. affine: instead, weight and bias of the norm. Without either
    there is no norm. scaled: quantize the norm to float8.
    """
    return torch.ops.diagonal.residual_norm(x, branch, modulation, gate, shift, *(affine or (None, None)), eps, scaled)


@torch.library.custom_op("diagonal::qk_norm_rope", mutates_args=("k_slot", "v_slot"))
def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_slot: Tensor,
    v_slot: Tensor,
    q_eps: float,
    k_eps: float,
) -> Tensor:
    """qkv [B, L, 3 D] -> normalized and rotated queries [B, L, heads, head_dim]; writes k_slot and v_slot, same shape.

    cos and sin [1, L, 1, head_dim / 2]. Slots may have any strides except in the last dimension. Queries are float8 if
    the slots are.
    """
    if qkv.is_cuda:
        from model.fast import triton_kernels

        float8 = k_slot.dtype is E4M3
        return triton_kernels.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, k_slot, v_slot, q_eps, k_eps, float8)
    return reference_qk_norm_rope(qkv, q_weight, k_weight, cos, sin, k_slot, v_slot, q_eps, k_eps)


@qk_norm_rope.register_fake
def _(qkv, q_weight, k_weight, cos, sin, k_slot, v_slot, q_eps, k_eps):
    return qkv.new_empty(k_slot.shape, dtype=E4M3 if k_slot.dtype is E4M3 else qkv.dtype)


def reference_qk_norm_rope(qkv, q_weight, k_weight, cos, sin, k_slot, v_slot, q_eps, k_eps) -> Tensor:
    """What the kernel computes, in torch."""
    q, k, v = qkv.chunk(3, dim=-1)
    q = functional.rms_norm(q, q_weight.shape, q_weight, q_eps)
    k = functional.rms_norm(k, k_weight.shape, k_weight, k_eps)
    q, k, v = (x.unflatten(2, k_slot.shape[2:]) for x in (q, k, v))
    k_slot.copy_(cast_for_cache(_rotate(k, (cos, sin)), k_slot.dtype))
    v_slot.copy_(cast_for_cache(v, v_slot.dtype))
    return cast_for_cache(_rotate(q, (cos, sin)).type_as(v), k_slot.dtype).contiguous()


@torch.library.custom_op("diagonal::quantise_rows", mutates_args=())
def quantize_rows(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """x [N, D] -> e4m3 [N, D] and scales [N, 1] of x, or of gelu(x), tanh approximation."""
    if x.is_cuda:
        from model.fast import triton_kernels

        return triton_kernels.quantize_rows(x, gelu, E4M3)
    return reference_quantize_rows(x, gelu)


@quantize_rows.register_fake
def _(x: Tensor, gelu: bool):
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(len(x), 1, dtype=torch.float32)


def reference_quantize_rows(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """What the kernel computes, in torch."""
    return quantize(functional.gelu(x, approximate="tanh") if gelu else x)


@torch.library.custom_op("diagonal::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x w^T + b), tanh approximation; on a GPU in the epilogue of the product, whose result is rounded once."""
    if not x.is_cuda:
        return functional.gelu(functional.linear(x, weight, bias), approximate="tanh")
    rows = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return rows.view(*x.shape[:-1], -1)


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
