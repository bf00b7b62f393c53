"""Activation checkpointing: the backward pass computes a block again, whole or but for its self-attention.

    checkpointed   blocks over whole clips. Over 32,760 tokens self-attention is two thirds of the operations of a 1.3B
                   block, and its result is no larger than the block's input. So what torch's fused kernels return, the
                   result and a logsumexp for each head, is kept. All else is computed again: attention to the text,
                   whose result takes as much room and one operation in a hundred, and the messages of ranks that share
                   tokens.
    recomputed     blocks over a chunk at a time. To choose what is kept, Python looks at every operation, forward and
                   again, and the kernels of a chunk are too short to hide that.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

NAMES = ("flash_attention", "cudnn_attention", "efficient_attention", "flash_attention_for_cpu")
KERNELS = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in NAMES]


# For diffusers' `enable_gradient_checkpointing`. The state of random numbers is left alone: a block draws none, and of
# a GPU it cannot be read while a CUDA graph is captured.
_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


def full_checkpoint(block: nn.Module, *args: Any) -> Any:
    """block(*args), of which the backward pass has the arguments alone."""
    return _again(block, *args)


def selective_checkpoint(block: nn.Module, *args: Any) -> Any:
    """block(*args), of which the backward pass also has what self-attention's kernel returned."""
    return _again(block, *args, context_fn=partial(create_selective_checkpoint_contexts, _policy))


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what a kernel returns where there are as many keys as queries: tokens, not text."""
    kept = op in KERNELS and args[1].shape[2] >= args[0].shape[2]
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
