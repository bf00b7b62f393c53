"""Write ODE trajectories of the teacher, one file per prompt, for stage ode_regression and the regression losses.

    python scripts/generate_ode_pairs.py --config_path configs/train_tiny_distill.yaml --output_folder pairs --count 64

States at the timesteps of the configured schedule and the final state are kept. Existing files are kept, so the command
can be stopped and restarted; torchrun distributes the prompts. File format: trainer/pairs.py.

With --causal the teacher is a causal many-step student trained by teacher forcing, which generates chunk by chunk:
`--causal training.init.teacher=logs/tiny_teacher_forcing`. The files are marked as causal for stage ode_regression.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import exits

exits.guard(__name__)


def parse() -> argparse.Namespace:
    parser = exits.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--config_path", default="configs/train_tiny_distill.yaml")
    parser.add_argument("--output_folder", required=True)
    parser.add_argument("--caption_path", help="prompts, one a line (default: what the configuration trains on)")
    parser.add_argument("--guidance_scale", type=float, help="s of cond + s (cond - uncond) (distill.guidance)")
    parser.add_argument("--steps", type="positive", default=48, help="Euler steps of un-warped time (%(default)s)")
    parser.add_argument("--causal", action="store_true", help="training.init.teacher is causal: chunk by chunk")
    parser.add_argument("--count", type="positive", help="number of prompts (default: all)")
    parser.add_argument("--batch_size", type="positive", default=1, help="prompts integrated together (%(default)s)")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


def main() -> int:
    args = parse()

    import torch

    from configs.load import load_config
    from trainer.pairs import write_timesteps
    from trainer.trajectories import CausalTrajectoryMaker, TrajectoryMaker
    from utils.device import pick_device
    from utils.distributed import Ranks
    from utils.files import atomic_path, check_writable
    from utils.progress import progress_bar

    given = [f"training.distill.prompts={json.dumps(args.caption_path)}", "training.open_captions=0"]
    extra = [] if args.caption_path is None else given
    config = load_config(args.config_path, [*extra, *args.settings])
    ranks = Ranks.from_env()
    folder = check_writable(args.output_folder, "--output_folder")
    folder.mkdir(parents=True, exist_ok=True)
    device = pick_device(config.device, ranks.local_rank)
    kind = CausalTrajectoryMaker if args.causal else TrajectoryMaker
    maker = kind(config, device, steps=args.steps, guidance=args.guidance_scale)
    if ranks.first:
        write_timesteps(folder, maker.timesteps, causal=maker.causal)
    share = ranks.share(range(len(maker.prompts[: args.count])))  # whatever other ranks have written
    mine = [i for i in share if not (folder / f"{i:05d}.pt").exists()]
    with progress_bar("trajectories", len(mine), disable=None if ranks.first else True) as bar:
        for first in range(0, len(mine), args.batch_size):
            batch = mine[first : first + args.batch_size]
            for index, states in zip(batch, maker.make(batch).half().cpu(), strict=True):
                with atomic_path(folder / f"{index:05d}.pt") as path:
                    torch.save({maker.prompts[index]: states[None].clone()}, path)
            bar.update(len(batch))
    print(f"{len(list(folder.glob('*.pt')))} trajectories of {len(maker.timesteps)} states in {folder}")
    return 0


if __name__ == "__main__":
    exits.run(main)
