"""Reading of the pictures and clips that a video begins with, with limits, at the size that is generated.

A picture is rotated by its EXIF orientation, converted to sRGB by its ICC profile, composited on white if it is
transparent, scaled to cover the size, and cropped around its centre. Clips are treated alike, frame by frame, and
resampled to the generated frame rate: at each time the newest frame, rotated by its display matrix, with square pixels,
and tone-mapped to standard dynamic range if it is HDR (PQ or HLG).

Input is not trusted: bytes are counted before reading, pixels before decoding, and Pillow may only decode JPEG, PNG and
WebP. Every failure is a UserError that begins with `name`.
"""

import io
import math
import os
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageCms, ImageOps

from configs.errors import UserError
from configs.reading import ordinary_file
from utils.colour import needs_mapping, to_srgb
from utils.video import to_rgb

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_IMAGE_BYTES = 32 * 2**20
MAX_CLIP_BYTES = 2 * 2**30
MAX_PIXELS = 64 * 10**6  # of one picture, before it is scaled
MAX_CLIP_FRAMES = 36_000  # ten minutes at 60 frames per second
SRGB = ImageCms.createProfile("sRGB")

Picture = str | os.PathLike | bytes | Image.Image | np.ndarray  # a file, its content, or pixels uint8 [H, W, 3]
Clip = str | os.PathLike | np.ndarray  # a file, or frames uint8 [T, H, W, 3] at the rate that is generated


def read_picture(source: Picture, size: tuple[int, int], name: str = "image") -> np.ndarray:
    """The picture as uint8 [H, W, 3] of `size` (height, width). source: bytes are the content of a file."""
    if isinstance(source, np.ndarray):
        return fit(_pixels(source, name), size)
    if isinstance(source, Image.Image):
        return fit(source, size)
    if isinstance(source, bytes):
        content, shown = source, "it"
    else:
        _check_path(source, name, "a PIL image, or pixels uint8 [height, width, 3]")
        ordinary_file(name, source, MAX_IMAGE_BYTES, fix="give the path of a file")
        content, shown = Path(source).read_bytes(), str(source)
    if len(content) > MAX_IMAGE_BYTES:
        raise UserError(f"{name}: {shown} has {len(content):,} bytes; at most {MAX_IMAGE_BYTES:,} are taken")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(
                    f"{name}: {shown} has {width}x{height} pixels, more than {MAX_PIXELS:,}; make it smaller"
                )
            image.draft("RGB", (2 * size[1], 2 * size[0]))  # decodes a JPEG at reduced size if possible
            return fit(image, size)
    except UserError:  # is a ValueError
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "no whole JPEG, PNG or WebP picture"
        raise UserError(f"{name}: {shown} cannot be read ({reason}); give another file") from error


def _check_path(source: object, name: str, others: str) -> None:
    """Raise a UserError for what is no path. others: what may be given as well."""
    if not isinstance(source, str | os.PathLike):
        raise UserError(f"{name} is {type(source).__name__}, which is not read here; give a file, {others}")


def read_clip(source: Clip, size: tuple[int, int], fps: int, frames: int, name: str = "video") -> np.ndarray:
    """The last `frames` or fewer frames of a clip at `fps`: uint8 [T, H, W, 3] of `size` (height, width)."""
    if isinstance(source, np.ndarray):
        pixels = [_pixels(frame, name) for frame in source[-frames:]]
        return np.stack([fit(frame, size) for frame in pixels])
    _check_path(source, name, "or frames as one array, uint8 [frames, height, width, 3]")
    path = Path(source)
    ordinary_file(name, path, MAX_CLIP_BYTES, fix="give the path of a file")
    kept: deque[np.ndarray] = deque(maxlen=frames)
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_count = 1
            if stream.width * stream.height > MAX_PIXELS:
                raise UserError(f"{name}={path} has {stream.width}x{stream.height} pixels, more than {MAX_PIXELS:,}")
            for number, (frame, times) in enumerate(_at_rate(container.decode(stream), stream, fps)):
                if number >= MAX_CLIP_FRAMES:
                    raise UserError(f"{name}={path} has more than {MAX_CLIP_FRAMES:,} frames; cut it to what matters")
                if times:
                    pixels, aspect = _displayed(frame, _rgb(frame), stream.sample_aspect_ratio or Fraction(1))
                    kept.extend([fit(pixels, size, aspect)] * min(times, frames))
    except UserError:
        raise
    except (OSError, IndexError, ValueError, av.error.FFmpegError) as error:
        raise UserError(f"{name}={path} cannot be read as a video; give the path of a whole video file") from error
    if not kept:
        raise UserError(f"{name}={path} holds no video frame; give the path of a whole video file")
    return np.stack(kept)


def fit(image: Image.Image | np.ndarray, size: tuple[int, int], pixel_aspect: Fraction = Fraction(1)) -> np.ndarray:
    """uint8 [H, W, 3] of `size` (height, width): scaled to cover it, cropped about the centre.

    pixel_aspect: width of one pixel of `image` over its height, as it is displayed.
    """
    if isinstance(image, np.ndarray):
        if image.shape[:2] == tuple(size) and pixel_aspect == 1:
            return np.ascontiguousarray(image)
        image = Image.fromarray(image)
    image = _in_srgb(ImageOps.exif_transpose(image))
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    height, width = size
    covered = float(width / height / pixel_aspect)  # width over height, in pixels of `image`, of what is kept of it
    kept_width, kept_height = min(image.width, covered * image.height), min(image.height, image.width / covered)
    left, top = (image.width - kept_width) / 2, (image.height - kept_height) / 2
    box = (left, top, left + kept_width, top + kept_height)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))


def _in_srgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit sRGB; mode RGBA if it has transparency, else RGB."""
    profile = image.info.get("icc_profile")
    alpha = None
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's conversion clips at 255
        grey = np.asarray(image)
        if image.has_transparency_data:
            alpha = Image.fromarray(np.where(grey == image.info["transparency"], 0, 255).astype(np.uint8))
        image = Image.fromarray((grey.clip(0, 65535) / 257).round().astype(np.uint8))
    elif image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
    if profile:
        image = image.convert({"LA": "L", "P": "RGB", "RGBA": "RGB", "1": "L"}.get(image.mode, image.mode))
        try:
            image = ImageCms.profileToProfile(image, io.BytesIO(profile), SRGB, outputMode="RGB")
        except ImageCms.PyCMSError:  # damaged, or for another mode: viewers ignore it
            profile = None
    image = image.convert("RGB")
    if alpha is not None:
        image.putalpha(alpha)
    return image


def _pixels(array: np.ndarray, name: str) -> np.ndarray:
    good = isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.ndim == 3 and array.shape[-1] == 3
    if not good or 0 in array.shape:
        given = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise UserError(f"{name} is {given}, not pixels; give uint8 [height, width, 3], RGB")
    return array


def _at_rate(frames: Iterator[av.VideoFrame], stream: av.VideoStream, fps: int) -> Iterator[tuple[av.VideoFrame, int]]:
    """Every frame, and at how many of the times 0, 1 / fps, 2 / fps, ... it is shown; the last frame at most once."""
    rate = stream.base_rate or stream.average_rate or Fraction(fps)
    before, time, begin, due = None, Fraction(0), None, 0
    for number, frame in enumerate(frames):
        if frame.pts is None:
            time = number / rate
        else:
            begin = frame.pts if begin is None else begin
            # half a tick of rounding for this frame, and half a tick for the first one
            time = _exact((frame.pts - begin) * frame.time_base, rate, frame.time_base / (1 if begin else 2))
        if before is not None:
            times = max(0, math.ceil(time * fps) - due)
            due += times
            yield before, times
        before = frame
    if before is not None:
        lasts = max(1 / rate, (before.duration - 1) * before.time_base)  # a duration is rounded, too
        yield before, int(Fraction(due, fps) < time + lasts)


def _exact(time: Fraction, rate: Fraction, rounding: Fraction) -> Fraction:
    """The exact time, at `rate` frames per second, of a frame whose time the container rounded; `time` if none fits.

    Matroska, WebM and FLV store milliseconds, GIF hundredths: at 16 frames per second frame 1 is at 0.063 or 0.06 s.
    """
    nearest = round(time * rate) / rate
    return nearest if abs(nearest - time) <= rounding else time


def _displayed(frame: av.VideoFrame, pixels: np.ndarray, pixel_aspect: Fraction) -> tuple[np.ndarray, Fraction]:
    """Pixels rotated and mirrored by the frame's display matrix, and the pixel aspect ratio after that."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels, pixel_aspect
    # stored (x, y) is displayed at (a x + c y, b x + d y)
    (a, b, _), (c, d, _), _ = np.frombuffer(matrix, np.int32).reshape(3, 3).tolist()
    if abs(b) > abs(a):  # a quarter turn
        return pixels.swapaxes(0, 1)[:: -1 if b < 0 else 1, :: -1 if c < 0 else 1], 1 / pixel_aspect
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1], pixel_aspect


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    """The stored pixels of a decoded frame as uint8 [H, W, 3], sRGB."""
    if not needs_mapping(frame.color_trc, frame.color_primaries):
        return to_rgb(frame)
    return to_srgb(to_rgb(frame, "rgb48le"), frame.color_trc, frame.color_primaries)
