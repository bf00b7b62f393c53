"""Sequence parallelism: the tokens of a sample are split over n ranks (DeepSpeed-Ulysses, arXiv 2309.14509).

    outside attention   [B, L / n, heads, head_dim]   each rank has a contiguous part of the tokens and all heads
    inside attention    [B, L, heads / n, head_dim]   each rank has all tokens and some heads; so has its KV cache

Inputs and outputs of a network are complete and equal on all ranks of a group, and so is the loss. The backward pass is
that of the *sum* of the n equal losses, so the mean of a parameter's gradients over the ranks is the gradient of one
loss. Data parallelism takes that mean anyway, so gradient averaging does not depend on the group.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


class SequenceGroup:
    """The ranks that share the tokens of a sample; this one is `rank` of `size`. group: None = no parallelism."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self._on = self.size > 1

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside the block this rank computes whole sequences by itself, without communication."""
        before, self._on = self._on, False
        try:
            yield
        finally:
            self._on = before

    def split(self, x: Tensor) -> Tensor:
        """This rank's tokens of x [B, L, ...]."""
        if not self._on:
            return x
        assert x.shape[1] % self.size == 0, f"{x.shape[1]} tokens on {self.size} ranks"
        return x.chunk(self.size, dim=1)[self.rank].clone(memory_format=torch.contiguous_format)  # not a view

    def split_frames(self, x: Tensor, tokens: int) -> Tensor:
        """Values a frame [B, F, ...] as this rank's tokens need them: [B, pieces, ...], of pieces of equal length.

        tokens: of a frame. A rank's tokens need not end with a frame, but each of its pieces lies in one. F = 1: as is.
        """
        if not self._on or x.shape[1] == 1:
            return x
        own = x.shape[1] * tokens // self.size
        piece = math.gcd(own, tokens)
        first = self.rank * own
        return torch.stack([x[:, at // tokens] for at in range(first, first + own, piece)], dim=1)

    def gather(self, x: Tensor) -> Tensor:
        """All tokens [B, L, ...] on every rank, from the parts [B, L / n, ...]."""
        if not self._on:
            return x
        return _Exchange.apply(x.expand(self.size, *x.shape), self.group).movedim(0, 1).flatten(1, 2)

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """x of rank `source` of the group, on every rank; of the other ranks' x only shape and dtype are used."""
        if not self._on:
            return x
        own = self.rank == source
        out = x.contiguous() if own else torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.broadcast(out, group=self.group, group_src=source)
        return out

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """[B, L / n, heads, head_dim] -> all tokens of this rank's heads [B, L, heads / n, head_dim]; one message."""
        if not self._on:
            return tensors
        assert tensors[0].shape[2] % self.size == 0, f"{tensors[0].shape[2]} heads on {self.size} ranks"
        by_rank = [x.unflatten(2, (self.size, -1)).permute(2, 0, 1, 3, 4) for x in tensors]
        out = _Exchange.apply(torch.stack(by_rank, dim=1), self.group)  # [n, tensors, B, L / n, heads / n, head_dim]
        return tuple(x.movedim(0, 1).flatten(1, 2) for x in out.unbind(1))  # copies, not views

    def to_tokens(self, x: Tensor) -> Tensor:
        """Inverse of `to_heads`: this rank's tokens with all heads [B, L / n, heads, head_dim]."""
        if not self._on:
            return x
        out = _Exchange.apply(x.unflatten(1, (self.size, -1)).movedim(1, 0), self.group)
        return out.permute(1, 2, 0, 3, 4).flatten(2, 3)  # heads of rank 0 first

    def heads_into(self, q: Tensor, k: Tensor, v: Tensor, k_slot: Tensor, v_slot: Tensor) -> Tensor:
        """`to_heads` without a gradient: keys and values go into slots [B, L, heads / n, head_dim]; returns queries."""
        parts = [_words(x).unflatten(2, (self.size, -1)) for x in (q, k, v)]
        batch, tokens, _, heads, words = parts[0].shape
        sent = parts[0].new_empty(self.size, 3, batch, tokens, heads, words)
        for i, part in enumerate(parts):
            sent[:, i].copy_(part.movedim(2, 0))
        came = self._swap(sent)
        for slot, part in ((k_slot, came[:, 1]), (v_slot, came[:, 2])):
            _words(slot).unflatten(1, (self.size, -1)).copy_(part.movedim(0, 1))
        return came[:, 0].movedim(0, 1).flatten(1, 2).view(q.dtype)

    def tokens_from(self, x: Tensor) -> Tensor:
        """`to_tokens` without a gradient."""
        came = self._swap(_words(x).unflatten(1, (self.size, -1)).movedim(1, 0).contiguous())
        return came.permute(1, 2, 0, 3, 4).flatten(2, 3).view(x.dtype)

    def _swap(self, sent: Tensor) -> Tensor:
        came = torch.empty_like(sent)
        dist.all_to_all_single(came, sent, group=self.group)
        return came


def _words(x: Tensor) -> Tensor:
    """x in words of eight bytes: what moves numbers of any type fast, and can send them."""
    return x.view(torch.int64)


class _Exchange(torch.autograd.Function):
    """All-to-all: part i of x [n, ...] goes to rank i, and part i of the result comes from there. It is its own
    transpose, so the backward pass is the same operation."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(grad, ctx.group), None
