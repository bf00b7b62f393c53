"""The command line of serve.py and demo.py, which differ in defaults alone."""

import argparse
import re
import signal
from dataclasses import dataclass, fields
from pathlib import Path

import uvicorn

from configs.errors import UserError
from server.access import AccessPolicy, address, bound_socket, check_access, is_loopback, read_keys
from server.app import ServerOptions, create_app
from server.job_store import JobLimits, JobStore
from server.limits import Limits
from server.protocols import SOCKET
from server.worker_messages import ModelSource
from server.workers import WorkerPool
from utils import exits
from utils.logs import console, get_logger
from utils.machine import gpus

log = get_logger(__name__)
LORA = re.compile(r"([A-Za-z0-9_.-]{1,60})=(.+)")


@dataclass(frozen=True)
class Program:
    prog: str
    description: str
    port: int
    workers: int  # 0 = one a GPU
    jobs_folder: str
    config: str = "configs/tiny.yaml"


def parse(program: Program, argv: list[str] | None = None) -> argparse.Namespace:
    parser = exits.Parser(prog=program.prog, description=program.description, allow_abbrev=False)

    def flag(name: str, default: object, help: str, kind: type = str, metavar: str | None = None) -> None:
        parser.add_argument(name, type=kind, default=default, metavar=metavar, help=f"{help} (default: %(default)s)")

    live, jobs = Limits(), JobLimits()
    flag("--config_path", program.config, "what each worker loads", metavar="FILE")
    flag("--host", "127.0.0.1", "address to listen at; other machines need keys")
    flag("--port", program.port, "0 = any that is free", int)
    flag("--workers", program.workers, "processes with the model in each; 0 = one a GPU or group of GPUs", int)
    parser.add_argument("--keys_file", metavar="FILE", help="API keys, `NAME KEY` a line; also in DIAGONAL_API_KEYS")
    parser.add_argument(
        "--allow_origin", action="append", default=[], metavar="https://HOST",
        help="where a proxy shows the page, if it changes the Host header; may be repeated, and needs keys",
    )  # fmt: skip
    parser.add_argument(
        "--lora", action="append", default=[], metavar="NAME=FILE", help="a LoRA that jobs may name; may be repeated"
    )
    flag("--jobs_folder", program.jobs_folder, "where jobs and their videos are kept", metavar="FOLDER")
    flag("--queue", jobs.queue, "jobs that may wait", int)
    flag("--queue_per_key", jobs.queue_per_key, "jobs of a key that may wait or run", int)
    flag("--kept_per_key", jobs.kept_per_key, "jobs of a key in all, finished ones included", int)
    flag("--keep_hours", jobs.keep_hours, "until a finished job is deleted", float)
    flag("--grace_seconds", 20.0, "that running jobs have to finish when the server is stopped", float)
    flag("--visitors", live.visitors, "live connections at once", int)
    flag("--streams_per_key", live.streams_per_key, "live connections of a key, with a stream each", int)
    flag("--streams", live.streams, "live streams of a worker; 0 = as many as it keeps at their rate", int)
    flag("--idle_seconds", live.idle_seconds, "until a silent live connection is closed", float)
    flag("--max_seconds", live.max_seconds, "of one video", float)
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="any value of configs/schema.py")
    return parser.parse_intermixed_args(argv)


def run(program: Program) -> int:
    """Serve until SIGTERM or Ctrl-C. Raises UserError for invalid options, if possible before anything is loaded."""
    args = parse(program)
    console()
    keys = read_keys(args.keys_file)
    origins = [origin.lower().rstrip("/") for origin in args.allow_origin]
    check_access(args.host, keys, origins)
    exits.set_by_flags({name: f"--{name}" for name in vars(args)})
    live, jobs = (
        kind(**{field.name: vars(args)[field.name] for field in fields(kind) if field.name in vars(args)})
        for kind in (Limits, JobLimits)
    )
    if not 0 <= args.grace_seconds <= 86_400:
        raise UserError(f"--grace_seconds={args.grace_seconds:g} is out of range; give 0 to 86,400")
    loras = read_loras(args.lora)
    source = ModelSource(args.config_path, tuple(args.settings), loras)
    config = source.config()
    source.check()
    groups = len(gpus()) // config.inference.sequence_parallel if config.device != "cpu" else 1
    workers = args.workers or max(1, groups)
    pool = WorkerPool(source, workers, live)
    store = JobStore(Path(args.jobs_folder), jobs)
    listener = bound_socket(args.host, args.port)
    faults: list[BaseException] = []

    def started(fault: BaseException | None) -> None:
        if fault is None:
            log.info(f"open {place}")
        else:
            faults.append(fault)
            server.should_exit = True

    options = ServerOptions(live=live, grace_seconds=args.grace_seconds, loras=tuple(loras))
    app = create_app(pool, store, AccessPolicy(keys, is_loopback(args.host), origins), options, started)
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=5, **SOCKET))
    place = address(args.host, listener.getsockname()[1])
    log.info(f"{place} answers; the model is being loaded")
    # uvicorn shuts down on SIGTERM, and then raises it again for the previous handler
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # a closed terminal, without nohup
        signal.signal(signal.SIGHUP, lambda number, frame: setattr(server, "should_exit", True))
    server.run([listener])
    for fault in faults:
        raise fault
    if not server.started:  # its lifespan has failed and logged the reason
        raise UserError("the server could not be started; what is above says why")
    return 0


def read_loras(texts: list[str]) -> dict[str, str]:
    """Parse NAME=FILE arguments. Raises UserError if one is invalid."""
    files: dict[str, str] = {}
    for text in texts:
        match = LORA.fullmatch(text)
        if match is None:
            raise UserError(f"--lora={text} is not of the form NAME=FILE; give a name of letters, digits, _, . or -")
        if match[1] in files:
            raise UserError(f"--lora={text} has the name of another one; rename it")
        files[match[1]] = match[2]
    return files
