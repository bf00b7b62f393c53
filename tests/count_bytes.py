"""Peak memory of a computation without doing it: on the meta device every storage is counted while it lives.

Attention is taken to be a fused kernel, which keeps its inputs and its result for a backward pass, and in that sums the
gradient of its queries in float32. What else a kernel needs as workspace, and what an allocator loses between blocks,
is not seen.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Counter(TorchDispatchMode):
    """`peak` is the most bytes that lived at once, of those made while it is on."""

    def __init__(self):
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    @property
    def now(self) -> int:
        self.alive = {storage: size for storage, size in self.alive.items() if not storage.expired()}
        return sum(self.alive.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {StorageWeakRef(x.untyped_storage()) for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor):
                storage = StorageWeakRef(x.untyped_storage())
                if storage not in known:
                    self.alive[storage] = x.untyped_storage().nbytes()
        self.peak = max(self.peak, self.now)
        return out


class FusedAttention(torch.autograd.Function):
    """Stands for an attention kernel: [B, L, heads, head_dim]. Its forward is one that checkpointing knows."""

    @staticmethod
    def forward(ctx, q, k, v):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, logsumexp = kernel(*(x.transpose(1, 2) for x in (q, k, v)))
        ctx.save_for_backward(q, k, v, out, logsumexp.float())
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, _, _ = ctx.saved_tensors
        sums = torch.empty_like(q, dtype=torch.float32)
        return torch.empty_like(sums, dtype=q.dtype), torch.empty_like(k), torch.empty_like(v)


def fused_attention(q, k, v, *args, **kwargs):
    return FusedAttention.apply(q, k, v)


class FusedNorm(torch.autograd.Function):
    """Stands for a GPU's RMS norm, which keeps its input and a number a row; on meta each step is kept in float32."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def fused_norm(x, shape, weight, eps=None):
    return FusedNorm.apply(x, weight)


@contextmanager
def counting(monkeypatch, *before: torch.Tensor):
    """Counts what is made within, and `before` while it lives; attention fused."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # it knows no meta device
    monkeypatch.setattr("model.causal_wan.dispatch_attention_fn", fused_attention)
    monkeypatch.setattr("diffusers.models.transformers.transformer_wan.dispatch_attention_fn", fused_attention)
    monkeypatch.setattr("torch.nn.functional.rms_norm", fused_norm)
    counter = Counter()
    counter.alive = {StorageWeakRef(x.untyped_storage()): x.untyped_storage().nbytes() for x in before}
    before = ()  # which would keep them alive
    with counter:
        yield counter
