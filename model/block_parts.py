"""Blocks in two parts, before self-attention and behind it: compiled, or with self-attention shared out over ranks."""

from types import FunctionType, MethodType
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from model.causal_wan import CausalWanBlock
from utils.compiling import TRAINED

VARIANTS = 32  # of a compiled part, for kinds of pass of a network in training


class WholeClipBlock(CausalWanBlock):
    """A block of diffusers' bidirectional network: its numbers and its arguments, in parts that can be compiled, and
    whose tokens can be shared out."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor:
        """temb [B, 6, D]; rotary_emb has each angle twice."""
        cos, sin = rotary_emb
        rotation = cos[..., 0::2], sin[..., 1::2]
        return super().forward(hidden_states, temb.unsqueeze(1), rotation, encoder_hidden_states)[0]


def in_parts(network: WanTransformer3DModel) -> WanTransformer3DModel:
    """Have the blocks of a bidirectional network be `WholeClipBlock`s, in place; a student's are what they were."""
    for block in network.blocks:
        if not isinstance(block, CausalWanBlock):
            block.__class__ = WholeClipBlock
    return network


def compile_parts(network: WanTransformer3DModel, **options: Any) -> None:
    """Compile both parts, once for all blocks. options: of torch.compile; by default those that gradients need.

    Self-attention stays as it is: a student's sees more keys chunk by chunk. A student has about ten kinds of pass:
    with a graph or without, with adapters, from a given image, with the text or keys of it. Past dynamo's limit of 8,
    those that come last would silently not be compiled.
    """
    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for name in ("_before", "_after"):
        part = getattr(CausalWanBlock, name)
        own = FunctionType(part.__code__.replace(), part.__globals__, name)  # dynamo counts compilations by code object
        shared = torch.compile(own, dynamic=False, **(options or {"options": TRAINED}))
        for block in in_parts(network).blocks:
            setattr(block, name, MethodType(shared, block))
