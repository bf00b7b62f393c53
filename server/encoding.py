"""Encoding of chunks for sending: one MP4 fragment each, or one JPEG per frame. Frames are uint8 [T, H, W, 3], RGB.

Chunks are encoded independently and start with a key frame, so they can be played in any order, and chunks of several
takes can be joined in one file. A fragment contains its time, so playback can start in the middle of a stream.
"""

import io
from collections.abc import Iterator, Sequence
from functools import cache

import av
import numpy as np
from PIL import Image

from utils.logs import get_logger
from utils.video import add_h264, to_yuv

log = get_logger(__name__)
QUALITY, THUMB_QUALITY = 92, 80  # of JPEG
THUMB = 96  # pixels across
# name -> options without delay (no frame depends on later ones). Hardware encoders are preferred
HARDWARE = {
    "h264_nvenc": {"preset": "p3", "tune": "ull", "rc": "constqp", "qp": "23", "bf": "0", "zerolatency": "1"},
    "h264_videotoolbox": {"realtime": "1", "q:v": "65", "bf": "0"},
    "h264_qsv": {"preset": "veryfast", "global_quality": "23", "async_depth": "1", "bf": "0"},
}
SOFTWARE = {"crf": "23", "preset": "veryfast", "tune": "zerolatency"}
FRAGMENT = {
    "movflags": "+frag_keyframe+empty_moov+default_base_moof+frag_discont",
    "avoid_negative_ts": "disabled",  # a fragment keeps its own time
}


class FragmentEncoder:
    """H.264 in fragments of MP4. size: (height, width), both even.

    encoder: its name in ffmpeg; None = the first hardware encoder that works here, else x264.
    """

    def __init__(self, fps: int, size: tuple[int, int], encoder: str | None = None):
        self.fps, self.size = fps, size
        self.encoder = encoder or find_encoder(fps, size)
        boxes = self._boxes(np.zeros((1, *size, 3), np.uint8), 0)
        self.init = b"".join(box for kind, box in boxes if kind in (b"ftyp", b"moov"))
        at = self.init.index(b"avcC") + 5  # version; then profile, its constraints, level
        self.mime = f'video/mp4; codecs="avc1.{self.init[at : at + 3].hex()}"'

    def encode(self, frames: np.ndarray, first: int) -> bytes:
        """One fragment that begins at frame number `first` of the video."""
        return b"".join(box for kind, box in self._boxes(frames, first) if kind in (b"moof", b"mdat"))

    def _boxes(self, frames: np.ndarray, first: int) -> Iterator[tuple[bytes, bytes]]:
        """The boxes of a separate file: type and content."""
        out = io.BytesIO()
        options = SOFTWARE if self.encoder == "libx264" else HARDWARE[self.encoder]
        fragment = FRAGMENT | {"fragment_index": str(first + 1)}
        with av.open(out, "w", format="mp4", options=fragment) as file:
            stream = add_h264(file, self.fps, self.size, self.encoder, **options)
            for i, image in enumerate(frames):
                file.mux(stream.encode(to_yuv(image, first + i, self.fps)))
            file.mux(stream.encode(None))
        data, at = out.getvalue(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 4], "big")
            yield data[at + 4 : at + 8], data[at : at + size]
            at += size


@cache
def find_encoder(fps: int, size: tuple[int, int]) -> str:
    """The first hardware encoder that works on this machine, else libx264."""
    for name in HARDWARE:
        try:
            FragmentEncoder(fps, size, name)
        except (av.error.FFmpegError, ValueError, OSError):
            continue
        log.info(f"video is encoded by {name}")
        return name
    return "libx264"


def jpeg(frame: np.ndarray, quality: int = QUALITY) -> bytes:
    """One frame [H, W, 3]."""
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "jpeg", quality=quality, subsampling=0)
    return out.getvalue()


def thumbnail(frames: Sequence[np.ndarray], width: int = THUMB) -> bytes:
    """The middle frame as a small JPEG."""
    frame = frames[len(frames) // 2]
    height = max(1, round(frame.shape[0] * width / frame.shape[1]))
    return jpeg(np.asarray(Image.fromarray(frame).resize((width, height))), THUMB_QUALITY)
