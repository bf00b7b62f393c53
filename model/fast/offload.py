"""Inference with less GPU memory and the same results: networks in host memory."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor

from model.causal_wan import CausalWanModel
from model.text import TextEncoder


class OffloadedTextEncoder(TextEncoder):
    """A text encoder in host memory that runs on `device`.

    stream: its blocks are moved to the device one at a time (diffusers' group offloading), and the token embedding for
    the duration of a call. Otherwise the whole encoder is moved to the device for each call.
    """

    def __init__(self, text: TextEncoder, device: torch.device | str, *, stream: bool):
        super().__init__(text.encoder, text.tokenizer, text.text_tokens)
        assert text.encoder.device.type == "cpu", "load it on the host first"
        self.device, self.stream = torch.device(device), stream
        if stream:
            apply_group_offloading(
                self.encoder.encoder,
                onload_device=self.device,
                offload_device=torch.device("cpu"),
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=self.device.type == "cuda",  # the next block is copied while this one runs
                low_cpu_mem_usage=True,  # pins one block at a time, so that weights stay memory-mapped
            )

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """[B, text_tokens, dim] on the device, zeros after each prompt's end."""
        ids, mask = (x.to(self.device) for x in self.tokenize(prompts))
        if self.stream:
            return self.embed(ids, mask)
        tensors = [*self.encoder.parameters(), *self.encoder.buffers()]
        host = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device)
            return self.embed(ids, mask)
        finally:
            for tensor, kept in zip(tensors, host, strict=True):
                tensor.data = kept


class BlockOffload:
    """Keeps a student's blocks in host memory. Each block is on `device` while it runs, and the next is prefetched.

    Two buffers on the device hold blocks alternately, copied from pinned memory on a separate CUDA stream; the host
    never waits. Everything other than blocks stays on the device. Blocks may be changed between passes (adapters).

    diffusers' group offloading, which the text encoder uses, does not fit: it only hooks `forward`, while the keys of
    the text are computed by `text_kv`, and it would move the rest of the network to the host after each pass.
    """

    def __init__(self, student: CausalWanModel, device: torch.device | str):
        assert student.device.type == "cpu", "load it on the host first"
        self.device = torch.device(device)
        self._gpu = self.device.type == "cuda"
        self._blocks = [[*block.parameters(), *block.buffers()] for block in student.blocks]
        blocks = {id(tensor) for block in self._blocks for tensor in block}
        for tensor in (*student.parameters(), *student.buffers()):
            if id(tensor) not in blocks:
                tensor.data = tensor.data.to(self.device)
            elif self._gpu:
                tensor.data = tensor.data.pin_memory()
        size = max(sum(_aligned_size(tensor) for tensor in block) for block in self._blocks)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        self._copies = torch.cuda.Stream(self.device) if self._gpu else None
        self._filled, self._finished = ([torch.cuda.Event() for _ in range(2)] if self._gpu else [] for _ in range(2))
        self._current: int | None = None  # index of the block on the device
        self._prefetched: tuple[int, list[Tensor]] | None = None  # index and tensors of the block that is being copied
        for i, block in enumerate(student.blocks):
            for name in ("forward", "text_kv"):
                setattr(block, name, self._with_block(i, getattr(block, name)))

    @property
    def bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(slot.nbytes for slot in self._slots)

    def _with_block(self, i: int, call: Callable) -> Callable:
        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            with nullcontext() if self._current == i else self._onloaded(i):
                return call(*args, **kwargs)

        return run

    @contextmanager
    def _onloaded(self, i: int) -> Iterator[None]:
        """Inside, block i is on the device, and block i + 1 is being copied."""
        assert self._current is None, f"block {i} within block {self._current}"
        if self._prefetched is None or self._prefetched[0] != i:
            self._fetch(i)
        here, host = self._prefetched[1], [tensor.data for tensor in self._blocks[i]]
        if self._gpu:
            torch.cuda.current_stream(self.device).wait_event(self._filled[i % 2])
        self._current, self._prefetched = i, None
        try:
            for tensor, value in zip(self._blocks[i], here, strict=True):
                tensor.data = value
            if i + 1 < len(self._blocks):  # not block 0, which may be changed before the next pass
                self._fetch(i + 1)
            yield
        finally:
            for tensor, value in zip(self._blocks[i], host, strict=True):
                tensor.data = value
            if self._gpu:
                self._finished[i % 2].record(torch.cuda.current_stream(self.device))
            self._current = None

    def _fetch(self, i: int) -> None:
        """Start to copy block i into its buffer, after the block that is in there has finished."""
        slot, start, there = self._slots[i % 2], 0, []
        with torch.cuda.stream(self._copies) if self._gpu else nullcontext():
            if self._gpu:
                self._copies.wait_event(self._finished[i % 2])
            for tensor in self._blocks[i]:
                place = slot[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                there.append(place.copy_(tensor.data, non_blocking=True))
                start += _aligned_size(tensor)
            if self._gpu:
                self._filled[i % 2].record(self._copies)
        self._prefetched = (i, there)


def _aligned_size(tensor: Tensor) -> int:
    """Bytes of a tensor in a buffer, rounded up to an alignment of 256."""
    return -(-tensor.nbytes // 256) * 256
