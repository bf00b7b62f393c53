"""Make the shipped tiny system from nothing: stages 1 to 10, one after the other, in one process.

    python scripts/train_tiny.py [--logdir logs/tiny] [--stages text codec ...] [key=value ...]

Each stage is `train.py --config_path configs/train_tiny_<stage>.yaml` and starts from what the ones before it wrote.
The same command goes on where a stopped run was. Settings given here go to every stage.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import exits  # noqa: E402

exits.guard(__name__)

from trainer.cli import parse  # noqa: E402
from trainer.command import train  # noqa: E402

STAGES = (
    "text", "stills", "codec", "decoder", "chunk", "crops", "pretrain", "teacher_forcing", "few_steps", "first_chunk",
    "switch", "open", "distill",
)  # fmt: skip
SHIPPED = {"distill": ["training.export=assets/tiny/student"]}  # which that stage by itself leaves alone


def main() -> int:
    parser = exits.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--logdir", default="logs/tiny", help="folder of the runs, one folder a stage (%(default)s)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help="some of them")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. training.validation_clips=256")
    args = parser.parse_intermixed_args()
    rows = []
    for stage in args.stages:
        start = time.perf_counter()
        flags = ["--config_path", f"configs/train_tiny_{stage}.yaml", "--logdir", f"{args.logdir}/{stage}"]
        ended = train(parse([*flags, *SHIPPED.get(stage, ()), *args.settings]))
        rows.append(f"{stage:<16} {time.perf_counter() - start:>8.1f}")
        if not ended:
            break
    print("\n".join([f"{'stage':<16} {'seconds':>8}", *rows]))
    return 0


if __name__ == "__main__":
    exits.run(main)
