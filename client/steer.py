"""Steer a live stream: prompts that come in at their time, recorded as one video.

python -m client.steer http://127.0.0.1:7860 story.mp4 "a red circle moves right" 4:"a blue circle moves right"
"""

import argparse
import asyncio
import math
import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from client import Chunk, LiveClient, LiveError, Place, Receipt, Recorder
from client.record import stopped

Cue = tuple[float, str]  # seconds of the video, prompt


async def steer(
    url: str,
    path: str,
    cues: Sequence[Cue],
    *,
    seconds: float,
    seed: int = 0,
    key: str | None = None,
    overwrite: bool = False,
) -> list[Place]:
    """Play the first cue's prompt and change to each later one at its time; from where on each shows.

    A prompt shows from the chunk that is made next. The chunk of its time is kept back until it has been sent: before
    that the server does not hear that enough has been shown. What it makes as soon as the video begins
    (`hello["limits"]["ahead_seconds"]`) cannot be kept back; a prompt of that time shows after it.
    """
    first, *later = cues
    receipts: list[Receipt] = []
    unsaid: deque[Chunk] = deque()  # what the server has not been told to be shown
    recorder = Recorder(path, overwrite=overwrite)  # before the server makes anything
    async with LiveClient(url, key, paced=True) as live:
        with recorder:
            receipts.append(await live.open(first[1], seed=seed, seconds=seconds))
            ahead = live.hello["limits"]["ahead_seconds"] * live.hello["fps"]
            async for chunk in live:
                recorder.write(chunk)
                unsaid.append(chunk)
                while later and chunk_at(later[0][0], live.hello) <= recorder.frames:
                    receipts.append(await live.set_prompt(later.pop(0)[1]))
                kept_back = chunk_at(later[0][0], live.hello) if later else math.inf
                while unsaid and unsaid[0].frame + unsaid[0].frames + ahead < kept_back:
                    await live.shown(unsaid.popleft())
        return [await receipt.applied for receipt in receipts]


def chunk_at(seconds: float, hello: Mapping[str, Any]) -> int:
    """First frame of the chunk that shows this time of the video."""
    frame, first = int(seconds * hello["fps"]), hello["first_frames"]
    return 0 if frame < first else frame - (frame - first) % hello["chunk_frames"]


def cue(text: str) -> Cue:
    """`4:a blue circle` is a prompt at 4 s; without a time, one at 0 s, which may have a colon of its own."""
    time, colon, prompt = text.partition(":")
    try:
        return (float(time), prompt) if colon else (0.0, text)
    except ValueError:
        return 0.0, text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m client.steer", description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="where the server listens: http://127.0.0.1:7860")
    parser.add_argument("path", help="the MP4 file")
    parser.add_argument("cues", nargs="+", type=cue, metavar="SECONDS:PROMPT", help="the first one begins the video")
    parser.add_argument("--seconds", type=float, default=10.0, help="of video (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    parser.add_argument("--key", default=os.environ.get("DIAGONAL_KEY"), help="API key (default: $DIAGONAL_KEY)")
    args = parser.parse_args(argv)
    before = 0.0
    for number, (time, prompt) in enumerate(args.cues):
        if not (time > before if number else time >= 0):
            parser.error(
                f"{time:g}:{prompt} is not later than {before:g} s; give each prompt but the first as SECONDS:PROMPT, "
                "in the order of their times"
            )
        before = time
        if time >= args.seconds:
            parser.error(
                f"{time:g}:{prompt} comes after the end of the video; give more than --seconds {args.seconds:g}"
            )
    options = {"seconds": args.seconds, "seed": args.seed, "key": args.key, "overwrite": args.overwrite}
    try:
        places = asyncio.run(steer(args.url, args.path, args.cues, **options))
    except (LiveError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return stopped(args.path)
    for (_, prompt), place in zip(args.cues, places, strict=True):
        print(f"frame {place.frame}: {prompt}", *place.warnings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
