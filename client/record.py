"""Record a live stream into an MP4 that plays.

python -m client.record http://127.0.0.1:7860 "a red circle moves right" circle.mp4 --seconds 10
"""

import argparse
import asyncio
import os
import sys

from client import LiveClient, LiveError, Recorder


async def record(
    url: str,
    prompt: str,
    path: str,
    *,
    seconds: float | None = None,
    seed: int = 0,
    key: str | None = None,
    overwrite: bool = False,
) -> Recorder:
    """Record until the video's length is reached. The file is whole whenever it ends."""
    recorder = Recorder(path, overwrite=overwrite)  # before the server makes anything
    async with LiveClient(url, key) as live:
        with recorder:
            await live.open(prompt, seed=seed, seconds=seconds)
            async for chunk in live:
                recorder.write(chunk)
        return recorder


def stopped(path: str) -> int:
    """What Ctrl-C leaves, on standard error; the exit code."""
    print(f"stopped; {path} holds what was made, if a chunk came", file=sys.stderr)
    return 130


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m client.record", description=__doc__.partition("\n")[0])
    parser.add_argument("url", help="where the server listens: http://127.0.0.1:7860")
    parser.add_argument("prompt")
    parser.add_argument("path", help="the MP4 file")
    parser.add_argument("--seconds", type=float, help="of video (default: as long as the server allows)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    parser.add_argument("--key", default=os.environ.get("DIAGONAL_KEY"), help="API key (default: $DIAGONAL_KEY)")
    args = parser.parse_args(argv)
    options = {"seconds": args.seconds, "seed": args.seed, "key": args.key, "overwrite": args.overwrite}
    try:
        recorder = asyncio.run(record(args.url, args.prompt, args.path, **options))
    except (LiveError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return stopped(args.path)
    print(f"{recorder.path}: {recorder.frames} frames")
    return 0


if __name__ == "__main__":
    sys.exit(main())
