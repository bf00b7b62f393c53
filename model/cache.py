"""The chunk KV cache, for streaming and for training.

    slots     [ sink ........ | ring ................. ]     one slot = the tokens of one chunk
    chunks    [ 0 .. sink - 1 | the newest, any order  ]     sink + ring = geometry.window_chunks slots

    filling    chunk k < window: written to slot k; slots 0..k are visible
    rolling    chunk k >= window: overwrites the oldest ring slot; all slots are visible
    rewriting  each denoising step of chunk k, and its context pass, writes slot(k) again

Keys are stored after rotary embedding with absolute frame indices. Attention therefore does not depend on their order,
and nothing is moved. The visible slots are always a prefix that includes the chunk's own slot. `window_chunks` = 0
never evicts. All indices are Python integers: reading one never waits for the GPU.

    view = cache.begin(chunk)               # chunk is the newest one again, or the next; gaps raise
    k, v = view.put(layer, k, v)            # [B, tokens, heads, head_dim] -> all visible keys and values, in slot order

`StreamCache` writes in place and is for inference. `GraphCache` is the equivalent for training: it writes nothing in
place and keeps the autograd graph, so that the tensors that a forward pass read are unchanged until its backward pass
has run, recomputation included. A StreamCache may hold float8 (e4m3): keys are normalized and values have a similar
size, so neither needs a scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from configs.geometry import Geometry
from model.fp8 import E4M3, LARGEST

KV = tuple[Tensor, Tensor]  # keys and values, each [B, tokens, heads, head_dim]

INITIAL_CAPACITY = 8  # chunks that an unbounded StreamCache makes room for at first


def cast_for_cache(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x for a cache of `dtype`: float8 values are clamped to the range first, which not every version of torch does."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3) if dtype is E4M3 else x


class LayerView(Protocol):
    """One layer of a View: all that attention knows of the cache."""

    def put(self, k: Tensor, v: Tensor) -> tuple[KV, KV | None]:
        """The visible keys and values, and what must be passed to `View.keep` (None if it is already written)."""


class View(Protocol):
    """The part of a cache that a forward pass of one chunk reads and writes."""

    def layer(self, index: int) -> LayerView: ...

    def keep(self, index: int, kv: KV) -> None: ...

    def put(self, layer: int, k: Tensor, v: Tensor) -> KV: ...


def slot(geometry: Geometry, chunk: int) -> int:
    """Slot that holds `chunk`."""
    if not geometry.window_chunks or chunk < geometry.sink_chunks:
        return chunk
    ring = geometry.window_chunks - geometry.sink_chunks
    assert ring > 0, f"a window of {geometry.window_chunks} chunks has no room beside {geometry.sink_chunks} of sink"
    return geometry.sink_chunks + (chunk - geometry.sink_chunks) % ring


def visible_slots(geometry: Geometry, chunk: int) -> int:
    """Number of slots that `chunk` attends to, its own included; they are the first ones."""
    return min(chunk + 1, geometry.window_chunks) if geometry.window_chunks else chunk + 1


class _Cursor:
    """Keeps track of the newest chunk and checks that the chunk before it was written in all layers."""

    def __init__(self, geometry: Geometry, layers: int):
        self.geometry = geometry
        self.layers = layers
        self.last = -1  # newest chunk begun
        self.filled: set[int] = set()  # layers that the newest chunk has written

    def advance(self, chunk: int) -> None:
        """Make `chunk` the newest one; it must be the current newest or the next."""
        assert chunk in (max(self.last, 0), self.last + 1), f"chunk {chunk} cannot follow chunk {self.last}"
        if chunk > self.last:
            done = self.last < 0 or len(self.filled) == self.layers
            assert done, f"chunk {self.last} wrote {len(self.filled)} of {self.layers} layers before chunk {chunk}"
            self.last, self.filled = chunk, set()


class StreamCache(_Cursor):
    """A ring of chunk slots that is written in place. Memory is constant unless the window is unbounded.

    Keys and values of a layer: [batch, slots x tokens_per_chunk, heads, head_dim]. With an unbounded window the
    buffers double when they are full; `max_chunks` allocates enough for that many chunks at once.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        geometry: Geometry,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        max_chunks: int | None = None,
    ):
        super().__init__(geometry, layers)
        slots = geometry.window_chunks or max_chunks or INITIAL_CAPACITY
        shape = (batch, slots * geometry.tokens_per_chunk, heads, head_dim)
        self._keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(layers)]
        self._values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(layers)]

    def begin(self, chunk: int) -> "StreamView":
        """View for one or more forward passes of `chunk`; enlarges the buffers if necessary."""
        self.advance(chunk)
        end = visible_slots(self.geometry, chunk) * self.geometry.tokens_per_chunk
        if end > self._keys[0].shape[1]:
            self._keys = [_doubled(k) for k in self._keys]
            self._values = [_doubled(v) for v in self._values]
        start = slot(self.geometry, chunk) * self.geometry.tokens_per_chunk
        return StreamView(self, start, end)

    def detach(self) -> None:
        """Does nothing, since there is no graph."""

    def reset(self) -> None:
        """Empty the cache; the buffers stay allocated."""
        self.last, self.filled = -1, set()

    def rewrite(self, position: int) -> "StreamView":
        """View that writes slot `position` and sees slots 0 to `position`: the past, made again from its start."""
        tokens = self.geometry.tokens_per_chunk
        assert 0 <= position < visible_slots(self.geometry, self.last), f"slot {position} is empty"
        return StreamView(self, position * tokens, (position + 1) * tokens)

    def permute(self, order: Sequence[int]) -> None:
        """Move slots: the new slot i holds what slot `order[i]` held. `order` names each of the first so many once."""
        assert sorted(order) == list(range(len(order))), f"{order} is no permutation"
        moved = [i for i, source in enumerate(order) if i != source]
        for buffer in self._keys + self._values if moved else ():
            slots = buffer.unflatten(1, (-1, self.geometry.tokens_per_chunk))
            for i, content in [(i, slots[:, order[i]].clone()) for i in moved]:
                slots[:, i] = content

    @torch.no_grad()
    def shift_keys(self, position: int, frames: int, shift: Callable[[Tensor, int], Tensor]) -> None:
        """Put shift(keys, frames) in place of the keys of slot `position`, in every layer."""
        tokens = self.geometry.tokens_per_chunk
        for buffer in self._keys:
            own = buffer[:, position * tokens : (position + 1) * tokens]
            wide = own.bfloat16() if own.dtype is E4M3 else own
            own.copy_(cast_for_cache(shift(wide, frames), own.dtype))

    def snapshot(self, device: torch.device | str | None = None) -> "CacheState":
        """A copy of what is filled, on `device` (None: where it is)."""
        end = visible_slots(self.geometry, self.last) * self.geometry.tokens_per_chunk if self.last >= 0 else 0
        copies = ([x[:, :end].to(device or x.device, copy=True) for x in xs] for xs in (self._keys, self._values))
        return CacheState(self.last, frozenset(self.filled), *copies)

    def restore(self, state: "CacheState") -> None:
        """Go back to `state`, which may come from another cache of the same sizes."""
        for buffers, saved in ((self._keys, state.keys), (self._values, state.values)):
            for i, x in enumerate(saved):
                while x.shape[1] > buffers[i].shape[1]:
                    buffers[i] = _doubled(buffers[i])
                buffers[i][:, : x.shape[1]].copy_(x)
        self.last, self.filled = state.last, set(state.filled)

    @property
    def capacity(self) -> int:
        """Chunks that the buffers hold as they are."""
        return self._keys[0].shape[1] // self.geometry.tokens_per_chunk

    @property
    def dtype(self) -> torch.dtype:
        return self._keys[0].dtype

    @property
    def bytes(self) -> int:
        """Bytes of the buffers, filled or not."""
        return sum(x.nbytes for x in self._keys + self._values)


@dataclass(frozen=True, eq=False)
class CacheState:
    """What a StreamCache held at one time; keys and values of each layer, `[B, tokens filled, heads, head_dim]`."""

    last: int
    filled: frozenset[int]
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in self.keys + self.values)


class StreamView:
    """View that writes tokens [start, start + tokens_per_chunk) and reads [0, end)."""

    def __init__(self, cache: StreamCache, start: int, end: int):
        self._cache, self._start, self._end = cache, start, end
        self._chunk = cache.last

    def layer(self, index: int) -> "StreamLayer":
        """Layer `index`, which counts as written from now on."""
        cache = self._cache
        assert self._chunk == cache.last, f"view of chunk {self._chunk}, but the cache is at chunk {cache.last}"
        cache.filled.add(index)
        return StreamLayer(
            cache._keys[index], cache._values[index], self._start, cache.geometry.tokens_per_chunk, self._end
        )

    def keep(self, index: int, kv: KV) -> None:
        """Does nothing: `put` has written it."""

    def put(self, layer: int, k: Tensor, v: Tensor) -> KV:
        """Write this chunk's keys and values of a layer, and return all that is visible, in slot order."""
        return self.layer(layer).put(k, v)[0]


@dataclass(frozen=True, eq=False)
class StreamLayer:
    """Buffers of one layer and the place to write to, so that compiled blocks do not depend on the layer's index."""

    keys: Tensor
    values: Tensor
    start: int
    tokens: int
    end: int

    def put(self, k: Tensor, v: Tensor) -> tuple[KV, None]:
        """Write, and return the visible prefix in the dtype of k: views of the buffers, valid until the next write."""
        assert not (k.requires_grad or v.requires_grad), "StreamCache would lose the graph; train with GraphCache"
        assert k.shape[1] == self.tokens, f"{k.shape[1]} tokens for a slot of {self.tokens}"
        self.keys[:, self.start : self.start + self.tokens].copy_(cast_for_cache(k, self.keys.dtype))
        self.values[:, self.start : self.start + self.tokens].copy_(cast_for_cache(v, self.values.dtype))
        return (self.keys[:, : self.end].to(k.dtype), self.values[:, : self.end].to(v.dtype)), None


class GraphCache(_Cursor):
    """The functional equivalent of StreamCache: keeps each chunk's tensors with their graph and concatenates them anew
    in each forward pass.

    Keys have the same slot order as in StreamCache, so that both give bit-identical results.
    """

    def __init__(self, geometry: Geometry, layers: int):
        super().__init__(geometry, layers)
        self._slots: list[dict[int, KV]] = [{} for _ in range(layers)]

    def begin(self, chunk: int) -> "GraphView":
        """A new view for one forward pass of `chunk`; what it reads of other chunks is fixed here."""
        self.advance(chunk)
        own, end = slot(self.geometry, chunk), visible_slots(self.geometry, chunk)
        return self._view(own, end)

    def rewrite(self, position: int) -> "GraphView":
        """View that writes slot `position` and sees slots 0 to `position`: the past, made again from its start."""
        assert 0 <= position < visible_slots(self.geometry, self.last), f"slot {position} is empty"
        return self._view(position, position + 1)

    def _view(self, own: int, end: int) -> "GraphView":
        tokens = self.geometry.tokens_per_chunk
        return GraphView(self, [_around(slots, own, end, tokens) for slots in self._slots], own)

    def permute(self, order: Sequence[int]) -> None:
        """Move slots: the new slot i holds what slot `order[i]` held. `order` names each of the first so many once."""
        assert sorted(order) == list(range(len(order))), f"{order} is no permutation"
        self._slots = [{i: slots[source] for i, source in enumerate(order)} for slots in self._slots]

    def newest(self) -> list[KV]:
        """Keys and values of the newest chunk, a pair a layer."""
        own = slot(self.geometry, self.last)
        return [slots[own] for slots in self._slots]

    def borrow_graph(self, other: list[KV]) -> None:
        """Keep the newest chunk's numbers and give them the graph of `other`, what `newest` returned of it before.

        Straight-through: the numbers that later chunks read are unchanged, their gradient goes where `other` came from.
        """
        own = slot(self.geometry, self.last)
        for slots, with_graph in zip(self._slots, other, strict=True):
            k, v = (x.detach() + (y - y.detach()) for x, y in zip(slots[own], with_graph, strict=True))
            slots[own] = (k, v)

    def shift_keys(self, position: int, frames: int, shift: Callable[[Tensor, int], Tensor]) -> None:
        """Put shift(keys, frames) in place of the keys of slot `position`, in every layer, with its graph."""
        for slots in self._slots:
            k, v = slots[position]
            slots[position] = (shift(k, frames), v)

    def detach(self) -> None:
        """Cut the graph of what is stored: later chunks send no gradient into earlier ones (context_grad: false)."""
        self._slots = [{i: (k.detach(), v.detach()) for i, (k, v) in slots.items()} for slots in self._slots]


class GraphView:
    """Other chunks' tensors by layer, as they were when the view was made."""

    def __init__(self, cache: GraphCache, past: list["GraphLayer"], own: int):
        self._cache, self._past, self._own = cache, past, own
        self._chunk = cache.last

    def layer(self, index: int) -> "GraphLayer":
        """Layer `index` as this view sees it."""
        return self._past[index]

    def keep(self, index: int, kv: KV) -> None:
        """Store this chunk's keys and values of a layer for later chunks."""
        cache = self._cache
        assert self._chunk == cache.last, f"view of chunk {self._chunk}, but the cache is at chunk {cache.last}"
        cache.filled.add(index)
        cache._slots[index][self._own] = kv

    def put(self, layer: int, k: Tensor, v: Tensor) -> KV:
        """Store this chunk's keys and values of a layer, and return all that is visible, in slot order."""
        seen, kept = self.layer(layer).put(k, v)
        self.keep(layer, kept)
        return seen


@dataclass(frozen=True, eq=False)
class GraphLayer:
    """Other chunks' tensors in the slots before and after this chunk's own. Has no side effects, so it can be rerun."""

    before: tuple[KV, ...]
    after: tuple[KV, ...]
    tokens: int

    def put(self, k: Tensor, v: Tensor) -> tuple[KV, KV]:
        """The visible keys and values, concatenated; and (k, v), to be stored outside of any checkpointed region."""
        assert k.shape[1] == self.tokens, f"{k.shape[1]} tokens for a slot of {self.tokens}"
        keys = torch.cat([*(p[0] for p in self.before), k, *(p[0] for p in self.after)], dim=1)
        values = torch.cat([*(p[1] for p in self.before), v, *(p[1] for p in self.after)], dim=1)
        return (keys, values), (k, v)


def _around(slots: dict[int, KV], own: int, end: int, tokens: int) -> GraphLayer:
    """The visible slots other than `own`."""
    return GraphLayer(tuple(slots[i] for i in range(own)), tuple(slots[i] for i in range(own + 1, end)), tokens)


def _doubled(x: Tensor) -> Tensor:
    """x in a buffer of twice its length along tokens."""
    wide = x.new_empty(x.shape[0], 2 * x.shape[1], *x.shape[2:])
    wide[:, : x.shape[1]] = x
    return wide
