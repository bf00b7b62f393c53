"""Rotary positions of a stream without end: how far the sink may fall behind.

    frames      0 1 2 | . . . . . . . . . . . | 1014 .. 1022 | 1023 1024 1025
                sink    evicted                 ring           the next chunk

Attention depends on differences of positions alone, and angles are made in float64 at any index (model/causal_wan.py),
so nothing has to be done for the ring: its frames are never further apart than the window. Only the sink falls behind,
without bound. Once a chunk would lie beyond the `position_frames`-th position counted from the sink, the sink moves up
to just before the ring, where positions count the cache's slots and no more; then it falls behind again. Until then
every number is the ordinary one. Moving turns the sink's keys by the angle of the difference (rotations compose), in
place: nothing is computed anew, and a captured graph finds its buffers where they were.

Each move rounds the sink's keys to their dtype once more: in bfloat16 a thousand moves are off by some 6%, and in the
default 1,024 positions they take a million latent frames. `position_frames` = the window moves the sink with every
chunk, as cache-relative positions do (LongLive's unbounded variant); a few chunks more make it seldom.
"""

from configs.geometry import Geometry
from model.cache import GraphCache, StreamCache
from model.causal_wan import CausalWanModel


def sink_offset(geometry: Geometry, chunk: int) -> int:
    """Latent frames by which the sink has moved up when `chunk` is made, counted from the sink's own start.

    With P positions and a window of W, in chunks: it first moves at chunk P, by P + 1 - W, and again so many later.
    """
    limit = geometry.position_frames // geometry.chunk_frames
    if not limit or not geometry.window_chunks or chunk < limit:
        return 0
    step = limit + 1 - geometry.window_chunks
    return step * (1 + (chunk - limit) // step) * geometry.chunk_frames


def shift_slot(model: CausalWanModel, cache: StreamCache | GraphCache, position: int, frames: int) -> None:
    """Make the keys in slot `position` those of `frames` latent frames later."""
    cache.shift_keys(position, frames, model.shift_keys)
