"""Flags of `train.py`; names as in Self-Forcing and its forks. Most set one key of the configuration."""

import argparse
import json
from collections.abc import Sequence

from utils.exits import Parser, set_by_flags


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments with `config_path`, `logdir` (or None), `no_save`, `wandb_save_dir`, and `overrides` as `key=value`."""
    parser = Parser(prog="train.py", description="Train one stage; the same command resumes it.", allow_abbrev=False)
    parser.add_argument("--config_path", default="configs/train_tiny.yaml", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--logdir", metavar="FOLDER", help="where the run goes (default: logs/<config>)")
    parser.add_argument("--max_checkpoints", metavar="N", help="newest checkpoints to keep (training.max_checkpoints)")
    parser.add_argument("--no_save", action="store_true", help="write no checkpoint and no export, only metrics")
    parser.add_argument("--no_visualize", action="store_true", help="no validation (training.validation_clips=0)")
    off, folder = ("--disable-wandb", "--disable_wandb"), ("--wandb-save-dir", "--wandb_save_dir")
    parser.add_argument(*off, action="store_true", help="no wandb, even if training.loggers names it")
    parser.add_argument(*folder, metavar="FOLDER", help="for wandb's files (default: that of the run)")
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="any value of configs/train_schema.py")
    args = parser.parse_intermixed_args(argv)
    flags = []
    if args.max_checkpoints is not None:
        flags.append(f"training.max_checkpoints={json.dumps(args.max_checkpoints)}")
    if args.no_visualize:
        flags.append("training.validation_clips=0")
    args.overrides = flags + args.settings
    set_by_flags({"training.max_checkpoints": "--max_checkpoints"} if args.max_checkpoints is not None else {})
    return args
