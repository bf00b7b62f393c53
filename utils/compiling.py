"""torch.compile as it is used here: each use counts its own variants, and gradients are right."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

# torch 2.10 to 2.13 make one Triton kernel of reductions over rows and over columns, and leave parts of a modulation
# table's gradient unwritten (pytorch/pytorch issue 193061, found on Wan): what was there before passes for a gradient.
TRAINING_OPTIONS = {"triton.mix_order_reduction": False}
RECOMPILE_LIMIT = 32  # of one function: widths, batch sizes, numbers of frames, with a graph and without


def compile_function(function: Callable, **options: Any) -> Callable:
    """`function`, compiled for itself: dynamo counts variants by code object, also those that other networks need, and
    what comes after the limit, 8 by default, is silently run as it is. options: of torch.compile.
    """
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    return torch.compile(own, **options)
