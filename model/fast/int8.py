"""Linear layers with int8 weights: half the memory of bfloat16, for networks that run rarely.

    y = x (s q)^T + b      q = round(w / s) in -127..127, s = amax / 127 for each output

Only weights are quantized; inputs, accumulation and results keep their dtype, so outliers of the inputs do no harm. The
weights are dequantized in each call, which costs time; a text encoder runs once per prompt.
"""

import torch
from torch import Tensor, nn

LARGEST = 127
TINY = 1e-12  # amax of a row of zeros


class Int8Linear(nn.Module):
    """Replacement of a linear layer for inference. Quantized on `device`, then stored on `storage_device`."""

    def __init__(self, linear: nn.Linear, device: torch.device | str, storage_device: torch.device | str):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, scale = quantize(linear.weight.detach().to(device))
        self.register_buffer("weight", weight.to(storage_device))
        self.register_buffer("scale", scale.to(storage_device, linear.weight.dtype))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(storage_device))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> int8 [N, K] and its scale, float32 [N, 1]."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1, keepdim=True).clamp_min(TINY) / LARGEST
    return (wide / scale).round().to(torch.int8), scale


@torch.no_grad()
def quantize_linears(network: nn.Module, device: torch.device | str, storage_device: torch.device | str) -> int:
    """Replace all linear layers of `network`; returns their number."""
    linears = [(owner, name) for owner in network.modules() for name, part in owner.named_children()
               if type(part) is nn.Linear]  # fmt: skip
    for owner, name in linears:
        setattr(owner, name, Int8Linear(owner.get_submodule(name), device, storage_device))
    return len(linears)
