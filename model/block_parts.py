"""Transformer blocks split before and after self-attention, to be compiled or for sequence parallelism."""

from types import MethodType
from typing import Any

from diffusers import WanTransformer3DModel
from torch import Tensor

from model.causal_wan import CausalWanBlock
from utils.compiling import TRAINING_OPTIONS, compile_function


class BidirectionalBlock(CausalWanBlock):
    """A block of diffusers' bidirectional network with its arguments and results, but split around self-attention."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor:
        """x [B, L, D] -> x. temb [B, 6, D]; rotary_emb as diffusers has it, with each angle twice."""
        cos, sin = rotary_emb
        rotary_emb = cos[..., 0::2], sin[..., 1::2]
        return super().forward(hidden_states, temb.unsqueeze(1), rotary_emb, encoder_hidden_states)[0]


def split_blocks(network: WanTransformer3DModel) -> WanTransformer3DModel:
    """Make the blocks of a bidirectional network `BidirectionalBlock`s, in place; a student is left unchanged."""
    for block in network.blocks:
        if not isinstance(block, CausalWanBlock):
            block.__class__ = BidirectionalBlock
    return network


def compile_blocks(network: WanTransformer3DModel, **options: Any) -> None:
    """Compile both parts, once for all blocks. options: of torch.compile; default TRAINING_OPTIONS.

    Self-attention is not compiled, because the student's has more keys with every chunk. A student needs about ten
    variants: with and without gradients, with adapters, with conditioning frames, with text embeddings or their keys.
    """
    for name in ("pre_attention", "post_attention"):
        shared = compile_function(
            getattr(CausalWanBlock, name), dynamic=False, **(options or {"options": TRAINING_OPTIONS})
        )
        for block in split_blocks(network).blocks:
            setattr(block, name, MethodType(shared, block))
