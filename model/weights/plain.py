"""Recovers freshly loaded networks from networks that inference has changed.

Inference changes a network in place: projections are fused, blocks are offloaded, a decoder's forward is replaced. To
be stored or moved, a network is rebuilt without these changes. Weights that no longer exist (in 8 bits, under adapters)
are refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from configs.errors import UserError
from model.causal_wan import CausalWanModel
from model.tiny_decoder import TinyDecoder
from model.weights.load import assembled, stored_dtype
from model.weights.plans import diffusers_network, unique_state_dict

MAKERS: Mapping[type, Callable[[Any], nn.Module]] = {
    CausalWanModel: lambda config: diffusers_network(CausalWanModel, config),
    AutoencoderKLWan: lambda config: diffusers_network(AutoencoderKLWan, config),
    UMT5EncoderModel: UMT5EncoderModel,
    TinyDecoder: TinyDecoder,
}
FUSED = ".attn1.to_qkv."


def plain(network: nn.Module, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """A fresh network with the weights of `network`; tensors that need no copy are shared.

    device, dtype: None = unchanged. Raises UserError if weights are kept in another form.
    """
    state = _split({name: value.detach() for name, value in unique_state_dict(network).items()})
    with init_empty_weights(include_buffers=False):
        fresh = MAKERS[type(network)](network.config)
    wanted = unique_state_dict(fresh)
    shapes = ({name: tuple(value.shape) for name, value in values.items()} for values in (wanted, state))
    if next(shapes) != next(shapes):
        raise UserError(
            f"the weights of {type(network).__name__} are held in 8 bits or under adapters; load the pipeline with "
            f"inference.precision=auto inference.text_int8=false model.lora_merge=true to have them whole"
        )

    def placed(name: str, value: Tensor) -> Tensor:
        kept = value.dtype if dtype is None else stored_dtype(network, name, dtype)
        return value.to(value.device if device is None else device, kept).contiguous()

    whole = assembled(fresh, {name: placed(name, value) for name, value in state.items()})
    return whole if device is None else whole.to(device)


def _split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with fused projections split into q, k and v."""
    out = {}
    for name, value in state.items():
        if FUSED in name:
            parts = value.chunk(3)
            out |= {name.replace(FUSED, f".attn1.to_{part}."): rows for part, rows in zip("qkv", parts, strict=True)}
        else:
            out[name] = value
    return out


def exact_dtype(network: nn.Module) -> torch.dtype | None:
    """The half-precision dtype that holds all floating-point values of `network` exactly, or None."""
    values = [value for value in network.state_dict().values() if value.is_floating_point()]
    for dtype in (torch.float16, torch.bfloat16):
        if all(torch.equal(value.to(dtype).to(value.dtype), value) for value in values):
            return dtype
    return None
