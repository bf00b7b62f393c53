"""Clips of other programs: which frame shows at which time, and how it is displayed."""

from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from utils.colour import HDR
from utils.pictures import read_clip
from utils.video import assumed_matrix

SIZE = (32, 48)
CONTAINERS = {  # ending: codec, pixel format, options of the container
    "mkv": ("ffv1", "yuv420p", {}),
    "webm": ("libvpx", "yuv420p", {}),
    "flv": ("flv", "yuv420p", {}),
    "gif": ("gif", "gray", {}),
    "mp4": ("libx264", "yuv420p", {}),
    "mov": ("libx264", "yuv420p", {"video_track_timescale": "1000"}),
    "avi": ("mpeg4", "yuv420p", {}),
    "ts": ("libx264", "yuv420p", {}),
}


def write(path, times: Sequence[Fraction], rate: Fraction, tick: Fraction | None = None) -> None:
    """Frames that say their number in grey, at `times` (s), counted in `tick` where that is not 1 / rate."""
    codec, pix_fmt, options = CONTAINERS[path.suffix[1:]]
    with av.open(str(path), "w", options=options) as file:
        stream = file.add_stream(codec, rate=rate, options={"crf": "1"} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt = *SIZE, pix_fmt
        stream.codec_context.time_base = tick or 1 / rate
        stream.codec_context.bit_rate = 10**6
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((*SIZE, 3), 10 + 4 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time / (tick or 1 / rate)), tick or 1 / rate
            file.mux(stream.encode(frame.reformat(format=pix_fmt)))
        file.mux(stream.encode(None))


def shown(times: Sequence[Fraction], fps: int, end: Fraction) -> list[int]:
    """The newest frame at 0, 1 / fps, ... before `end`; the last one once."""
    numbers, k = [], 0
    while Fraction(k, fps) < end and (not numbers or numbers[-1] < len(times) - 1):
        numbers.append(max(n for n, time in enumerate(times) if time <= Fraction(k, fps)))
        k += 1
    return numbers


def numbers(path, fps: int) -> list[int]:
    return [round((value - 10) / 4) for value in read_clip(path, SIZE, fps, 1000).mean((1, 2, 3))]


@pytest.mark.parametrize("rate, fps", [(Fraction(8), 16), (Fraction(24), 16), (Fraction(30_000, 1001), 24)])
@pytest.mark.parametrize("ending", CONTAINERS)
def test_the_frame_that_shows_at_each_time_whatever_the_time_base(tmp_path, ending, rate, fps):
    if (ending, rate) == ("gif", Fraction(30_000, 1001)):
        pytest.skip("hundredths of a second cannot tell it from 30")
    times = [n / rate for n in range(50)]
    write(tmp_path / f"x.{ending}", times, rate)
    assert numbers(tmp_path / f"x.{ending}", fps) == shown(times, fps, 50 / rate)


@pytest.mark.parametrize("ending, tick", [("mkv", 1000), ("webm", 1000), ("gif", 100), ("mp4", 90_000), ("mov", 1000)])
def test_clips_of_variable_rates_show_the_frame_of_each_time(tmp_path, ending, tick):
    gaps = [7, 5, 30, 4, 4, 11, 2, 60, 3, 3, 8, 13, 6, 20, 5]  # hundredths of a second
    times = [Fraction(sum(gaps[:n]), 100) for n in range(len(gaps) + 1)]
    write(tmp_path / f"x.{ending}", times, Fraction(25), Fraction(1, tick))
    assert numbers(tmp_path / f"x.{ending}", 16) == shown(times, 16, times[-1] + 1)


def test_a_clip_that_begins_in_the_middle(tmp_path):
    """Its first timestamp is rounded, too: 83.3 ms to 83, and the next but one, 166.7, to 167."""
    times = [Fraction(n, 24) for n in range(40)]
    write(tmp_path / "x.mkv", [time + Fraction(2, 24) for time in times], Fraction(24))
    assert numbers(tmp_path / "x.mkv", 24) == list(range(40))


def test_two_frames_a_day_apart_are_read_at_once(tmp_path):
    write(tmp_path / "x.mkv", [Fraction(0), Fraction(86_400)], Fraction(16), Fraction(1, 1000))
    assert len(read_clip(tmp_path / "x.mkv", SIZE, 16, 9)) == 9


def quarters(height: int, width: int) -> np.ndarray:
    """Red, green, blue and grey quarters: no turn or mirror image of it is itself."""
    pixels = np.full((height, width, 3), 60, np.uint8)
    pixels[: height // 2, : width // 2], pixels[: height // 2, width // 2 :] = (220, 40, 40), (40, 200, 40)
    pixels[height // 2 :, : width // 2] = (40, 40, 220)
    return pixels


def encode(path, image: np.ndarray, matrix: Colorspace | None = Colorspace.ITU709, **changes) -> None:
    """Four frames of uint8 or uint16 RGB; `changes` are attributes of the codec, and the degrees and flips it names."""
    turn = {name: changes.pop(name) for name in ("degrees", "hflip", "vflip") if name in changes}
    deep = image.dtype == np.uint16
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=16, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "yuv420p10le" if deep else "yuv420p"
        if turn:
            stream.set_display_rotation(**turn)
        for name, value in changes.items():
            setattr(stream.codec_context, name, value)
        if matrix is not None and "colorspace" not in changes:
            stream.codec_context.colorspace = matrix
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(image, format="rgb48le" if deep else "rgb24")
            used = matrix or assumed_matrix(*image.shape[:2])
            frame = frame.reformat(format=stream.pix_fmt, dst_colorspace=used, dst_color_range=ColorRange.MPEG)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("hflip", [False, True])
def test_clips_are_turned_and_mirrored_as_their_matrix_says(tmp_path, degrees, hflip):
    image = quarters(64, 96)
    encode(tmp_path / "x.mp4", image, degrees=degrees, hflip=hflip)
    expected = np.rot90(image, degrees // 90)  # both count against the clock
    expected = expected[:, ::-1] if hflip else expected
    found = read_clip(tmp_path / "x.mp4", expected.shape[:2], 16, 4)
    assert np.abs(found.astype(int) - expected).mean() < 6


@pytest.mark.parametrize("degrees, size", [(0, (64, 96)), (90, (96, 64))])
def test_oblong_pixels_are_made_square(tmp_path, degrees, size):
    image = quarters(64, 96)
    encode(tmp_path / "x.mp4", image[:, ::2], sample_aspect_ratio=Fraction(2), degrees=degrees)
    expected = np.rot90(image, degrees // 90)
    for cropped in (0, 16):  # a narrower size sees the middle
        height, width = size[0], size[1] - 2 * cropped
        found = read_clip(tmp_path / "x.mp4", (height, width), 16, 4)[0]
        assert np.abs(found.astype(int) - expected[:, cropped : size[1] - cropped]).mean() < 8


@pytest.mark.parametrize("size", [(480, 640), (720, 1280)])
@pytest.mark.parametrize("named", [True, False])
def test_colours_are_by_the_matrix_that_is_named_or_assumed(tmp_path, size, named):
    """BT.601 up to 576 lines and BT.709 above, as players take it: the other one is off by 20 and more."""
    image = np.full((*size, 3), (200, 30, 30), np.uint8)
    encode(tmp_path / "x.mp4", image, Colorspace.ITU709 if named else None)
    assert np.abs(read_clip(tmp_path / "x.mp4", SIZE, 16, 1).astype(int) - (200, 30, 30)).max() < 6


def pq(light: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084, of light where 1 is 203 cd/m2: signal 0 to 1."""
    power = (light * 203 / 10_000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(light: np.ndarray) -> np.ndarray:
    """ARIB STD-B67, of light where 0.265 is white: signal 0 to 1."""
    light = light * 0.265
    upper = 0.17883277 * np.log((12 * light - 0.28466892).clip(1e-6)) + 0.55991073
    return np.where(light <= 1 / 12, np.sqrt(3 * light), upper)


def srgb(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light.clip(0.0031308) ** (1 / 2.4) - 0.055)


# light of BT.709's primaries in the other space's, row by row (ITU-R BT.2087; SMPTE EG 432)
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
TO_P3 = np.array([[0.8225, 0.1775, 0.0], [0.0332, 0.9668, 0.0], [0.0171, 0.0724, 0.9105]])
SPACES = {  # transfer, to primaries, tags
    "pq": (pq, TO_BT2020, ColorTrc.SMPTE2084, ColorPrimaries.BT2020, Colorspace.BT2020),
    "hlg": (hlg, TO_BT2020, ColorTrc.ARIB_STD_B67, ColorPrimaries.BT2020, Colorspace.BT2020),
    "p3": (srgb, TO_P3, ColorTrc.IEC61966_2_1, ColorPrimaries.SMPTE432, Colorspace.ITU709),
}


@pytest.mark.parametrize("space", SPACES)
def test_hdr_and_wide_gamuts_come_as_srgb(tmp_path, space):
    """Without a conversion, the colours of all three are pale, and greys of HDR are too light in the dark."""
    transfer, primaries, trc, named, matrix = SPACES[space]
    light = [[0.5, 0.03, 0.03], [0.03, 0.5, 0.03], [0.03, 0.03, 0.5], [0.0, 0.0, 0.0], [0.04] * 3, [0.5] * 3]
    light += [[0.9] * 3, [3.0] * 3] if trc in HDR else []
    image = np.repeat(np.repeat(np.array(light)[None], 64, 0), 32, 1)  # as BT.709 has it; 1 is white
    light_of_space = image @ primaries.T
    if space == "hlg":  # a display of 1,000 cd/m2 makes Y^0.2 of it more
        light_of_space /= (light_of_space @ [0.2627, 0.6780, 0.0593])[..., None].clip(1e-6) ** (0.2 / 1.2)
    signal = (transfer(light_of_space) * 65535).round().astype(np.uint16)
    encode(tmp_path / "x.mp4", signal, colorspace=matrix, color_trc=trc, color_primaries=named, color_range=1)
    found = read_clip(tmp_path / "x.mp4", image.shape[:2], 16, 1)[0, 32, 16::32].astype(int)
    assert np.abs(found[:6] - srgb(np.array(light[:6])) * 255).max() < 10
    levels = [188, *found[6:, 1]]
    assert all(low + 8 < high < 255 for low, high in zip(levels, levels[1:], strict=False)), "room above white"
