"""Write trajectories to an LMDB: `python scripts/create_lmdb.py --data_path pairs --lmdb_path pairs_lmdb`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import exits

exits.guard(__name__)


def main() -> int:
    parser = exits.Parser(description=__doc__)
    parser.add_argument("--data_path", required=True, help="folder of scripts/generate_ode_pairs.py")
    parser.add_argument("--lmdb_path", required=True, help="a new or empty folder")
    args = parser.parse_args()

    from configs.errors import UserError
    from trainer.pairs import open_pairs, write_lmdb
    from utils.files import check_writable

    pairs = open_pairs("--data_path", args.data_path)
    out = check_writable(args.lmdb_path, "--lmdb_path")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--lmdb_path={out} is not empty; choose another folder")
    print(f"{write_lmdb(pairs, out)} of {len(pairs)} trajectories written to {out}; the others have repeated prompts")
    return 0


if __name__ == "__main__":
    exits.run(main)
