"""Rotary positions of endless streams: the distance between the sink and the current chunk.

    frames      0 1 2 | . . . . . . . . . . . | 1014 .. 1022 | 1023 1024 1025
                sink    evicted                 ring           the next chunk

Attention depends only on differences of positions, and angles are computed in float64 for any index
(model/causal_wan.py). The frames in the ring are never further apart than the window; only the distance to the sink
grows without bound. When a chunk would lie beyond the `position_frames`-th position, counted from the sink, the sink is
shifted to the position just before the ring. Until then all positions are the ordinary ones. A shift rotates the sink's
keys in place by the angle of the difference (rotations compose), so nothing is recomputed, and the buffers of captured
CUDA graphs stay where they are.

Each shift rounds the sink's keys to their dtype: in bfloat16 the error after a thousand shifts is about 6%; with the
default of 1,024 positions that is after a million latent frames. With `position_frames` equal to the window the sink is
shifted with every chunk, like the cache-relative positions of LongLive's unbounded variant; a few chunks more make
shifts rare.
"""

from configs.geometry import Geometry


def sink_offset(geometry: Geometry, chunk: int) -> int:
    """Latent frames by which the sink has been shifted when `chunk` is generated.

    With P positions and a window of W, in chunks, shifts by P + 1 - W happen at chunk P and every P + 1 - W chunks.
    """
    limit = geometry.position_frames // geometry.chunk_frames
    if not limit or not geometry.window_chunks or chunk < limit:
        return 0
    step = limit + 1 - geometry.window_chunks
    return step * (1 + (chunk - limit) // step) * geometry.chunk_frames
