"""Train one stage: `python train.py --config_path configs/train_tiny_distill.yaml --logdir logs/mine [key=value]`.

The same command resumes a run that was stopped.
"""

from utils import exits

exits.guard(__name__)


def main() -> int:
    from trainer.cli import parse

    args = parse()

    from trainer.command import train  # torch comes with it: --help and wrong flags have answered by now

    train(args)
    return 0


if __name__ == "__main__":
    exits.run(main)
