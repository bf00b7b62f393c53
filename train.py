"""Train one stage: `python train.py --config_path configs/train_tiny_pretrain.yaml --logdir logs/pretrain [key=value]`.

The same command resumes a run that was stopped.
"""

import argparse
import sys
from pathlib import Path

import torch

from configs.errors import UserError
from configs.load import load_config, to_yaml
from trainer.loop import run
from trainer.registry import build_stage
from utils.device import pick_device
from utils.distributed import Ranks, process_group
from utils.files import check_writable
from utils.logs import console


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config_path", default="configs/train_tiny_pretrain.yaml", help="YAML preset")
    parser.add_argument("--logdir", help="folder of the run; default logs/<config name>")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting, e.g. training.steps=100")
    return parser.parse_args()


def main() -> int:
    args = parse()
    config = load_config(args.config_path, args.overrides)
    ranks = Ranks.from_env()
    console(quiet=not ranks.first)
    logdir = check_writable(args.logdir or f"logs/{Path(args.config_path).stem}", "--logdir")
    device = pick_device(config.device, ranks.local_rank)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # shapes never change within a stage
    with process_group(ranks, device):
        stage = build_stage(config, device, ranks)
        logdir.mkdir(parents=True, exist_ok=True)
        (logdir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        run(stage, logdir)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
