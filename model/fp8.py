"""Linear layers in float8: weights in e4m3, inputs quantized on the fly, accumulation in float32, outputs in bfloat16.

    y = (x / s_x) (w / s_w)^T  s_x s_w + b      s = amax / 448, so that the largest number is the format's largest

There is one s_x per row of x (token) and one s_w per row of w (output channel), so that an outlier affects only its
row. The kernel that computes a row of x also computes its amax.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from configs.errors import UserError

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
TINY = 1e-12  # amax of a row of zeros
ADA = (8, 9)  # lowest compute capability with float8 matrix products
ALIGNMENT = 16  # _scaled_mm needs both sizes of a weight to be multiples of this
LINEARS = ("attn1.to_qkv", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
LINEARS += ("attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")  # the text's keys: once per prompt
UNQUANTIZED_BLOCKS = (0, -1)  # first and last block: quantization costs most accuracy there


def check_fp8(
    device: torch.device, setting: str = "inference.precision=fp8", instead: str = "inference.precision=auto"
) -> None:
    """Raise a UserError about `setting` if the device has no float8 matrix products. instead: what to set."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < ADA:
        raise UserError(
            f"{setting} needs a GPU of compute capability 8.9 or later (Ada, Hopper) and device={device} is none; "
            f"use {instead}"
        )


class Fp8Linear(nn.Module):
    """Replacement of a linear layer for inference, with half the memory. scale: [out_features, 1].

    Results have the dtype of the layer's original weights, whatever that of the inputs: since torch 2.12 autocast
    returns float32 from norms, which must not become the dtype of everything after them.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        weight, scale = quantize(linear.weight.detach())
        self.weight, self.scale = (nn.Parameter(x, requires_grad=False) for x in (weight, scale))
        # row scales go with bfloat16 results only
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().bfloat16(), requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        value, scale = self.quantize_input(x.reshape(-1, self.in_features))
        return self.matmul(value, scale).view(*x.shape[:-1], self.out_features).to(self.dtype)

    def quantize_input(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """`quantize` of inputs [N, K]."""
        return quantize(rows)

    def matmul(self, value: Tensor, scale: Tensor) -> Tensor:
        """Quantized inputs [N, K] and their scale, as `quantize` returns them -> [N, out_features], bfloat16."""
        return torch._scaled_mm(
            value, self.weight.t(), scale, self.scale.t(), bias=self.bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, K] -> e4m3 [N, K], and its scale by row, float32 [N, 1]."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp_min(TINY) / LARGEST
    return (wide / scale).to(E4M3), scale


def quantize_block(block: nn.Module, kind: type[Fp8Linear] = Fp8Linear) -> list[str]:
    """Replace the large linear layers of a transformer block by `kind`; returns their names."""
    done = []
    for name in LINEARS:
        parent, _, leaf = name.rpartition(".")
        if parent not in dict(block.named_modules()):
            continue
        owner = block.get_submodule(parent)
        linear = dict(owner.named_children()).get(leaf)
        if type(linear) is nn.Linear and not (linear.in_features % ALIGNMENT or linear.out_features % ALIGNMENT):
            setattr(owner, leaf, kind(linear))
            done.append(name)
    return done


def quantize_blocks(blocks: Sequence[nn.Module], kind: type[Fp8Linear] = Fp8Linear) -> str:
    """Apply `quantize_block` to all but the UNQUANTIZED_BLOCKS; returns a summary for the log."""
    kept = {i % len(blocks) for i in UNQUANTIZED_BLOCKS}
    names = [quantize_block(block, kind) for i, block in enumerate(blocks) if i not in kept]
    return f"float8: {sum(map(len, names))} linears in {len(names)} of {len(blocks)} blocks"


@torch.no_grad()
def layer_errors(linears: dict[str, nn.Linear], inputs: dict[str, Tensor]) -> dict[str, float]:
    """Relative error ||fp8 - exact|| / ||exact|| of each layer for its input, by name."""
    errors = {}
    for name, linear in linears.items():
        exact = nn.functional.linear(*(x.double() for x in (inputs[name], linear.weight)), _double(linear.bias))
        off = Fp8Linear(linear)(inputs[name]).double() - exact
        errors[name] = float(off.norm() / exact.norm())
    return errors


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()
