"""What is claimed of live streams, measured: a table, and JSON with --json.

    python scripts/measure_live.py --minutes 10 --switches 64 --plays 5 --json live.json    # tiny model, any machine
    python scripts/measure_live.py --config_path configs/wan2.1_t2v_1.3b.yaml --random_weights 1.3B --switches 0

    long       a stream of --minutes (of video): memory and chunk time flat, each frame in the file exactly once, seams,
               drift of saturation over --drift_frames latent frames
    switches   tiny world: --switches streams whose prompt changes its colour; in how many the colour is seen, and when
    demo       --plays streams, one after the other, at a server: milliseconds until the first frame has arrived
    sessions   for each number of --sessions, from the smallest up to the first with late frames: so many clients at a
               server with --workers, half a second one after the other, at the video's rate (paced): which frames are
               late, what encoding takes. The last number once more as fast as they come (saturating). Of several
               workers, all are measured and then one

Random weights serve for speed and memory; what they show means nothing.
"""

import argparse
import asyncio
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits  # noqa: E402

exits.guard(__name__)

from configs.errors import UserError  # noqa: E402
from configs.load import load_config  # noqa: E402
from configs.schema import Config  # noqa: E402
from model.sizes import TRANSFORMER_SIZES  # noqa: E402
from pipeline.diagonal import DiagonalPipeline  # noqa: E402
from scripts.bench.live import lines, random_pipeline, switches, watch_stream  # noqa: E402
from scripts.studies.vocabulary import check_world  # noqa: E402
from trainer.tiny.world import TinyWorld  # noqa: E402
from utils.files import check_file, write_json_atomic  # noqa: E402
from utils.logs import console, get_logger  # noqa: E402

log = get_logger(__name__)
PROMPT = "a red circle moves right"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = exits.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/tiny.yaml", metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="of video; 0 = none (default: %(default)s)")
    parser.add_argument("--drift_frames", type=int, default=1000, metavar="N", help="latent (default: %(default)s)")
    parser.add_argument("--switches", type=int, default=64, help="changes of prompt (default: %(default)s)")
    parser.add_argument("--switch_chunk", type=int, default=4, metavar="K", help="the first under the new prompt")
    parser.add_argument("--batch", type=int, default=8, help="streams at once, of --switches (default: %(default)s)")
    parser.add_argument("--plays", type=int, default=5, help="streams opened at a server; 0 = none")
    parser.add_argument("--sessions", type="positive", nargs="+", default=[], metavar="N", help="clients at once")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of them (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes, one a GPU (default: %(default)s)")
    parser.add_argument("--random_weights", choices=("tiny", *TRANSFORMER_SIZES), help="sizes of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--video", type=Path, metavar="FILE", help="keep the long stream's file")
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="any value of configs/schema.py")
    args = parser.parse_intermixed_args(argv)
    if args.json:
        check_file(args.json, "--json")
    zero, one = ("minutes", "switches", "plays"), ("drift_frames", "switch_chunk", "batch", "seconds", "workers")
    for name, least in (*((name, 0) for name in zero), *((name, 1) for name in one)):
        if vars(args)[name] < least:
            raise UserError(f"--{name}={vars(args)[name]} is less than {least}; give {least} or more")
    return args


def played(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """What streams of one pipeline show."""
    video, size = config.video, args.random_weights
    pipe = random_pipeline(config, size) if size else DiagonalPipeline.from_config(config)
    results: dict[str, Any] = {"device": str(pipe.session.device)}
    if args.minutes:
        frames = max(args.minutes * 60 * video.fps, 1)
        chunks = math.ceil((frames + 3) / 4 / config.stream.chunk_frames)
        with tempfile.TemporaryDirectory() as folder:
            path = args.video or Path(folder) / "long.mp4"
            results["long"] = watch_stream(pipe.session, PROMPT, chunks, video.fps, path, args.drift_frames)
    if args.switches:
        world = TinyWorld(video.height, video.width)
        results["switches"] = switches(pipe.session, world, args.switches, args.switch_chunk, args.batch)
    return results


def served(args: argparse.Namespace) -> dict[str, Any]:
    """What clients of a server see."""
    try:
        from scripts.bench import sessions
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; see requirements-demo.txt, or --plays 0") from error
    source = sessions.BenchSource(args.config_path, tuple(args.settings), size=args.random_weights)
    most, results = math.ceil(max(args.sessions, default=1) / args.workers), {}
    with sessions.live_server(source, args.workers, most) as (url, pool):
        if args.plays:
            results["demo"] = asyncio.run(sessions.first_frames(url, args.plays))
        for figures in sessions.sessions(url, pool, args.sessions, args.seconds) if args.sessions else ():
            log.info("\n".join(lines(figures)))
            results |= {"sessions": results.get("sessions", {}) | figures}
    return results


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console()
    config = load_config(args.config_path, args.settings)
    if args.switches and not args.random_weights:
        check_world(config, "tiny")
    figures: dict[str, Any] = {"weights": f"random, {args.random_weights}" if args.random_weights else "as configured"}
    if args.minutes or args.switches:
        figures |= played(args, config)
    if args.plays or args.sessions:
        figures |= served(args)
    print("\n".join(lines(figures)))
    if args.json:
        write_json_atomic(args.json, figures)
    return 0


if __name__ == "__main__":
    exits.run(main)
