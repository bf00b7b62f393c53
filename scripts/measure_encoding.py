"""Compare fragmented MP4 with JPEG for sending video: bytes per second and milliseconds per chunk.

    python scripts/measure_encoding.py                              # a synthetic scene, 480x832
    python scripts/measure_encoding.py --video clip.mp4 --json encoding.json

Chunks are encoded as by the live server (server/encoding.py): one fragment per chunk, or one JPEG per frame with four
threads. The synthetic scene has discs that move over colour gradients, with noise; --video uses the frames of a file
instead, scaled to the size.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits

exits.guard(__name__)

import av
import numpy as np

from configs.errors import UserError
from server.encoding import FragmentEncoder, jpeg
from utils.files import write_json_atomic
from utils.pictures import read_clip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = exits.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--fps", type="positive", default=16)
    parser.add_argument("--chunks", type="positive", default=8, help="of 12 frames (default: %(default)s)")
    parser.add_argument("--video", type=Path, metavar="FILE", help="use the frames of a clip")
    parser.add_argument("--encoder", help="ffmpeg's name of an H.264 encoder (default: hardware, else libx264)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    args = parser.parse_args(argv)
    for name in ("height", "width"):
        if vars(args)[name] % 2 or vars(args)[name] < 16:
            raise UserError(f"--{name}={vars(args)[name]} is not an even number of at least 16; use one")
    return args


def scene(frames: int, height: int, width: int) -> np.ndarray:
    """uint8 [frames, height, width, 3]: colour gradients, moving discs, and noise."""
    y, x = np.mgrid[:height, :width].astype(np.float32) / height
    grain, out = np.random.default_rng(0), np.empty((frames, height, width, 3), np.uint8)
    for t in range(frames):
        time = t / 16
        shades = [np.sin(3 * x + k) * np.cos(2 * y - 0.7 * k + 0.3 * time) * 60 + 120 for k in range(3)]
        image = np.stack(shades, -1)
        for k in range(4):
            centre = 0.87 + 0.6 * np.sin(0.9 * time + 1.6 * k), 0.5 + 0.35 * np.cos(1.1 * time + 2.1 * k)
            inside = np.clip((0.13 - np.hypot(x - centre[0], y - centre[1])) * 80, 0, 1)[..., None]
            image = image * (1 - inside) + inside * np.array([40 + 50 * k, 220 - 45 * k, 90 + 30 * k])
        out[t] = (image + 2 * grain.standard_normal((height, width, 1), np.float32)).clip(0, 255)
    return out


def measure(chunks: list[np.ndarray], fps: int, encode) -> dict[str, float]:
    """Bytes per second of video, and milliseconds per chunk: median, worst, CPU time. The first chunk is a warm-up."""
    times, cpu, size = [], [], 0
    for k, frames in enumerate(chunks):
        begin, busy = perf_counter(), process_time()
        size += encode(frames, k * len(frames))
        times.append(1000 * (perf_counter() - begin))
        cpu.append(1000 * (process_time() - busy))
    seconds = sum(map(len, chunks)) / fps
    return {
        "bytes_a_second": size / seconds,
        "ms_a_chunk": median(times[1:] or times),
        "worst_ms": max(times),
        "cpu_ms_a_chunk": median(cpu[1:] or cpu),
    }


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    size, count = (args.height, args.width), 12 * args.chunks
    frames = read_clip(args.video, size, args.fps, count, "--video") if args.video else scene(count, *size)
    chunks = [frames[i : i + 12] for i in range(0, len(frames) - 11, 12)]
    if not chunks:
        raise UserError(f"--video={args.video} has {len(frames)} frames; give 12 or more")
    try:
        encoder = FragmentEncoder(args.fps, size, args.encoder)
    except (av.error.FFmpegError, ValueError, KeyError) as error:
        raise UserError(f"--encoder={args.encoder} does not work here ({error}); leave it out") from error
    figures: dict[str, Any] = {"size": size, "fps": args.fps, "chunks": len(chunks), "encoder": encoder.encoder}
    figures["fmp4"] = measure(chunks, args.fps, lambda part, first: len(encoder.encode(part, first)))
    with ThreadPoolExecutor(4) as pool:
        figures["jpeg"] = measure(chunks, args.fps, lambda part, first: sum(map(len, pool.map(jpeg, part))))
    print(f"{args.height}x{args.width} at {args.fps} frames a second, {len(chunks)} chunks of 12, {encoder.encoder}")
    for name in ("fmp4", "jpeg"):
        found = figures[name]
        print(
            f"{name:<5} {found['bytes_a_second'] / 1000:8.0f} kB/s  {found['ms_a_chunk']:6.0f} ms a chunk "
            f"(worst {found['worst_ms']:.0f}; {found['cpu_ms_a_chunk']:.0f} ms of CPU time)"
        )
    if args.json:
        write_json_atomic(args.json, figures)
    return 0


if __name__ == "__main__":
    exits.run(main)
