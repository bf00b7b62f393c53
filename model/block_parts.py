"""Blocks in two parts, before self-attention and behind it: compiled, or with self-attention shared out over ranks."""

from types import MethodType
from typing import Any

from diffusers import WanTransformer3DModel
from torch import Tensor

from model.causal_wan import CausalWanBlock
from utils.compiling import TRAINING_OPTIONS, compile_function


class BidirectionalBlock(CausalWanBlock):
    """A block of diffusers' bidirectional network: its numbers and its arguments, in parts that can be compiled, and
    whose tokens can be shared out."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor:
        """temb [B, 6, D]; rotary_emb has each angle twice."""
        cos, sin = rotary_emb
        rotary_emb = cos[..., 0::2], sin[..., 1::2]
        return super().forward(hidden_states, temb.unsqueeze(1), rotary_emb, encoder_hidden_states)[0]


def split_blocks(network: WanTransformer3DModel) -> WanTransformer3DModel:
    """Have the blocks of a bidirectional network be `BidirectionalBlock`s, in place; a student's are what they were."""
    for block in network.blocks:
        if not isinstance(block, CausalWanBlock):
            block.__class__ = BidirectionalBlock
    return network


def compile_blocks(network: WanTransformer3DModel, **options: Any) -> None:
    """Compile both parts, once for all blocks. options: of torch.compile; by default those that gradients need.

    Self-attention stays as it is: a student's sees more keys chunk by chunk. A student has about ten kinds of pass:
    with a graph or without, with adapters, from a given image, with the text or keys of it.
    """
    for name in ("pre_attention", "post_attention"):
        shared = compile_function(
            getattr(CausalWanBlock, name), dynamic=False, **(options or {"options": TRAINING_OPTIONS})
        )
        for block in split_blocks(network).blocks:
            setattr(block, name, MethodType(shared, block))
