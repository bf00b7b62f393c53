"""Train one stage: `python train.py --config_path configs/train_tiny_distill.yaml --logdir logs/mine [key=value]`.

The same command resumes a run that was stopped.
"""

from utils import exits


def main() -> int:
    # imported here, so that --help and wrong flags answer at once
    from trainer.cli import parse

    args = parse()

    import os
    from pathlib import Path

    import torch

    from configs.load import load_config, to_yaml
    from pipeline.preflight import check_training
    from trainer.loop import make_sinks, run
    from trainer.registry import build_stage
    from utils.device import gpu_memory, pick_device, set_threads
    from utils.distributed import Ranks, process_group
    from utils.files import check_writable
    from utils.logs import console

    config = load_config(args.config_path, args.overrides)
    ranks = Ranks.from_env()
    console(quiet=not ranks.first)
    logdir = check_writable(args.logdir or f"logs/{Path(args.config_path).stem}", "--logdir")
    device = pick_device(config.device, ranks.local_rank)
    check_training(config, ranks.world, gpu_memory(device))
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # shapes never change within a stage
    if "OMP_NUM_THREADS" not in os.environ:
        set_threads(0)
    with process_group(ranks, device):
        stage = build_stage(config, device, ranks)
        if ranks.first:
            logdir.mkdir(parents=True, exist_ok=True)
            (logdir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        sinks = make_sinks(config, logdir, wandb=not args.disable_wandb, wandb_dir=args.wandb_save_dir)
        run(stage, logdir, sinks, save=not args.no_save)
    return 0


if __name__ == "__main__":
    exits.run(main)
