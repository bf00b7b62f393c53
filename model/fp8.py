"""Linear layers in float8: weights kept in e4m3, inputs cast as they come, sums in float32, results in bfloat16.

    y = (x / s_x) (w / s_w)^T  s_x s_w + b      s = amax / 448, so that the largest number is the format's largest

scaling "row": s_x for each row of x (token), s_w for each row of w (output), which keeps one outlier from costing the
others their digits; a row's amax lies in the kernel that made the row. "tensor": one number for each.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from configs.errors import UserError

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
TINY = 1e-12  # amax of a row of zeros
ADA = (8, 9)  # first compute capability with float8 matrix units
ALIGNMENT = 16  # that _scaled_mm wants of both sizes of a weight
LINEARS = ("attn1.to_qkv", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
LINEARS += ("attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")  # text keys are made once a prompt
UNQUANTIZED_BLOCKS = (0, -1)  # blocks whose linears stay: next to the latents rounding costs most


def check_fp8(
    device: torch.device, setting: str = "inference.precision=fp8", instead: str = "inference.precision=auto"
) -> None:
    """Refuse a device whose matrix units have no float8."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < ADA:
        raise UserError(
            f"{setting} needs a GPU of compute capability 8.9 or later (Ada, Hopper) and device={device} is none; "
            f"use {instead}"
        )


class Fp8Linear(nn.Module):
    """A linear layer's replacement for inference; holds half the bytes. scale: [out_features, 1], or [] by tensor.

    Results have the type of the layer's weights, whatever the inputs have: under autocast norms come in float32 from
    torch 2.12 on, which must not become the type of all that follows.
    """

    def __init__(self, linear: nn.Linear, scaling: str = "row"):
        super().__init__()
        assert scaling in ("row", "tensor"), f"scaling={scaling}"
        self.in_features, self.out_features, self.scaling = linear.in_features, linear.out_features, scaling
        self.dtype = linear.weight.dtype
        weight, scale = quantize(linear.weight.detach(), scaling)
        self.weight, self.scale = (nn.Parameter(x, requires_grad=False) for x in (weight, scale))
        # row scales go with bfloat16 results only
        bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().bfloat16(), requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        value, scale = self.quantize_input(x.reshape(-1, self.in_features))
        return self.matmul(value, scale).view(*x.shape[:-1], self.out_features).to(self.dtype)

    def quantize_input(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of inputs [N, K] as `quantize` gives them."""
        return quantize(rows, self.scaling)

    def matmul(self, value: Tensor, scale: Tensor) -> Tensor:
        """Rows of e4m3 [N, K] with their scale, as `quantize` gives them -> [N, out_features], bfloat16."""
        return torch._scaled_mm(
            value, self.weight.t(), scale, self.scale.t(), bias=self.bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scaling={self.scaling}"


def quantize(x: Tensor, scaling: str) -> tuple[Tensor, Tensor]:
    """x [N, K] -> e4m3 [N, K], and its scale: float32 [N, 1] by row, [] for the tensor."""
    wide = x.float()
    amax = wide.abs().amax(dim=-1, keepdim=True) if scaling == "row" else wide.abs().amax()
    scale = amax.clamp_min(TINY) / LARGEST
    return (wide / scale).to(E4M3), scale


def quantize_block(block: nn.Module, scaling: str = "row", kind: type[Fp8Linear] = Fp8Linear) -> list[str]:
    """Replace the large linears of a transformer block by `kind`; the names of those replaced."""
    done = []
    for name in LINEARS:
        parent, _, leaf = name.rpartition(".")
        if parent not in dict(block.named_modules()):
            continue
        owner = block.get_submodule(parent)
        linear = dict(owner.named_children()).get(leaf)
        if type(linear) is nn.Linear and not (linear.in_features % ALIGNMENT or linear.out_features % ALIGNMENT):
            setattr(owner, leaf, kind(linear, scaling))
            done.append(name)
    return done


def quantize_blocks(
    blocks: Sequence[nn.Module],
    scaling: str = "row",
    keep: Sequence[int] = UNQUANTIZED_BLOCKS,
    kind: type[Fp8Linear] = Fp8Linear,
) -> str:
    """`quantize_block` all blocks but those of `keep`; what was done, in words."""
    kept = {i % len(blocks) for i in keep}
    names = [quantize_block(block, scaling, kind) for i, block in enumerate(blocks) if i not in kept]
    return f"float8: {sum(map(len, names))} linears in {len(names)} of {len(blocks)} blocks"


@torch.no_grad()
def layer_errors(linears: dict[str, nn.Linear], inputs: dict[str, Tensor], scaling: str = "row") -> dict[str, float]:
    """Relative error ||fp8 - exact|| / ||exact|| of each layer for its input, by name."""
    errors = {}
    for name, linear in linears.items():
        exact = nn.functional.linear(*(x.double() for x in (inputs[name], linear.weight)), _double(linear.bias))
        off = Fp8Linear(linear, scaling)(inputs[name]).double() - exact
        errors[name] = float(off.norm() / exact.norm())
    return errors


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()
