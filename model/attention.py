"""Selection of attention kernels, and one call for all of them.

    q  [B, Lq, heads, head_dim]     k, v  [B, Lk, heads, head_dim]     ->  [B, Lq, heads, head_dim]

Self-attention reads thousands to tens of thousands of keys, cross-attention the 512 of the text. As measured on Hopper,
FlashAttention-3 is fastest for the first and cuDNN for the second; `auto` chooses accordingly.
"""

import importlib
import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from configs.errors import UserError
from utils import machine

# module -> namespace of its operators: FlashAttention-3 built from source, wheel `fa3-fwd`
FA3 = {"flash_attn_interface": "flash_attn_3", "fa3_fwd_interface": "fa3_fwd"}
FA3_HEAD, FA3_TILE = 128, 128  # queries of a thread block's tile, for heads of that size
LEAST_GAIN = 0.1  # share of the time that two calls must save over one
DIFFUSERS = {"sdpa": "native", "cudnn": "_native_cudnn", "fa2": "flash", "fa3": "_flash_3"}  # in diffusers
BACKENDS = {"sdpa": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
AMPERE, HOPPER = (8, 0), (9, 0)
HALF = (torch.bfloat16, torch.float16)  # dtypes that cuDNN attention supports


@dataclass(frozen=True)
class Kernels:
    """The kernels of self- and cross-attention, and the reason for the choice."""

    self_attention: str  # of self-attention, whose keys are the visible chunks
    cross_attention: str
    reason: str

    def __str__(self) -> str:
        return f"self-attention: {self.self_attention}, cross-attention: {self.cross_attention} ({self.reason})"


def pick_kernels(name: str, capability: tuple[int, int] | None, installed: Collection[str]) -> Kernels:
    """Kernels for `inference.attention`=name on a GPU of that compute capability (None: a CPU).

    installed: names as `utils.machine.kernels` gives them.
    Raises UserError for a kernel that is not installed or that the device cannot run.
    """
    if name == "auto":
        return _auto(capability, installed)
    if capability is None and name != "sdpa":
        raise UserError(f"inference.attention={name} needs a GPU and this device is none; use auto or sdpa")
    if name in ("fa2", "fa3") and name not in installed:
        package = "flash-attn" if name == "fa2" else "fa3-fwd"
        raise UserError(f"inference.attention={name} is not installed; `pip install {package}`, or use auto")
    if name == "fa3" and (capability is None or capability[0] != HOPPER[0]):
        raise UserError("inference.attention=fa3 runs on Hopper GPUs only (compute capability 9); use auto")
    return Kernels(name, "cudnn" if name == "fa3" else name, "as configured")


def _auto(capability: tuple[int, int] | None, installed: Collection[str]) -> Kernels:
    if capability is None:
        return Kernels("sdpa", "sdpa", "no GPU")
    generation = f"compute capability {capability[0]}.{capability[1]}"
    if capability[0] == HOPPER[0] and "fa3" in installed:
        return Kernels("fa3", "cudnn", f"{generation}, FlashAttention-3 is installed")
    if capability >= HOPPER:
        return Kernels("cudnn", "cudnn", f"{generation}, FlashAttention-3 is not installed")
    if capability >= AMPERE:
        return Kernels("flash", "flash", generation)
    return Kernels("sdpa", "sdpa", generation)


def pick_training_kernel(name: str, capability: tuple[int, int] | None, dtype: torch.dtype) -> str:
    """The kernel, sdpa or cudnn, of networks in training for `training.attention`=name and activations of `dtype`.

    capability: as in `pick_kernels`. Networks in float32 use sdpa, since cuDNN has no float32 kernel.
    Raises UserError for a kernel that the device cannot run.
    """
    if name == "cudnn" and (capability is None or capability < AMPERE):
        one = "this device is none" if capability is None else "this one has {}.{}".format(*capability)
        raise UserError(
            f"training.attention=cudnn needs a GPU of compute capability 8.0 or more and {one}; use auto or sdpa"
        )
    wanted = name == "cudnn" or (name == "auto" and capability is not None and capability >= HOPPER)
    return "cudnn" if wanted and dtype in HALF else "sdpa"


def set_attention(network: WanTransformer3DModel, kernel: str) -> None:
    """Set the attention kernel of `network`, a key of DIFFUSERS, for all calls of diffusers' dispatcher.

    diffusers' `set_attention_backend` is not used because it also changes the default of all other networks.
    """
    for block in network.blocks:
        for attn in (block.attn1, block.attn2):
            attn.processor._attention_backend = AttentionBackendName(DIFFUSERS[kernel])


def attention_support(device: torch.device) -> tuple[tuple[int, int] | None, list[str]]:
    """Compute capability of `device` and the kernels that are installed."""
    return compute_capability(device), machine.kernels()


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a GPU; None of a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def attend(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v, computed by `kernel`. For float8 (e4m3) inputs the result is bfloat16."""
    if kernel == "fa3":
        return _flash3(q, k, v)
    if q.dtype is torch.float8_e4m3fn:  # only fa3 supports it
        q, k, v = (x.bfloat16() for x in (q, k, v))
    if kernel == "fa2":
        return _fa2()(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    backend = BACKENDS[kernel]
    if backend is None:
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v).transpose(1, 2)


@cache
def full_waves(queries: int, heads: int, processors: int) -> tuple[int, int]:
    """Split of a FlashAttention-3 call against wave quantization: (queries of the first call, n).

    queries: per head. heads: of all streams together. processors: streaming multiprocessors of the GPU. Each processor
    works on one tile of queries of one head at a time, so a last wave that is not full leaves some of them idle. Its
    queries go to a second call instead, in which the keys are split into n parts; n = 1: a single call is as good.
    (480x832, 12 heads, 132 processors: 444 tiles are 3.4 waves, which cost 4; in two calls they cost 3.5.)
    """
    tiles = -(-queries // FA3_TILE)
    full, once = tiles * heads // processors * processors // heads, -(-tiles * heads // processors)
    if not 0 < full < tiles:
        return queries, 1
    second, n = min((-(-(tiles - full) * heads * n // processors) / n, n) for n in (2, 3, 4))
    gain = 1 - (-(-full * heads // processors) + second) / once
    return (full * FA3_TILE, n) if gain >= LEAST_GAIN else (queries, 1)


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention-3, split as by `full_waves` where no gradient is needed."""
    first, n = q.shape[1], 1
    if q.shape[3] == FA3_HEAD and _fa3_forward() and not torch.is_grad_enabled():
        first, n = full_waves(q.shape[1], q.shape[0] * q.shape[2], _processors(q.device))
    if n == 1:
        return _first(_fa3()(q, k, v))
    out = torch.empty(q.shape, device=q.device, dtype=torch.bfloat16 if q.dtype is torch.float8_e4m3fn else q.dtype)
    options = {"softmax_scale": q.shape[3] ** -0.5}
    forward = _fa3_forward()
    forward(q[:, :first], k, v, out=out[:, :first], num_splits=1, **options)
    forward(q[:, first:], k, v, out=out[:, first:], num_splits=n, **options)
    return out


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Some builds of FlashAttention-3 also return the log-sum-exp of the softmax."""
    return out if isinstance(out, Tensor) else out[0]


@cache
def _fa3() -> Callable[..., Tensor]:
    return importlib.import_module(_fa3_module()).flash_attn_func


@cache
def _fa3_forward() -> Callable[..., list[Tensor]] | None:
    """The operator underneath, which takes an output tensor; None where a build does not have it."""
    importlib.import_module(_fa3_module())
    operators = getattr(torch.ops, FA3[_fa3_module()])
    return operators.fwd if hasattr(operators, "fwd") else None


def _fa3_module() -> str:
    return next(name for name in FA3 if importlib.util.find_spec(name))


@cache
def _fa2() -> Callable[..., Tensor]:
    return importlib.import_module("flash_attn").flash_attn_func
