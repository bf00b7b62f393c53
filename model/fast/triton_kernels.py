"""Triton kernels for the operators of model/fast/ops.py, where their results are documented. Importing needs triton.

A program loads whole rows (tokens) into registers, so that each tensor is read and written once. Sums are float32.
Results are rounded to the dtype of the output, and before float8 to the dtype of the input. Masks compare a token's
index once for each element (`token + 0 * col`): the interpreter of triton 3.9 refuses one spread from a scalar.
"""

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
def _residual_norm(
    x, branch, modulation, weight, bias, sums, out, scales, tokens, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    BRANCH: tl.constexpr, GATE: tl.constexpr, SHIFT: tl.constexpr, AFFINE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of ROWS tokens, groups of `tokens` tokens that share one modulation [6, D])."""
    group = tl.program_id(1).to(tl.int64)
    col = tl.arange(0, BLOCK)
    inside = col < D
    if GATE >= 0:
        gate = tl.load(modulation + (group * 6 + GATE) * D + col, mask=inside, other=0.0)
    if SHIFT >= 0:
        shift = tl.load(modulation + (group * 6 + SHIFT) * D + col, mask=inside, other=0.0)
        factor = 1.0 + tl.load(modulation + (group * 6 + SHIFT + 1) * D + col, mask=inside, other=0.0)
    if AFFINE:
        shift = tl.load(bias + col, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(weight + col, mask=inside, other=0.0).to(tl.float32)
    for i in range(ROWS):
        token = tl.program_id(0) * ROWS + i
        here = inside & (token + 0 * col < tokens)
        row = group * tokens + token
        at = row * D + col
        value = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
        if BRANCH:
            added = tl.load(branch + at, mask=here, other=0.0).to(tl.float32)
            if GATE >= 0:
                added = added * gate
            total = (value + added).to(sums.dtype.element_ty)
            tl.store(sums + at, total, mask=here)
            value = total.to(tl.float32)
        if SHIFT >= 0 or AFFINE:
            centred = tl.where(inside, value - tl.sum(value, 0) / D, 0.0)
            y = centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + eps) * factor + shift
            if SCALED:
                y = y.to(x.dtype.element_ty).to(tl.float32)
                y, scale = _scale_row(y, tl.max(tl.abs(y), 0))
                tl.store(scales + row, scale, mask=token < tokens)
            tl.store(out + at, y.to(out.dtype.element_ty), mask=here)


def residual_norm(
    x: Tensor, branch: Tensor | None, modulation: Tensor, gate: int, shift: int, weight: Tensor | None,
    bias: Tensor | None, eps: float, dtype: torch.dtype, scaled: bool, rows: int = 2, warps: int = 4,
) -> list[Tensor]:  # fmt: skip
    """As `residual_norm` of model/fast/ops.py. rows: tokens per program."""
    x, modulation = x.contiguous(), modulation.contiguous()
    branch = None if branch is None else branch.contiguous()
    count, width = x.shape[0] * x.shape[1], x.shape[2]
    affine = weight is not None
    sums = None if branch is None else torch.empty_like(x)
    out = torch.empty_like(x, dtype=dtype) if affine or shift >= 0 else None
    scales = x.new_empty(count, 1, dtype=torch.float32) if scaled else None
    groups = x.shape[0] * modulation.shape[1]
    tokens = count // groups
    with torch.cuda.device_of(x):
        _residual_norm[(triton.cdiv(tokens, rows), groups)](
            x, branch, modulation, weight, bias, sums, out, scales, tokens, eps,
            D=width, BLOCK=triton.next_power_of_2(width), ROWS=rows, BRANCH=branch is not None, GATE=gate,
            SHIFT=shift, AFFINE=affine, SCALED=scaled, num_warps=warps,
        )  # fmt: skip
    return [y for y in (sums, out, scales) if y is not None]


@triton.jit
def _rms_norm(x, weight, eps, D: tl.constexpr):
    """RMS norm over a whole tile, whose padding is zero; rounded to the dtype of x."""
    wide = x.to(tl.float32)
    return (wide * tl.rsqrt(tl.sum(wide * wide) / D + eps) * weight).to(x.dtype).to(tl.float32)


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
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ALL_HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of ROWS tokens, batch). A token is a tile [ALL_HEADS, 2 HALF], padded to powers of two."""
    D: tl.constexpr = HEADS * HEAD_DIM
    batch = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, ALL_HEADS)[:, None]
    col = tl.arange(0, 2 * HALF)[None, :]
    pair = tl.arange(0, HALF)[None, :]
    at = head * HEAD_DIM + col
    inside = (head < HEADS) & (col < HEAD_DIM)
    q_factor = tl.load(q_weight + at, mask=inside, other=0.0).to(tl.float32)
    k_factor = tl.load(k_weight + at, mask=inside, other=0.0).to(tl.float32)
    for i in range(ROWS):
        token = (tl.program_id(0) * ROWS + i).to(tl.int64)
        here = inside & (token + 0 * col < tokens)
        row = batch * tokens + token
        q = tl.load(qkv + row * 3 * D + at, mask=here, other=0.0)
        k = tl.load(qkv + row * 3 * D + D + at, mask=here, other=0.0)
        v = tl.load(qkv + row * 3 * D + 2 * D + at, mask=here, other=0.0)
        angle = token * (HEAD_DIM // 2) + pair
        known = (pair < HEAD_DIM // 2) & (token + 0 * pair < tokens)
        c = tl.load(cos + angle, mask=known, other=0.0)
        s = tl.load(sin + angle, mask=known, other=0.0)
        rotated = _rotate(_rms_norm(q, q_factor, q_eps, D), c, s, ALL_HEADS, HALF).to(q.dtype).to(tl.float32)
        tl.store(q_out + row * D + at, _clamp_to_float8(rotated, NARROW).to(q_out.dtype.element_ty), mask=here)
        rotated = _rotate(_rms_norm(k, k_factor, k_eps, D), c, s, ALL_HEADS, HALF)
        place = k_slot + batch * k_batch + token * k_token + head * k_head + col
        tl.store(place, _clamp_to_float8(rotated, NARROW).to(k_slot.dtype.element_ty), mask=here)
        place = v_slot + batch * v_batch + token * v_token + head * v_head + col
        tl.store(place, _clamp_to_float8(v.to(tl.float32), NARROW).to(v_slot.dtype.element_ty), mask=here)


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, k_slot: Tensor, v_slot: Tensor,
    q_eps: float, k_eps: float, float8_slots: bool, rows: int = 1, warps: int = 4,
) -> Tensor:  # fmt: skip
    """As `qk_norm_rope` of model/fast/ops.py. narrow: the slots are float8. rows: tokens per program."""
    assert k_slot.stride(3) == v_slot.stride(3) == 1, "a head's numbers lie side by side"
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    heads, head_dim = k_slot.shape[2:]
    batch, tokens = qkv.shape[:2]
    q = torch.empty(k_slot.shape, dtype=k_slot.dtype if float8_slots else qkv.dtype, device=qkv.device)
    with torch.cuda.device_of(qkv):
        _qk_norm_rope[(triton.cdiv(tokens, rows), batch)](
            qkv, q_weight, k_weight, cos, sin, q, k_slot, v_slot, tokens, q_eps, k_eps,
            *k_slot.stride()[:3], *v_slot.stride()[:3], HEADS=heads, HEAD_DIM=head_dim,
            ALL_HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(head_dim // 2), ROWS=rows,
            NARROW=float8_slots, num_warps=warps,
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
