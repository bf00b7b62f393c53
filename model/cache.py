"""The chunk KV cache: what a chunk sees of the past, for streaming and for training.

    slots     [ sink ........ | ring ................. ]     one slot = the tokens of one chunk
    chunks    [ 0 .. sink - 1 | the newest, any order  ]     sink + ring = geometry.window_chunks slots

    filling   chunk k < window: slot k, and slots 0..k are visible
    rolling   chunk k >= window: it overwrites the oldest ring slot, and every slot is visible
    rewriting each denoising step of chunk k, and its context pass, writes slot(k) again

Keys are stored after rotary embedding with absolute frame indices, so attention does not care about their order and
nothing is ever moved. What is visible is always a prefix of the slots, itself included. `window_chunks` = 0 never
evicts. All indices are Python integers: reading one never waits for the GPU.

    view = cache.begin(chunk)               # chunk is the newest one again, or the next; a gap is refused
    k, v = view.put(layer, k, v)            # [B, tokens, heads, head_dim] -> all that is visible, in slot order

`StreamCache` writes in place and is for inference. `GraphCache` is its twin for training: it writes nothing in place
and keeps the graph, so that what a forward read stays as it was until its backward has run, recomputation included.
A StreamCache may hold float8 (e4m3): keys are normalised and values of their size, so neither needs a scale.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from configs.geometry import Geometry
from model.fp8 import E4M3, LARGEST

KV = tuple[Tensor, Tensor]  # keys and values, each [B, tokens, heads, head_dim]

INITIAL_CAPACITY = 8  # chunks that an unbounded StreamCache makes room for at first


def cast_for_cache(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a cache of `dtype` can take it: what is too large for float8 is clamped, which not every torch does."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3) if dtype is E4M3 else x


class LayerView(Protocol):
    """One layer of a View; attention calls it, and holds nothing else of the cache."""

    def put(self, k: Tensor, v: Tensor) -> tuple[KV, KV | None]:
        """What is visible, and what must be handed to `View.keep` (None where it is written already)."""


class View(Protocol):
    """What one forward of one chunk reads and writes."""

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
    """Slots that `chunk` sees, its own included: the first so many."""
    return min(chunk + 1, geometry.window_chunks) if geometry.window_chunks else chunk + 1


class _Cursor:
    """Which chunk is the newest, and that the one before it was written whole."""

    def __init__(self, geometry: Geometry, layers: int):
        self.geometry = geometry
        self.layers = layers
        self.last = -1  # newest chunk begun
        self.filled: set[int] = set()  # layers that the newest chunk has written

    def advance(self, chunk: int) -> None:
        """Make `chunk` the newest: the same again, or the next one."""
        assert chunk in (max(self.last, 0), self.last + 1), f"chunk {chunk} cannot follow chunk {self.last}"
        if chunk > self.last:
            done = self.last < 0 or len(self.filled) == self.layers
            assert done, f"chunk {self.last} wrote {len(self.filled)} of {self.layers} layers before chunk {chunk}"
            self.last, self.filled = chunk, set()


class StreamCache(_Cursor):
    """A ring of chunk slots, written in place; no copies, no growth unless the window is unbounded.

    Keys and values of a layer: [batch, slots x tokens_per_chunk, heads, head_dim]. An unbounded window doubles its
    room as it fills; `max_chunks` says beforehand how much it will need.
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
        """View for one or more forwards of `chunk`; makes room for it."""
        self.advance(chunk)
        end = visible_slots(self.geometry, chunk) * self.geometry.tokens_per_chunk
        if end > self._keys[0].shape[1]:
            self._keys = [_doubled(k) for k in self._keys]
            self._values = [_doubled(v) for v in self._values]
        start = slot(self.geometry, chunk) * self.geometry.tokens_per_chunk
        return StreamView(self, start, end)

    def detach(self) -> None:
        """Nothing: it holds no graph."""

    def reset(self) -> None:
        """Forget everything; the room stays."""
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
        """Bytes held, whatever is filled."""
        return sum(x.nbytes for x in self._keys + self._values)


@dataclass(frozen=True, eq=False)
class CacheState:
    """What a StreamCache held at one time; keys and values of each layer, `[B, tokens filled, heads, head_dim]`."""

    last: int
    filled: frozenset[int]
    keys: list[Tensor]
    values: list[Tensor]
    shared: Any = None  # of several ranks: whose, and the name of the others' parts (pipeline/sequence_parallel.py)

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in self.keys + self.values)


class StreamView:
    """Writes tokens [start, start + tokens_per_chunk), sees [0, end)."""

    def __init__(self, cache: StreamCache, start: int, end: int):
        self._cache, self._start, self._end = cache, start, end
        self._chunk = cache.last

    def layer(self, index: int) -> "StreamLayer":
        """Layer `index`, which the caller is about to write."""
        cache = self._cache
        assert self._chunk == cache.last, f"view of chunk {self._chunk}, but the cache is at chunk {cache.last}"
        cache.filled.add(index)
        return StreamLayer(
            cache._keys[index], cache._values[index], self._start, cache.geometry.tokens_per_chunk, self._end
        )

    def keep(self, index: int, kv: KV) -> None:
        """Nothing: `put` has written it."""

    def put(self, layer: int, k: Tensor, v: Tensor) -> KV:
        """Write this chunk's keys and values of a layer, and return all that is visible, in slot order."""
        return self.layer(layer).put(k, v)[0]


@dataclass(frozen=True, eq=False)
class StreamLayer:
    """Buffers of one layer and where to write, so that a compiled block depends on no layer's number."""

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
    """The functional twin of StreamCache: chunk tensors with their graph, joined afresh by each forward.

    What is visible comes in the same slot order, so that both give bit-identical results.
    """

    def __init__(self, geometry: Geometry, layers: int):
        super().__init__(geometry, layers)
        self._slots: list[dict[int, KV]] = [{} for _ in range(layers)]

    def begin(self, chunk: int) -> "GraphView":
        """A fresh view for one forward of `chunk`; what it reads of other chunks is fixed here."""
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

    def reset(self) -> None:
        """Forget everything."""
        self.last, self.filled = -1, set()
        self._slots = [{} for _ in range(self.layers)]

    @property
    def bytes(self) -> int:
        """Bytes of the tensors stored."""
        return sum(k.nbytes + v.nbytes for slots in self._slots for k, v in slots.values())


class GraphView:
    """Past tensors by layer, frozen when the view was made."""

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
    """Other chunks' tensors in the slots before and after this chunk's own. Changes nothing, so it can be replayed."""

    before: tuple[KV, ...]
    after: tuple[KV, ...]
    tokens: int

    def put(self, k: Tensor, v: Tensor) -> tuple[KV, KV]:
        """What is visible, joined; and (k, v), to be stored outside of any recomputed region."""
        assert k.shape[1] == self.tokens, f"{k.shape[1]} tokens for a slot of {self.tokens}"
        keys = torch.cat([*(p[0] for p in self.before), k, *(p[0] for p in self.after)], dim=1)
        values = torch.cat([*(p[1] for p in self.before), v, *(p[1] for p in self.after)], dim=1)
        return (keys, values), (k, v)


def _around(slots: dict[int, KV], own: int, end: int, tokens: int) -> GraphLayer:
    """The visible slots but `own`."""
    return GraphLayer(tuple(slots[i] for i in range(own)), tuple(slots[i] for i in range(own + 1, end)), tokens)


def _doubled(x: Tensor) -> Tensor:
    """x with twice the room along tokens."""
    wide = x.new_empty(x.shape[0], 2 * x.shape[1], *x.shape[2:])
    wide[:, : x.shape[1]] = x
    return wide
