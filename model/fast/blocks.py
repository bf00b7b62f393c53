"""The three functions of a step in model/fast/student.py, implemented with the operators of model/fast/ops.py.

    adaln_modulations       shifts, scales and gates of each block
    pre_attention           norm | fused QKV | norms, rotary, slots                   (| is a cut between kernels)
    cross_attention_query   output projection | gate, sum, norm | query of the text | its norm
    feed_forward            output projection | sum, norm | feed-forward | gate, sum

In float8 the kernel of a norm or GELU also quantizes its output for the next product; the output of attention is
quantized by a kernel of its own.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from model.causal_wan import CausalWanBlock, CausalWanModel, RotaryEmb
from model.fast.ops import FFN_GATE, FFN_SHIFT, GATE, SHIFT, linear_gelu, qk_norm_rope, quantize_rows, residual_norm
from model.fp8 import Fp8Linear


def fits(model: CausalWanModel) -> bool:
    """Whether these functions apply: fused q, k and v, and one dtype for all."""
    dtype = model.patch_embedding.weight.dtype
    return all(
        block.attn1.fused_projections
        and isinstance(block.norm2, nn.LayerNorm)
        and all(norm.weight.dtype is dtype for norm in (block.attn1.norm_q, block.attn1.norm_k))
        for block in model.blocks
    )


def adaln_modulations(model: CausalWanModel, modulation: Tensor) -> list[Tensor]:
    """Modulation [B, 1 or F, 6, D] of the timestep -> that of each block, float32."""
    wide = modulation.float()
    return [block.scale_shift_table + wide for block in model.blocks]


def pre_attention(
    block: CausalWanBlock, x: Tensor, modulation: Tensor, rotary_emb: RotaryEmb, k_slot: Tensor, v_slot: Tensor
) -> Tensor:
    """x [B, L, D] -> queries [B, L, heads, head_dim]; writes k_slot and v_slot [B, L, heads, head_dim]."""
    attn = block.attn1
    q, k = attn.norm_q, attn.norm_k
    rows = _norm(block.norm1, attn.to_qkv, x, modulation, shift=SHIFT)
    qkv = _product(attn.to_qkv, rows, x)
    return qk_norm_rope(qkv, q.weight, k.weight, *rotary_emb, k_slot, v_slot, q.eps, k.eps)


def cross_attention_query(
    block: CausalWanBlock, x: Tensor, modulation: Tensor, attn_output: Tensor
) -> tuple[Tensor, Tensor]:
    """x [B, L, D] and the result of self-attention [B, L, heads, head_dim] -> x, queries of cross-attention."""
    attn = block.attn2
    y = _linear(block.attn1.to_out[0], attn_output.flatten(2, 3))
    x, *rows = _norm(block.norm2, attn.to_q, x, modulation, branch=y, gate=GATE)
    return x, attn.norm_q(_product(attn.to_q, rows, x)).type_as(x).unflatten(2, (attn.heads, -1))


def feed_forward(block: CausalWanBlock, x: Tensor, modulation: Tensor, attn_output: Tensor, fused_gelu: bool) -> Tensor:
    """x [B, L, D] and the result of cross-attention [B, L, heads, head_dim] -> x."""
    wide, _, narrow = block.ffn.net
    y = _linear(block.attn2.to_out[0], attn_output.flatten(2, 3))
    x, *rows = _norm(block.norm3, wide.proj, x, modulation, branch=y, shift=FFN_SHIFT)
    if fused_gelu and type(wide.proj) is nn.Linear:
        y = _linear(narrow, linear_gelu(*rows, wide.proj.weight, wide.proj.bias))
    else:
        y = _linear(narrow, _product(wide.proj, rows, x), gelu=True)
    return residual_norm(x, modulation, branch=y, gate=FFN_GATE)[0]


def _norm(norm: nn.LayerNorm, reader: nn.Module, x: Tensor, modulation: Tensor, **changes) -> list[Tensor]:
    """`residual_norm`, with the norm quantized if the linear layer that reads it is float8."""
    affine = None if norm.weight is None else (norm.weight, norm.bias)
    return residual_norm(x, modulation, affine=affine, eps=norm.eps, scaled=isinstance(reader, Fp8Linear), **changes)


def _product(linear: nn.Module, rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """linear applied to [y], or to [float8, scales]; the result has tokens and dtype of `like`."""
    if not isinstance(linear, Fp8Linear):
        return linear(rows[0])
    value, scale = rows
    return linear.matmul(value.flatten(0, -2), scale).view(*like.shape[:-1], -1).type_as(like)


def _linear(linear: nn.Module, y: Tensor, gelu: bool = False) -> Tensor:
    """linear applied to y [B, L, D], or to its GELU."""
    if isinstance(linear, Fp8Linear):
        return _product(linear, quantize_rows(y.flatten(0, -2), gelu), y)
    return linear(functional.gelu(y, approximate="tanh") if gelu else y)
