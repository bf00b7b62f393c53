"""torch.compile with a recompile limit for each use, and with correct gradients."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

# torch 2.10 to 2.13 fuse reductions over rows and columns into one Triton kernel that leaves parts of the gradient of
# the AdaLN table uninitialized (pytorch/pytorch issue 193061, found on Wan).
TRAINING_OPTIONS = {"triton.mix_order_reduction": False}
RECOMPILE_LIMIT = 32  # per function: widths, batch sizes, numbers of frames, with and without gradients


def compile_function(function: Callable, **options: Any) -> Callable:
    """Compile a copy of `function` with its own code object. options: of torch.compile.

    Dynamo counts variants per code object, including those for other networks, and silently runs further ones without
    compilation once there are 8 (by default).
    """
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__)
    return torch.compile(own, **options)
