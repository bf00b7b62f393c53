"""Triton kernels for the operators of model/fast/ops.py, where their results are documented. Importing needs triton.

A program loads whole rows (tokens) into registers, so that each tensor is read and written once. Sums are float32.
Results are rounded to the dtype of the output, and before float8 to the dtype of the input.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

TINY, LARGEST = tl.constexpr(1e-12), tl.constexpr(448.0)  # as in model/fp8.py


@triton.jit
def _scale_row(value, largest):
    """The row divided by its scale, and the scale; `largest` is the row's largest magnitude."""
    scale = tl.maximum(largest, TINY) / LARGEST
    return value * (1.0 / scale), scale


@triton.jit
def _gelu(x):
    """Tanh approximation: x sigmoid(2 u)."""
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-2.0 * u))


@triton.jit
def _row(x, row, D: tl.constexpr, col, inside):
    """Row of a tensor that is read once, float32; padding is zero."""
    return tl.load(x + row * D + col, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def _vector(x, col, inside):
    """A vector that every program reads, float32; padding is zero."""
    return tl.load(x + col, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def _scale_product(value, row_scales, column_scales, bias, row, col, inside):
    """A row of a float8 product times its scales, plus the bias."""
    return value * tl.load(row_scales + row) * _vector(column_scales, col, inside) + _vector(bias, col, inside)


@triton.jit
def _residual_norm(
    x, branch, row_scales, column_scales, branch_bias, modulation, weight, bias, sums, out, scales, tokens, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, BRANCH: tl.constexpr, FACTORS: tl.constexpr, GATE: tl.constexpr,
    SHIFT: tl.constexpr, AFFINE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, groups of `tokens` tokens that share one modulation [6, D]).

    Vectors are loaded where they are used, from the L1 cache, or they would take the registers of other programs.
    """
    group = tl.program_id(1).to(tl.int64)
    row = group * tokens + tl.program_id(0)
    table = modulation + group * 6 * D
    col = tl.arange(0, BLOCK)
    inside = col < D
    value = _row(x, row, D, col, inside)
    if BRANCH:
        added = _row(branch, row, D, col, inside)
        if FACTORS:
            added = _scale_product(added, row_scales, column_scales, branch_bias, row, col, inside)
        if GATE >= 0:
            added = added * _vector(table + GATE * D, col, inside)
        total = (value + added).to(sums.dtype.element_ty)
        tl.store(sums + row * D + col, total, mask=inside)
        value = total.to(tl.float32)
    if SHIFT >= 0 or AFFINE:
        centred = tl.where(inside, value - tl.sum(value, 0) / D, 0.0)
        y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
        if SHIFT >= 0:
            y = y * (1.0 + _vector(table + (SHIFT + 1) * D, col, inside)) + _vector(table + SHIFT * D, col, inside)
        if AFFINE:
            y = y * _vector(weight, col, inside) + _vector(bias, col, inside)
        if SCALED:
            y = y.to(x.dtype.element_ty).to(tl.float32)
            y, scale = _scale_row(y, tl.max(tl.abs(y), 0))
            tl.store(scales + row, scale)
        tl.store(out + row * D + col, y.to(out.dtype.element_ty), mask=inside)


def _warps(block: int) -> int:
    """Warps of a program: a thread holds eight elements of a row, or more of a long one."""
    return min(max(block // 256, 1), 16)


def residual_norm(
    x: Tensor, branch: Tensor | None, factors: Sequence[Tensor], modulation: Tensor, gate: int, shift: int,
    weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype, scaled: bool, warps: int = 0,
) -> list[Tensor]:  # fmt: skip
    """As `residual_norm` of model/fast/ops.py. warps: 0 = chosen by the width."""
    x, modulation = x.contiguous(), modulation.contiguous()
    branch = None if branch is None else branch.contiguous()
    count, width = x.shape[0] * x.shape[1], x.shape[2]
    affine, block = weight is not None, triton.next_power_of_2(width)
    sums = None if branch is None else torch.empty_like(x)
    out = torch.empty_like(x, dtype=dtype) if affine or shift >= 0 else None
    scales = x.new_empty(count, 1, dtype=torch.float32) if scaled else None
    groups = x.shape[0] * modulation.shape[1]
    tokens = count // groups
    with torch.cuda.device_of(x):
        _residual_norm[(tokens, groups)](
            x, branch, *(factors or [None] * 3), modulation, weight, bias, sums, out, scales, tokens, eps,
            D=width, BLOCK=block, BRANCH=branch is not None, FACTORS=len(factors) > 0, GATE=gate, SHIFT=shift,
            AFFINE=affine, SCALED=scaled, num_warps=warps or _warps(block),
        )  # fmt: skip
    return [y for y in (sums, out, scales) if y is not None]


@triton.jit
def _rms_norm(x, weight, eps, D: tl.constexpr):
    """RMS norm over a whole tile, whose padding is zero; rounded to the dtype of x."""
    wide = x.to(tl.float32)
    return (wide * tl.rsqrt(tl.sum(wide * wide) / D + eps) * weight).to(x.dtype).to(tl.float32)


@triton.jit
def _query_norm(
    x, row_scales, column_scales, bias, weight, out, eps, D: tl.constexpr, BLOCK: tl.constexpr, FACTORS: tl.constexpr,
):  # fmt: skip
    """Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < D
    value = _row(x, row, D, col, inside)
    if FACTORS:
        value = _scale_product(value, row_scales, column_scales, bias, row, col, inside)
    y = value * tl.rsqrt(tl.sum(value * value, 0) / D + eps) * _vector(weight, col, inside)
    tl.store(out + row * D + col, y.to(out.dtype.element_ty), mask=inside)


def query_norm(x: Tensor, factors: Sequence[Tensor], weight: Tensor, eps: float, warps: int = 0) -> Tensor:
    """As `query_norm` of model/fast/ops.py. warps: 0 = chosen by the width."""
    x, width = x.contiguous(), x.shape[-1]
    out, block = torch.empty_like(x, dtype=weight.dtype), triton.next_power_of_2(width)
    with torch.cuda.device_of(x):
        _query_norm[(x.numel() // width,)](
            x, *(factors or [None] * 3), weight, out, eps,
            D=width, BLOCK=block, FACTORS=len(factors) > 0, num_warps=warps or _warps(block),
        )  # fmt: skip
    return out


@triton.jit
def _rotate(x, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Rotate neighbouring pairs of x [HEADS, 2 HALF] by the angles [1, HALF]."""
    a, b = tl.split(tl.reshape(x, (HEADS, HALF, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (HEADS, 2 * HALF))


@triton.jit
def _clamp_to_float8(x, NARROW: tl.constexpr):
    """x clamped to the range of float8 if NARROW."""
    if NARROW:
        x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    return x


@triton.jit
def _qk_norm_rope(
    qkv, q_weight, k_weight, cos, sin, q_out, k_slot, v_slot, tokens, q_eps, k_eps,
    k_batch, k_token, k_head, v_batch, v_token, v_head,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ALL_HEADS: tl.constexpr, HALF: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Grid: (tokens, batch). A token is a tile [ALL_HEADS, 2 HALF], padded to powers of two."""
    D: tl.constexpr = HEADS * HEAD_DIM
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = tl.arange(0, ALL_HEADS)[:, None]
    col = tl.arange(0, 2 * HALF)[None, :]
    pair = tl.arange(0, HALF)[None, :]
    at = head * HEAD_DIM + col
    inside = (head < HEADS) & (col < HEAD_DIM)
    row = batch * tokens + token
    known = pair < HEAD_DIM // 2
    c = tl.load(cos + token * (HEAD_DIM // 2) + pair, mask=known, other=0.0)
    s = tl.load(sin + token * (HEAD_DIM // 2) + pair, mask=known, other=0.0)
    q = tl.load(qkv + row * 3 * D + at, mask=inside, other=0.0, eviction_policy="evict_first")
    k = tl.load(qkv + row * 3 * D + D + at, mask=inside, other=0.0, eviction_policy="evict_first")
    v = tl.load(qkv + row * 3 * D + 2 * D + at, mask=inside, other=0.0, eviction_policy="evict_first")
    place = v_slot + batch * v_batch + token * v_token + head * v_head + col
    tl.store(place, _clamp_to_float8(v.to(tl.float32), NARROW).to(v_slot.dtype.element_ty), mask=inside)
    rotated = _rotate(_rms_norm(q, _vector(q_weight, at, inside), q_eps, D), c, s, ALL_HEADS, HALF)
    rotated = rotated.to(q.dtype).to(tl.float32)
    tl.store(q_out + row * D + at, _clamp_to_float8(rotated, NARROW).to(q_out.dtype.element_ty), mask=inside)
    rotated = _rotate(_rms_norm(k, _vector(k_weight, at, inside), k_eps, D), c, s, ALL_HEADS, HALF)
    place = k_slot + batch * k_batch + token * k_token + head * k_head + col
    tl.store(place, _clamp_to_float8(rotated, NARROW).to(k_slot.dtype.element_ty), mask=inside)


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, k_slot: Tensor, v_slot: Tensor,
    q_eps: float, k_eps: float, float8_slots: bool, warps: int = 0,
) -> Tensor:  # fmt: skip
    """As `qk_norm_rope` of model/fast/ops.py. warps: 0 = chosen by the width."""
    assert k_slot.stride(3) == v_slot.stride(3) == 1, "a head's numbers lie side by side"
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    heads, head_dim = k_slot.shape[2:]
    batch, tokens = qkv.shape[:2]
    all_heads, half = triton.next_power_of_2(heads), triton.next_power_of_2(head_dim // 2)
    warps = warps or min(_warps(2 * half * all_heads), 8)
    q = torch.empty(k_slot.shape, dtype=k_slot.dtype if float8_slots else qkv.dtype, device=qkv.device)
    with torch.cuda.device_of(qkv):
        _qk_norm_rope[(tokens, batch)](
            qkv, q_weight, k_weight, cos, sin, q, k_slot, v_slot, tokens, q_eps, k_eps,
            *k_slot.stride()[:3], *v_slot.stride()[:3], HEADS=heads, HEAD_DIM=head_dim,
            ALL_HEADS=all_heads, HALF=half, NARROW=float8_slots, num_warps=warps,
        )  # fmt: skip
    return q


@triton.jit
def _to_float32(value, GELU: tl.constexpr):
    """Part of a row in float32, after the GELU, if any, which is rounded to the dtype of the input."""
    wide = value.to(tl.float32)
    return _gelu(wide).to(value.dtype).to(tl.float32) if GELU else wide


@triton.jit
def _quantise_rows(x, out, scales, D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, GELU: tl.constexpr):
    """Grid: rows. A row is split into HEAD elements, a power of two, and the rest, padded to TAIL."""
    row = tl.program_id(0).to(tl.int64)
    at = row * D + tl.arange(0, HEAD)
    value = _to_float32(tl.load(x + at), GELU)
    largest = tl.max(tl.abs(value), 0)
    if TAIL > 0:
        col = HEAD + tl.arange(0, TAIL)
        rest = _to_float32(tl.load(x + row * D + col, mask=col < D, other=0.0), GELU)
        largest = tl.maximum(largest, tl.max(tl.abs(rest), 0))
        rest, _ = _scale_row(rest, largest)
        tl.store(out + row * D + col, rest.to(out.dtype.element_ty), mask=col < D)
    value, scale = _scale_row(value, largest)
    tl.store(out + at, value.to(out.dtype.element_ty))
    tl.store(scales + row, scale)


def quantize_rows(x: Tensor, gelu: bool, dtype: torch.dtype, warps: int = 0) -> tuple[Tensor, Tensor]:
    """As `quantize_rows` of model/fast/ops.py. warps: 0 = chosen by the width."""
    x = x.contiguous()
    count, width = x.shape
    out, scales = torch.empty_like(x, dtype=dtype), x.new_empty(count, 1, dtype=torch.float32)
    head = triton.next_power_of_2(width + 1) // 2
    tail = triton.next_power_of_2(width - head) if width > head else 0
    with torch.cuda.device_of(x):
        _quantise_rows[(count,)](
            x, out, scales, D=width, HEAD=head, TAIL=tail, GELU=gelu, num_warps=warps or min(max(head // 512, 1), 8)
        )
    return out, scales
