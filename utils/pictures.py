"""Pictures and clips that a video begins with: decoded with limits, and cut to the size that is generated.

A picture is turned as its EXIF says, laid on white where it is transparent, scaled to cover the size and cropped about
its centre. A clip is the same, frame by frame, at the frame rate that is generated: at each time the newest frame.

Nothing here trusts its input: bytes are counted before they are read, pixels before they are decoded, and Pillow is
offered JPEG, PNG and WebP alone. Every failure is a UserError that begins with `name`.
"""

import io
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageOps

from configs.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_IMAGE_BYTES = 32 * 2**20
MAX_CLIP_BYTES = 2 * 2**30
MAX_PIXELS = 64 * 10**6  # of one picture, before it is scaled
MAX_CLIP_FRAMES = 36_000  # that are decoded: ten minutes at 60 a second

Picture = str | os.PathLike | bytes | Image.Image | np.ndarray  # a file, its content, or pixels uint8 [H, W, 3]
Clip = str | os.PathLike | np.ndarray  # a file, or frames uint8 [T, H, W, 3] at the rate that is generated


def read_picture(source: Picture, size: tuple[int, int], name: str = "image") -> np.ndarray:
    """uint8 [H, W, 3] of `size` (height, width). bytes are a file's content; only str and PathLike name files."""
    if isinstance(source, np.ndarray):
        return fit(_pixels(source, 3, name), size)
    if isinstance(source, Image.Image):
        return fit(source, size)
    content, shown = (source, "it") if isinstance(source, bytes) else (_content(source, name), str(source))
    if len(content) > MAX_IMAGE_BYTES:
        raise UserError(f"{name}: {shown} has {len(content):,} bytes; at most {MAX_IMAGE_BYTES:,} are taken")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(
                    f"{name}: {shown} has {width}x{height} pixels, more than {MAX_PIXELS:,}; make it smaller"
                )
            image.draft("RGB", (2 * size[1], 2 * size[0]))  # a JPEG is decoded no larger than is useful
            return fit(image, size)
    except UserError:  # which is a ValueError, too
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "no whole JPEG, PNG or WebP picture"
        raise UserError(f"{name}: {shown} cannot be read ({reason}); give another file") from error


def read_clip(source: Clip, size: tuple[int, int], fps: int, frames: int, name: str = "video") -> np.ndarray:
    """The last frames of a clip, at most `frames`, at `fps` a second: uint8 [T, H, W, 3] of `size` (height, width)."""
    if isinstance(source, np.ndarray):
        pixels = [_pixels(frame, 3, name) for frame in source[-frames:]]
        return np.stack([fit(frame, size) for frame in pixels])
    path = Path(source)
    _check_file(path, MAX_CLIP_BYTES, name)
    kept: deque[np.ndarray] = deque(maxlen=frames)
    try:
        with av.open(str(path)) as container:
            for image in _at_rate(container, fps, path, name):
                kept.append(fit(image.to_image(), size))
    except UserError:
        raise
    except (OSError, IndexError, ValueError, av.error.FFmpegError) as error:
        raise UserError(f"{name}={path} cannot be read as a video; give the path of a whole video file") from error
    if not kept:
        raise UserError(f"{name}={path} holds no video frame; give the path of a whole video file")
    return np.stack(kept)


def fit(image: Image.Image | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] of `size` (height, width): scaled to cover it, cropped about the centre."""
    if isinstance(image, np.ndarray):
        if image.shape[:2] == tuple(size):
            return np.ascontiguousarray(image)
        image = Image.fromarray(image)
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    height, width = size
    return np.asarray(ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS))


def _content(path: str | os.PathLike, name: str) -> bytes:
    path = Path(path)
    _check_file(path, MAX_IMAGE_BYTES, name)
    return path.read_bytes()


def _check_file(path: Path, most: int, name: str) -> None:
    """Refuse what is no file, or too large, before it is opened."""
    if not path.exists():
        raise UserError(f"{name}={path} does not exist; give the path of a file")
    if not path.is_file():
        raise UserError(f"{name}={path} is no file; give the path of a file")
    if path.stat().st_size > most:
        raise UserError(f"{name}={path} has {path.stat().st_size:,} bytes; at most {most:,} are taken")


def _pixels(array: np.ndarray, dims: int, name: str) -> np.ndarray:
    good = isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.ndim == dims and array.shape[-1] == 3
    if not good or 0 in array.shape:
        said = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise UserError(f"{name} is {said}, not pixels; give uint8 [height, width, 3], RGB")
    return array


def _at_rate(container: av.container.InputContainer, fps: int, path: Path, name: str) -> Iterator[av.VideoFrame]:
    """Frames at times 0, 1 / fps, ... of the stream: of each time the newest one; those that nobody needs are left."""
    stream = container.streams.video[0]
    stream.thread_count = 1
    if stream.width * stream.height > MAX_PIXELS:
        raise UserError(f"{name}={path} has {stream.width}x{stream.height} pixels, more than {MAX_PIXELS:,}")
    begin, due, before = None, 0, None
    for number, frame in enumerate(container.decode(stream)):
        if number >= MAX_CLIP_FRAMES:
            raise UserError(f"{name}={path} has more than {MAX_CLIP_FRAMES:,} frames; cut it to what matters")
        rate = float(stream.average_rate or fps)
        time = number / rate if frame.time is None else frame.time
        begin = time if begin is None else begin
        while before is not None and due / fps < time - begin - 1e-6:
            yield before
            due += 1
        before = frame
    if before is not None:
        yield before
