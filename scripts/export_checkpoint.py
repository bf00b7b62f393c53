"""Export the student of a training run: `python scripts/export_checkpoint.py logs/train_tiny_distill out/student`.

Inference loads the result, which has a fifth of the size of a checkpoint (no optimizer, no critic). The `export` folder
of a run has the same format and belongs to its newest checkpoint.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import exits

exits.guard(__name__)


def newest_of(run: Path) -> Path:
    """The newest complete checkpoint of a run; `run` itself if it has none, since it may be a checkpoint."""
    from configs.errors import UserError
    from model.weights.run_folders import MODEL, checkpoints
    from trainer.checkpoint.save import verified

    there = checkpoints(run)
    whole = (folder for folder in reversed(there) if (folder / MODEL).is_file() or verified(folder))
    newest = next(whole, None)
    if there and newest is None:
        raise UserError(f"run={run} has no complete checkpoint; give its folder export, or a copy of the run")
    return newest or run


def main() -> int:
    parser = exits.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run, or of one of its checkpoints")
    parser.add_argument("out", help="folder to write; it must not exist")
    parser.add_argument("--raw", action="store_true", help="export the trained weights, not their moving average")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"], help="(%(default)s)")
    args = parser.parse_args()

    from configs.errors import UserError
    from model.weights.load import load_student, save_network
    from utils.device import DTYPES
    from utils.files import check_writable

    out = check_writable(args.out, "out")
    if out.exists():
        raise UserError(f"out={out} exists; choose another folder")
    run = Path(args.run)
    student = load_student(newest_of(run), use_ema=not args.raw, name="run")
    save_network(student, out, card=student.card, dtype=DTYPES[args.dtype])
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    what = "trained" if args.raw else "averaged"
    print(f"{out}: {what} weights of step {student.card.get('step', '?')}, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    exits.run(main)
