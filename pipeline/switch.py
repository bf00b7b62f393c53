"""Changes of the prompt within a stream, and recaching of the window.

There are four modes, `stream.switch`; each takes effect with the next chunk:

    cut             use the new text; the window keeps the keys that were computed with the old text
    blend           interpolate the embedding linearly from the old text to the new in `stream.switch_chunks` chunks
    recache         use the new text, and recompute the keys of the window with it (LongLive, arXiv 2509.22622)
    recache_window  the same except for the sink, which keeps its keys (LongLive's `global_sink: true`): fewer passes,
                    and the beginning of the stream still represents the old text

LongLive recaches clean latents in one bidirectional pass over the whole window. Here the passes that wrote the window's
keys are repeated chunk by chunk, with the same noisy inputs and timesteps, so that the context mode holds and no chunk
attends to a later one. With the same text the result is bit-identical as long as nothing has been evicted
(tests/pipeline/test_session.py); after that, evicted chunks are missing from the repeated passes.

Legend: B streams, f latent frames a chunk; inputs `[B, f, C, H, W]`; text `[B, text tokens, dim]`.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from configs.errors import UserError
from configs.geometry import Geometry
from configs.schema import RECACHES, SWITCHES
from model.cache import GraphCache, StreamCache, slot
from model.causal_wan import CausalWanModel, TextKV
from model.denoiser import Student
from pipeline.positions import sink_offset
from utils.prompts import check_prompt


@dataclass(frozen=True, eq=False)
class CachedForward:
    """Input and timestep of the pass that wrote a chunk's keys and values."""

    chunk: int
    x_t: Tensor  # [B, f, C, H, W]
    t: Tensor  # [B], or [B, f] with conditioning frames
    offset: int = 0  # latent frames by which its keys have been shifted since


class InputRecorder:
    """A student that records input and timestep of its last pass."""

    def __init__(self, student: Student):
        self.model = student.model
        self._student = student
        self.last: tuple[Tensor, Tensor] | None = None

    def x0(self, x_t: Tensor, t: Tensor, *place) -> Tensor:
        self.last = (x_t, t)
        return self._student.x0(x_t, t, *place)


class RecacheState:
    """The passes that wrote the cache's slots, so that they can be repeated."""

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        self.slots: dict[int, CachedForward] = {}

    def record(self, done: CachedForward) -> None:
        """Record that pass `done` has written its chunk's slot."""
        self.slots[slot(self.geometry, done.chunk)] = done

    @torch.no_grad()
    def recache(
        self, student: Student, cache: StreamCache | GraphCache, text: TextKV | Tensor, *, keep_sink: bool = False
    ) -> None:
        """Rewrite all slots with `text`, oldest first, without a graph. After an interruption, call it again.

        keep_sink: except for the sink, which all others attend to unchanged.
        """
        kept = self.geometry.sink_chunks if keep_sink else 0
        order = sorted(self.slots, key=lambda i: (0, i) if i < kept else (1, self.slots[i].chunk))
        for position, i in enumerate(order):  # a chunk attends to a prefix of the slots
            if i < kept:
                continue
            done = self.slots[i]
            start_frame = done.chunk * self.geometry.chunk_frames + done.offset
            student.x0(done.x_t, done.t, text, cache.rewrite(position), start_frame)
        cache.permute([order.index(i) for i in range(len(order))])

    def shift_sink(self, model: CausalWanModel, cache: StreamCache | GraphCache, chunk: int) -> None:
        """Shift the sink's slots that would be too far from `chunk`, before it is generated (pipeline/positions.py)."""
        for i in range(self.geometry.sink_chunks):
            done = self.slots.get(i)
            due = sink_offset(self.geometry, chunk)
            if done is not None and due > done.offset:
                cache.shift_keys(i, due - done.offset, model.shift_keys)
                self.slots[i] = replace(done, offset=due)


def blend_embeddings(embedding: Tensor, target: Tensor, chunks_left: int) -> Tensor:
    """The next chunk's embedding in a blend that has `chunks_left` >= 1 chunks to go from `embedding` to `target`."""
    return torch.lerp(embedding, target, 1.0 / chunks_left) if chunks_left > 1 else target


def embeddings_after_switch(embedding: Tensor, target: Tensor, switch: str, chunks: int) -> Iterator[Tensor]:
    """The embeddings of a chunk and of all later ones, if the text changes to `target` before it, as in PromptTrack.

    switch, chunks: as in `PromptTrack.set_prompt`.
    """
    for chunks_left in range(chunks if switch == "blend" else 0, 0, -1):
        embedding = blend_embeddings(embedding, target, chunks_left)
        yield embedding
    while True:
        yield target


@dataclass(frozen=True, eq=False)
class TextState:
    """Text of the next chunk, and progress of a blend."""

    prompts: tuple[str, ...]
    embedding: Tensor  # [B, text tokens, dim], from which `kv` was computed
    kv: TextKV
    target: Tensor  # embedding at the end of a blend
    chunks_left: int = 0  # chunks until then
    blended: int = -1  # chunk that the blend's newest step was for
    needs_recache: bool = False  # the window is not recached yet
    keep_sink: bool = False  # recache without the sink


class PromptTrack:
    """The text of each chunk. `set_prompt` may be called from any thread, other methods only from the stream's."""

    def __init__(self, encode: Callable[[Sequence[str]], Tensor], text_kv: Callable[[Tensor], TextKV]):
        self._encode, self._text_kv = encode, text_kv
        self._pending: deque[tuple[tuple[str | None, ...], str, int]] = deque()
        self.state: TextState

    def start(self, prompts: Sequence[str]) -> None:
        """Begin with `prompts` and drop pending changes."""
        self._pending.clear()
        embedding = self._encode(list(prompts))
        self.state = TextState(tuple(prompts), embedding, self._text_kv(embedding), embedding)

    def set_prompt(self, prompts: str | Sequence[str | None], switch: str, chunks: int) -> None:
        """Queue new prompts for the next chunk: one for all streams, or one each (None = unchanged).

        switch, chunks: as `stream.switch` and `stream.switch_chunks`. Raises UserError for invalid prompts.
        """
        if switch not in SWITCHES:
            raise UserError(f"switch={switch} is unknown; use one of {', '.join(SWITCHES)}")
        streams = len(self.state.prompts)
        prompts = (prompts,) * streams if isinstance(prompts, str) else tuple(prompts)
        if len(prompts) != streams:
            raise UserError(f"{len(prompts)} new prompts were given for {streams} streams; give one, or one a stream")
        for prompt in prompts:
            if prompt is not None:
                check_prompt(prompt)
        self._pending.append((prompts, switch, chunks))

    def clear_pending(self) -> None:
        """Drop pending changes."""
        self._pending.clear()

    def advance(self, chunk: int) -> TextState:
        """Apply pending changes, and one step of a blend unless `chunk` has had it; call it before each chunk."""
        while self._pending:
            new, switch, chunks = self._pending.popleft()
            self._apply(new, switch, chunks)
        state = self.state
        if state.chunks_left and state.blended != chunk:
            embedding = blend_embeddings(state.embedding, state.target, state.chunks_left)
            kv, left = self._text_kv(embedding), state.chunks_left - 1
            self.state = replace(state, embedding=embedding, kv=kv, chunks_left=left, blended=chunk)
        return self.state

    def mark_recached(self) -> None:
        """Record that the window has been recached."""
        self.state = replace(self.state, needs_recache=False)

    def _apply(self, new: tuple[str | None, ...], switch: str, chunks: int) -> None:
        old = self.state
        prompts = tuple(before if now is None else now for before, now in zip(old.prompts, new, strict=True))
        target = self._encode(list(prompts))
        if switch == "blend":
            self.state = replace(old, prompts=prompts, target=target, chunks_left=chunks, blended=-1)
        else:
            needs_recache, keep_sink = switch in RECACHES or old.needs_recache, switch == "recache_window"
            if old.needs_recache:  # an earlier change is still pending: the more thorough mode wins
                keep_sink = old.keep_sink and switch != "recache"
            kv = self._text_kv(target)
            self.state = TextState(prompts, target, kv, target, needs_recache=needs_recache, keep_sink=keep_sink)
