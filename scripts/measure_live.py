"""What is claimed of live streams, measured: a table, and JSON with --json.

    python scripts/measure_live.py --minutes 10 --switches 64 --plays 5 --json live.json    # tiny model, any machine
    python scripts/measure_live.py --config_path configs/wan2.1_t2v_1.3b.yaml --random_weights 1.3B --switches 0

    long       a stream of --minutes (of video): memory and chunk time flat, each frame in the file exactly once, seams,
               drift of saturation over --drift_frames latent frames
    switches   tiny world: --switches streams whose prompt changes its colour; in how many the colour is seen, and when
    demo       --plays presses of Play at the demo's server: milliseconds until the first frame has arrived

Random weights serve for speed and memory; what they show means nothing.
"""

import argparse
import asyncio
import json
import math
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits  # noqa: E402

exits.guard(__name__)

from configs.errors import UserError  # noqa: E402
from configs.load import load_config  # noqa: E402
from configs.schema import Config  # noqa: E402
from model.denoiser import Student  # noqa: E402
from model.fast.student import FastPlan  # noqa: E402
from model.weights.random import RandomTextEncoder, random_codec, random_student  # noqa: E402
from pipeline.diagonal import DiagonalPipeline, apply_fast_plan  # noqa: E402
from scripts.bench.live import lines, switches, watch_stream  # noqa: E402
from trainer.tiny.world import TinyWorld  # noqa: E402
from utils.device import pick_device, pick_dtype, set_threads  # noqa: E402
from utils.files import write_json_atomic  # noqa: E402
from utils.logs import console  # noqa: E402

PROMPT = "a red circle moves right"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = exits.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/tiny.yaml", metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of video; 0 = none (default: %(default)s)")
    parser.add_argument("--drift_frames", type=int, default=1000, metavar="N", help="latent (default: %(default)s)")
    parser.add_argument("--switches", type=int, default=64, help="changes of prompt (default: %(default)s)")
    parser.add_argument("--switch_chunk", type=int, default=4, metavar="K", help="the first under the new prompt")
    parser.add_argument("--batch", type=int, default=8, help="streams at once, of --switches (default: %(default)s)")
    parser.add_argument("--plays", type=int, default=5, help="presses of Play at the demo; 0 = none")
    parser.add_argument("--random_weights", choices=("tiny", "1.3B", "14B"), metavar="SIZE", help="tiny, 1.3B, 14B")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--video", type=Path, metavar="FILE", help="keep the long stream's file")
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="any value of configs/schema.py")
    args = parser.parse_intermixed_args(argv)
    for name, least in (("minutes", 0), ("drift_frames", 1), ("switches", 0), ("switch_chunk", 1), ("batch", 1)):
        if vars(args)[name] < least:
            raise UserError(f"--{name}={vars(args)[name]} is less than {least}; give {least} or more")
    return args


def pipeline(config: Config, size: str | None) -> DiagonalPipeline:
    """What the configuration names, or random weights of a size."""
    if size is None:
        return DiagonalPipeline.from_config(config)
    device = pick_device(config.device)
    dtype, plan = pick_dtype(config.inference.precision, device), FastPlan.from_config(config.inference, device)
    student = Student(random_student(size, device, dtype))
    text = RandomTextEncoder(config.model.text_tokens, student.model.config.text_dim, device)
    return DiagonalPipeline(config, *apply_fast_plan(student, random_codec(config, size, device, dtype), plan), text)


def demo(pipe: DiagonalPipeline, plays: int) -> dict[str, Any]:
    """Milliseconds from Play to the first frame, at a server in this process, over its own socket."""
    try:
        import uvicorn
        from websockets.asyncio.client import connect

        from server.demo_app import SOCKET, bound_socket, make_app
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; see requirements-demo.txt, or --plays 0") from error
    listener = bound_socket("127.0.0.1", 0)
    options = {"log_level": "error", "timeout_graceful_shutdown": 2, **SOCKET}
    server = uvicorn.Server(uvicorn.Config(make_app(pipe, warm=True), **options))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()

    async def visit() -> list[float]:
        waits = []
        async with connect(f"ws://127.0.0.1:{listener.getsockname()[1]}/stream", max_size=None) as line:
            hello = json.loads(await line.recv())
            for seed in range(plays):
                begin = time.perf_counter()
                message = {"type": "play", "prompt": PROMPT, "seed": seed, "steps": hello["steps"], "seconds": 1}
                await line.send(json.dumps(message))
                while isinstance(await line.recv(), str):
                    pass
                waits.append(1000 * (time.perf_counter() - begin))
                await line.send('{"type": "stop"}')
                await _until_stopped(line)
        return waits

    try:
        while not server.started:
            time.sleep(0.02)
        waits = asyncio.run(visit())
    finally:
        server.should_exit = True
        thread.join(10)
    return {"plays": plays, "first_frame_ms": median(waits), "slowest_ms": max(waits)}


async def _until_stopped(line) -> None:
    while True:
        message = await line.recv()
        if isinstance(message, str) and json.loads(message)["type"] == "stopped":
            return


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console()
    config = load_config(args.config_path, args.settings)
    set_threads(config.cpu_threads)
    pipe, video = pipeline(config, args.random_weights), config.video
    figures: dict[str, Any] = {"weights": f"random, {args.random_weights}" if args.random_weights else "as configured"}
    figures["device"] = str(pipe.session.device)
    if args.minutes:
        frames = max(args.minutes * 60 * video.fps, 1)
        chunks = math.ceil((frames + 3) / 4 / config.stream.chunk_frames)
        with tempfile.TemporaryDirectory() as folder:
            path = args.video or Path(folder) / "long.mp4"
            figures["long"] = watch_stream(pipe.session, PROMPT, chunks, video.fps, path, args.drift_frames)
    if args.switches:
        world = TinyWorld(video.height, video.width)
        figures["switches"] = switches(pipe.session, world, args.switches, args.switch_chunk, args.batch)
    if args.plays:
        figures["demo"] = demo(pipe, args.plays)
    print("\n".join(lines(figures)))
    if args.json:
        write_json_atomic(args.json, figures)
    return 0


if __name__ == "__main__":
    exits.run(main)
