"""Check everything that a run needs, within a second and without loading weights.

    python scripts/doctor.py                                                     # inference with the shipped model
    python scripts/doctor.py --config_path configs/wan2.1_t2v_1.3b.yaml
    python scripts/doctor.py --config_path configs/train_wan2.1_t2v_1.3b.yaml --train --gpus 8
    python scripts/doctor.py --config_path configs/wan2.1_t2v_1.3b.yaml stream.window_frames=9

The exit code is 1 if there are problems. Memory is planned by formulas, which scripts/measure_memory.py compares with a
GPU.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits

exits.guard(__name__)

from configs.errors import UserError
from configs.load import load_config
from pipeline.preflight import check_environment

PROBLEMS = 1


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = exits.Parser(prog="scripts/doctor.py", description=__doc__, formatter_class=form)
    parser.add_argument("--config_path", default="configs/tiny.yaml", metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--train", action="store_true", help="check for train.py instead of inference.py")
    parser.add_argument("--gpus", type=int, metavar="N", help="plan training for N GPUs (default: those here)")
    parser.add_argument("settings", nargs="*", metavar="key.sub=value", help="any value of configs/schema.py")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.gpus is not None and args.gpus < 1:
        raise UserError(f"--gpus={args.gpus} is not a number of GPUs; give 1 or more")
    report = check_environment(load_config(args.config_path, args.settings), training=args.train, world=args.gpus)
    print(report)
    count = len(report.problems)
    print(f"\n{count} thing{'s' * (count != 1)} to mend, marked PROBLEM" if count else "\nnothing to mend")
    return PROBLEMS if count else 0


if __name__ == "__main__":
    exits.run(main)
