"""The demo in a browser: `bash demo.sh [--port 7860]`, then open the address that it prints."""

import argparse

from utils import exits

exits.guard(__name__)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = exits.Parser(
        prog="demo.py", description="A page that plays streams while they are made.", allow_abbrev=False
    )
    parser.add_argument("--config_path", default="configs/tiny.yaml", metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; other machines need --token")
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s; 0 = any that is free)")
    parser.add_argument("--token", metavar="TEXT", help="what a visitor must know, at least 8 characters")
    parser.add_argument(
        "--allow_origin", action="append", default=[], metavar="https://HOST",
        help="where a proxy shows the page, if it changes the Host header; may be repeated, and needs --token",
    )  # fmt: skip
    parser.add_argument("--visitors", type=int, default=8, help="at once (default: %(default)s)")
    parser.add_argument("--idle_seconds", type=float, default=600, help="until a silent visitor is let go")
    parser.add_argument("--max_seconds", type=float, default=600, help="of one video (default: %(default)s)")
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="any value of configs/schema.py")
    return parser.parse_intermixed_args(argv)


def main() -> int:
    args = parse()
    import uvicorn

    from server.demo_app import SOCKET, Limits, address, bound_socket, check_access, is_loopback, make_app

    origins = [origin.lower().rstrip("/") for origin in args.allow_origin]
    check_access(args.host, args.token, origins)
    limits = Limits(visitors=args.visitors, idle_seconds=args.idle_seconds, max_seconds=args.max_seconds)
    listener = bound_socket(args.host, args.port)

    from configs.load import load_config
    from pipeline.diagonal import DiagonalPipeline
    from pipeline.plan import make_plan
    from server.messages import MAX_MESSAGE
    from utils.logs import console

    console()
    config = load_config(args.config_path, args.settings)
    make_plan(config, ["a prompt"])  # every check that needs no weights in memory
    pipe = DiagonalPipeline.from_config(config)
    app = make_app(
        pipe, warm=True, token=args.token, local=is_loopback(args.host), origins=origins, limits=limits
    )
    print(f"open {address(args.host, listener.getsockname()[1], args.token)}", flush=True)
    settings = {"ws_max_size": MAX_MESSAGE, "ws_max_queue": 16, "log_level": "warning", "server_header": False}
    uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=5, **SOCKET, **settings)).run([listener])
    return 0


if __name__ == "__main__":
    exits.run(main)
