"""Activation checkpointing of transformer blocks, with or without saving the result of self-attention.

    selective_checkpoint   for blocks over whole clips. At 32,760 tokens self-attention is two thirds of the FLOPs of a
                           1.3B block, and its result is no larger than the block's input. Therefore the outputs of
                           torch's fused attention kernels (the result and a log-sum-exp per head) are saved. All else
                           is recomputed, cross-attention and the communication of sequence parallelism included.
    full_checkpoint        for blocks over one chunk at a time. Selecting what to save makes Python inspect every
                           operation, in forward and recomputation, and the kernels of a chunk are too short to hide it.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

NAMES = ("flash_attention", "cudnn_attention", "efficient_attention", "flash_attention_for_cpu")
KERNELS = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in NAMES]


# For diffusers' `enable_gradient_checkpointing`. The state of the random generator is not saved: a block draws no
# numbers, and on a GPU the state cannot be read during the capture of a CUDA graph.
_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def full_checkpoint(block: nn.Module, *args: Any) -> Any:
    """block(*args), saving only its arguments for the backward pass."""
    return _again(block, *args)


def selective_checkpoint(block: nn.Module, *args: Any) -> Any:
    """block(*args), saving its arguments and the outputs of self-attention's kernel for the backward pass."""
    return _again(block, *args, context_fn=partial(create_selective_checkpoint_contexts, _policy))


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save the outputs of attention kernels with at least as many keys as queries: self-, not cross-attention."""
    kept = op in KERNELS and args[1].shape[2] >= args[0].shape[2]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
