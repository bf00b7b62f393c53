"""What two processes run for tests/test_ranks.py: a few steps of a distillation, and the state they end in."""

import sys
from pathlib import Path

import torch
from distill_case import distill_stage

from trainer.loop import run
from utils.distributed import Ranks, process_group


def main(assets: str, out: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.from_env()
    with process_group(ranks, torch.device("cpu"), timeout_s=120):
        stage = distill_stage(Path(assets), *overrides, ranks=ranks)
        run(stage, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
