"""From a training run, the student alone: `python scripts/export_checkpoint.py logs/train_tiny_distill out/student`.

The result is what inference loads: a fifth of a checkpoint, which also holds optimiser and critic. The `export` folder
of a run has the same form and is that of its newest checkpoint.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import exits  # noqa: E402

exits.guard(__name__)


def main() -> int:
    parser = exits.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run, or of one of its checkpoints")
    parser.add_argument("out", help="folder to write; it must not exist")
    parser.add_argument("--raw", action="store_true", help="the trained weights and not their moving average")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"], help="(%(default)s)")
    args = parser.parse_args()

    from configs.errors import UserError
    from model.weights.load import load_student, save_student
    from utils.device import DTYPES
    from utils.files import check_writable

    out = check_writable(args.out, "out")
    if out.exists():
        raise UserError(f"out={out} exists; choose another folder")
    run = Path(args.run)
    newest = sorted(run.glob("checkpoint_*"))
    folder = newest[-1] if newest else run
    student = load_student(folder, use_ema=not args.raw, name="run")
    save_student(student, out, student.card, dtype=DTYPES[args.dtype])
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    what = "trained" if args.raw else "averaged"
    print(f"{out}: {what} weights of step {student.card.get('step', '?')}, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    exits.run(main)
