"""Inputs for the operators of model/fast/ops.py and, run as a program, the Triton kernels against plain torch.

`TRITON_INTERPRET=1 python kernels_case.py` interprets them on a CPU, in float16: the interpreter cuts to bfloat16
rather than rounding, and its float8 loses a carry, so that the last cast is torch's.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from model.cache import E4M3
from model.fast import ops as fast_kernels
from model.fast.ops import FFN_SHIFT, GATE, NONE, SHIFT

HEADS = {96: (4, 24), 1536: (12, 128)}


def norm_cases(width: int, dtype: torch.dtype, device: str = "cpu", tokens: int = 21) -> Iterator[tuple[str, tuple]]:
    """Arguments of `reference_residual_norm` but the last: tokens [2, tokens, width], tables of 1 and of 3 frames."""
    torch.manual_seed(0)
    x, branch = (torch.randn(2, tokens, width).to(device, dtype) for _ in range(2))
    x[0, 1] = 0  # no spread
    affine = [torch.randn(width).to(device, dtype) for _ in range(2)]
    for frames in (1, 3):
        modulation = torch.randn(2, frames, 6, width).to(device)
        yield f"norm, {frames}", (x, None, modulation, NONE, SHIFT, None, None, 1e-6)
        yield f"gated, affine, {frames}", (x, branch, modulation, GATE, NONE, *affine, 1e-6)
        yield f"added, norm, {frames}", (x, branch, modulation, NONE, FFN_SHIFT, None, None, 1e-6)
        yield f"gated, {frames}", (x, branch, modulation, GATE, NONE, None, None, 0.0)


def turn_case(width: int, dtype: torch.dtype, slot: torch.dtype, device: str = "cpu", tokens: int = 21) -> tuple:
    """Arguments of `reference_qk_norm_rope`; slots are the middle of a longer cache."""
    torch.manual_seed(1)
    heads, head_dim = HEADS[width]
    qkv = torch.randn(2, tokens, 3 * width).to(device, dtype)
    weights = [torch.randn(width).to(device, dtype) for _ in range(2)]
    angle = 6 * torch.rand(1, tokens, 1, head_dim // 2)
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    slots = (torch.zeros(2, 3 * tokens, heads, head_dim).to(device, slot) for _ in range(2))
    return qkv, *weights, cos, sin, *(x[:, tokens : 2 * tokens] for x in slots), 1e-6, 1e-5


def rows_case(width: int, dtype: torch.dtype, device: str = "cpu", count: int = 5) -> Tensor:
    """[count, width], of which one row is zero and one large."""
    torch.manual_seed(2)
    x = 2 * torch.randn(count, width)
    x[1] = 0
    x[2] *= 1000
    return x.to(device, dtype)


def close(got: Tensor, wanted: Tensor, name: str, before: Tensor | float = 0.0) -> None:
    """Equal but for the last bit of a few. before: by how much more they may differ, from roundings before the last."""
    assert got.dtype is wanted.dtype and got.shape == wanted.shape, name
    if wanted.dtype is E4M3:
        step, least, share = 0.13, 2**-8, 5e-3
    else:
        step, least, share = torch.finfo(wanted.dtype).eps, 2e-4, 0.02 if wanted.dtype.itemsize == 2 else 1
    got, wanted = got.float(), wanted.float()
    excess = (got - wanted).abs() - (least + step * wanted.abs() + before)
    assert (excess <= 0).all(), f"{name}: differ by up to {excess.max():.3g} more than they may"
    assert (got != wanted).float().mean() <= share, name


def compare_norms(kernel, width: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """kernel(*case, scaled) -> as `reference_residual_norm`."""
    for name, case in norm_cases(width, dtype, device):
        for scaled in (False, True)[: 1 + (case[4] >= 0 or case[5] is not None)]:
            outputs, wanted = kernel(*case, scaled), fast_kernels.reference_residual_norm(*case, scaled)
            if case[1] is not None:
                # A sum may differ in its last bit: a GPU does not round the gated branch before it adds it. The norm
                # multiplies that bit by weight and 1 / spread, and its bias may then cancel what the bit belongs to, so
                # no bound relative to the result holds. Hence the norm is compared with that of the kernel's own sums.
                wanted[1:] = fast_kernels.reference_residual_norm(outputs[0], None, *case[2:], scaled)
            for got, one in zip(outputs, wanted, strict=True):
                close(got, one, f"{name}, {one.dtype}")


def compare_turns(kernel, width: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """kernel(*case) -> as `reference_qk_norm_rope`."""
    for slot in (dtype, E4M3):
        plain, own = (turn_case(width, dtype, slot, device) for _ in range(2))
        wanted = fast_kernels.reference_qk_norm_rope(*plain)
        for got, one, name in ((kernel(*own), wanted, "queries"), (own[5], plain[5], "keys")):
            # A norm may differ in its last bit, and the rotation of a pair may cancel all but that bit. Rotating keeps
            # the pair's length, of which the bit is at most this part.
            pairs = one.float().unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True)
            close(got, one, name, torch.finfo(dtype).eps * pairs.expand(*pairs.shape[:-1], 2).flatten(-2))
        close(own[6], plain[6], "values")
        around = own[5]._base.float().clone()
        around[:, own[5].shape[1] : 2 * own[5].shape[1]] = 0
        assert not around.any(), "written beside the slot"


def compare_rows(kernel, width: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """kernel(x, gelu) -> as `reference_quantize_rows`."""
    for gelu in (False, True):
        x = rows_case(width, dtype, device)
        for got, wanted in zip(kernel(x, gelu), fast_kernels.reference_quantize_rows(x, gelu), strict=True):
            close(got, wanted, f"rows of {width}, gelu {gelu}")


def interpreted(kernels, **tiling) -> tuple:
    """The kernels as the comparisons call them; what they give in float32 becomes float8 here."""

    def norm(*case):
        *most, scaled = case
        out = kernels.residual_norm(*most, torch.float32 if scaled else case[0].dtype, scaled, **tiling)
        return [*out[:-2], out[-2].to(E4M3), out[-1]] if scaled else out

    def turn(*case):
        slots, narrow = case[5:7], case[5].dtype is E4M3
        wide = [x._base.float()[:, x.shape[1] : 2 * x.shape[1]] if narrow else x for x in slots]
        q = kernels.qk_norm_rope(*case[:5], *wide, *case[7:], narrow, **tiling)
        for x, y in zip(slots, wide, strict=True):
            x._base.copy_(y._base)
        return q.to(case[5].dtype)

    def rows(x, gelu):
        values, scales = kernels.quantize_rows(x, gelu, torch.float32)
        return values.to(E4M3), scales

    return norm, turn, rows


def main() -> None:
    from model.fast import triton_kernels

    half = torch.float16
    for width, (rows, warps) in itertools.product(HEADS, ((1, 1), (2, 4))):
        norm, turn, _ = interpreted(triton_kernels, rows=rows, warps=warps)
        compare_norms(norm, width, half)
        compare_turns(turn, width, half)
    for width in (96, 256, 1536, 8960):
        compare_rows(interpreted(triton_kernels)[-1], width, half)
    print("every kernel agrees")


if __name__ == "__main__":
    main()
