"""Prompts that change while a stream runs, and how the past is made to fit the new one.

Four ways, `stream.switch`, each from the next chunk on:

    cut             the new text at once; the window keeps keys that were computed under the old text
    blend           embeddings go from the old text to the new one in equal steps over `stream.switch_chunks` chunks
    recache         the new text at once, and the window is run again under it (LongLive, arXiv 2509.22622)
    recache_window  the same but for the sink, whose keys stay those of the text it was made under (LongLive's
                    `global_sink: true`): less is run again, and the stream's beginning goes on asking for the old text

LongLive recaches clean latents in one pass over the whole window, which attends in both directions. Here the passes
that left the window's keys are made again, chunk by chunk and in order: same noisy inputs, same timesteps, so the same
noise level as the context policy wants, and no chunk sees a later one. Under the same text this gives back the very
same cache, bit by bit, as long as nothing has been evicted (tests/pipeline/test_session.py); afterwards a chunk
misses those of its predecessors that are gone.

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
from pipeline.positions import shift_slot, sink_offset
from utils.prompts import check_prompt


@dataclass(frozen=True, eq=False)
class CachedForward:
    """The pass that left a chunk's keys: its input and timestep."""

    chunk: int
    x_t: Tensor  # [B, f, C, H, W]
    t: Tensor  # [B], or [B, f] where the chunk began with given frames
    offset: int = 0  # latent frames by which its keys have been moved since


class InputRecorder:
    """A student that knows the input and the timestep of its newest pass."""

    def __init__(self, student: Student):
        self.model = student.model
        self._student = student
        self.last: tuple[Tensor, Tensor] | None = None

    def x0(self, x_t: Tensor, t: Tensor, *place) -> Tensor:
        self.last = (x_t, t)
        return self._student.x0(x_t, t, *place)


class RecacheState:
    """The passes by which the cache's slots were written, so that they can be made again."""

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        self.slots: dict[int, CachedForward] = {}

    def record(self, done: CachedForward) -> None:
        """`done` has written its chunk's slot."""
        self.slots[slot(self.geometry, done.chunk)] = done

    @torch.no_grad()
    def recache(
        self, student: Student, cache: StreamCache | GraphCache, text: TextKV | Tensor, *, keep_sink: bool = False
    ) -> None:
        """Write all slots again under `text`, oldest first, without a graph. If it is broken off, call it again.

        keep_sink: but for those of the sink, which all others see as they are.
        """
        kept = self.geometry.sink_chunks if keep_sink else 0
        order = sorted(self.slots, key=lambda i: (0, i) if i < kept else (1, self.slots[i].chunk))
        for position, i in enumerate(order):  # a chunk sees a prefix of the slots, so they are filled from the left
            if i < kept:
                continue
            done = self.slots[i]
            start_frame = done.chunk * self.geometry.chunk_frames + done.offset
            student.x0(done.x_t, done.t, text, cache.rewrite(position), start_frame)
        cache.permute([order.index(i) for i in range(len(order))])

    def shift_sink(self, model: CausalWanModel, cache: StreamCache | GraphCache, chunk: int) -> None:
        """Before `chunk` is made: slots of the sink that would be out of reach move up (pipeline/positions.py)."""
        for i in range(self.geometry.sink_chunks):
            done = self.slots.get(i)
            due = 0 if done is None else sink_offset(self.geometry, chunk - (done.chunk - i))
            if due and due > done.offset:
                shift_slot(model, cache, i, due - done.offset)
                self.slots[i] = replace(done, offset=due)


def blend_embeddings(embedding: Tensor, target: Tensor, chunks_left: int) -> Tensor:
    """The next chunk's embedding in a blend that has `chunks_left` >= 1 chunks to go from `embedding` to `target`."""
    return torch.lerp(embedding, target, 1.0 / chunks_left) if chunks_left > 1 else target


def embeddings_after_switch(embedding: Tensor, target: Tensor, switch: str, chunks: int) -> Iterator[Tensor]:
    """Embeddings of a chunk and of those after it, without end, where `target` is said before it: what a track gives.

    switch, chunks: as in `PromptTrack.set_prompt`.
    """
    for chunks_left in range(chunks if switch == "blend" else 0, 0, -1):
        embedding = blend_embeddings(embedding, target, chunks_left)
        yield embedding
    while True:
        yield target


@dataclass(frozen=True, eq=False)
class TextState:
    """Text of the chunk that comes next, and where a blend stands."""

    prompts: tuple[str, ...]
    embedding: Tensor  # [B, text tokens, dim], what `kv` was made of
    kv: TextKV
    target: Tensor  # the embedding that a blend ends at
    chunks_left: int = 0  # chunks until it does
    needs_recache: bool = False  # the cache still has to be made again
    keep_sink: bool = False  # but for the sink


class PromptTrack:
    """The text of each chunk. `set_prompt` may be called from any thread; all else belongs to the one that plays."""

    def __init__(self, encode: Callable[[Sequence[str]], Tensor], text_kv: Callable[[Tensor], TextKV]):
        self._encode, self._text_kv = encode, text_kv
        self._pending: deque[tuple[tuple[str | None, ...], str, int]] = deque()
        self.state: TextState

    def start(self, prompts: Sequence[str]) -> None:
        """Forget what was said and begin with `prompts`."""
        self._pending.clear()
        embedding = self._encode(list(prompts))
        self.state = TextState(tuple(prompts), embedding, self._text_kv(embedding), embedding)

    def set_prompt(self, prompts: str | Sequence[str | None], switch: str, chunks: int) -> None:
        """New prompts for the next chunk: one for all streams, or one each with None where nothing changes."""
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
        """Drop what was said and has not come in."""
        self._pending.clear()

    def advance(self, blend: bool = True) -> TextState:
        """Before each chunk: take in what was said, and take one step of a blend (not for a chunk made again)."""
        while self._pending:
            new, switch, chunks = self._pending.popleft()
            self._apply(new, switch, chunks)
        state = self.state
        if state.chunks_left and blend:
            embedding = blend_embeddings(state.embedding, state.target, state.chunks_left)
            self.state = replace(
                state, embedding=embedding, kv=self._text_kv(embedding), chunks_left=state.chunks_left - 1
            )
        return self.state

    def mark_recached(self) -> None:
        """The cache fits the text again."""
        self.state = replace(self.state, needs_recache=False)

    def _apply(self, new: tuple[str | None, ...], switch: str, chunks: int) -> None:
        old = self.state
        prompts = tuple(before if now is None else now for before, now in zip(old.prompts, new, strict=True))
        target = self._encode(list(prompts))
        if switch == "blend":
            self.state = replace(old, prompts=prompts, target=target, chunks_left=chunks)
        else:
            needs_recache, keep_sink = switch in RECACHES or old.needs_recache, switch == "recache_window"
            if old.needs_recache:  # what was said just before has not come in yet: the more thorough of both does
                keep_sink = old.keep_sink and switch != "recache"
            kv = self._text_kv(target)
            self.state = TextState(prompts, target, kv, target, needs_recache=needs_recache, keep_sink=keep_sink)
