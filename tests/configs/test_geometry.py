"""Arithmetic between pixels, latent frames, chunks and tokens."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from configs.errors import UserError
from configs.geometry import Geometry, latent_frames, pixel_frames
from configs.schema import Config, StreamConfig, VideoConfig


def test_full_size_numbers_of_the_family():
    geo = Geometry(height=480, width=832)
    assert (geo.latent_height, geo.latent_width) == (60, 104)
    assert geo.tokens_per_frame == 1560 and geo.tokens_per_chunk == 4680
    assert geo.latent_shape(2, 21) == (2, 21, 16, 60, 104)
    assert geo.num_chunks(21) == 7 and geo.chunk(2) == slice(6, 9)
    assert geo.window_chunks == 4 and geo.sink_chunks == 1


def test_pixel_and_latent_frames_round_trip():
    assert pixel_frames(0) == 0
    for frames in range(1, 60):
        assert pixel_frames(frames) == 1 + 4 * (frames - 1) and latent_frames(pixel_frames(frames)) == frames


@pytest.mark.parametrize("pixels", [2, 3, 4, 80, 82])
def test_pixel_frames_off_the_grid_are_refused(pixels):
    with pytest.raises(UserError, match=f"{pixels} pixel frames are not 1 \\+ 4 n; try"):
        latent_frames(pixels)


@pytest.mark.parametrize("chunk_frames", [1, 2, 3, 5])
def test_chunks_tile_the_clip(chunk_frames):
    geo = Geometry(height=64, width=96, chunk_frames=chunk_frames, window_frames=0, sink_frames=0)
    frames = list(range(chunk_frames * 7))
    assert [f for k in range(geo.num_chunks(len(frames))) for f in frames[geo.chunk(k)]] == frames


@pytest.mark.parametrize("window, sink", [(0, 0), (0, 2), (1, 0), (3, 0), (3, 1), (3, 2), (5, 2)])
def test_visible_chunks_are_the_sink_and_the_newest(window, sink):
    geo = Geometry(height=64, width=96, chunk_frames=2, window_frames=2 * window, sink_frames=2 * sink)
    for k in range(12):
        seen = geo.visible_chunks(k)
        assert seen == sorted(set(seen)) and seen[-1] == k, "each once, in order, itself last"
        assert len(seen) == (min(k + 1, window) if window else k + 1)
        assert set(range(min(sink, k + 1))) <= set(seen), "the sink is never evicted"
        recent = [c for c in seen if c >= sink]
        assert recent == list(range(k + 1))[len(range(k + 1)) - len(recent) :], "and the rest are the newest"
        assert geo.kv_frames(k) == 2 * len(seen)


@pytest.mark.parametrize("field, size", [("height", 60), ("width", 100)])
def test_sizes_off_the_patch_grid_are_refused(field, size):
    with pytest.raises(UserError, match=f"video.{field}={size} is not divisible by 16"):
        Geometry(**{"height": 64, "width": 96, field: size})


def test_partial_chunks_are_refused():
    with pytest.raises(UserError, match="try 6"):
        Geometry(height=64, width=96).num_chunks(7)


def test_from_config_takes_every_field():
    config = Config(
        video=VideoConfig(height=64, width=96, num_latent_frames=8),
        stream=StreamConfig(chunk_frames=2, window_frames=6, sink_frames=2),
    )
    expected = Geometry(
        height=64, width=96, chunk_frames=2, window_frames=6, sink_frames=2, latent_channels=48, patch=(1, 1, 1)
    )
    assert replace(Geometry.from_config(config), latent_channels=48, patch=(1, 1, 1)) == expected
    assert expected.tokens_per_frame == 8 * 12


def test_a_network_says_its_channels_and_patch():
    sizes = SimpleNamespace(in_channels=48, patch_size=[1, 1, 1])
    geometry = Geometry(height=64, width=96).for_network(sizes)
    assert geometry.latent_shape(2, 3) == (2, 3, 48, 8, 12) and geometry.tokens_per_frame == 96
