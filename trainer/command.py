"""What `train.py` does: one stage, from flags to its end."""

import math
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import torch

from configs.errors import UserError
from configs.load import load_config, to_yaml
from model.fp8 import check_fp8
from pipeline.preflight import check_room, check_training
from trainer.checkpoint.resume import check_export, check_init_finished, check_resumable, export_folder
from trainer.checkpoint.save import folders
from trainer.loop import at_end, make_sinks, run
from trainer.registry import build_stage
from utils.device import gpu_memory, pick_device, set_threads
from utils.distributed import Ranks, process_group
from utils.files import atomic_path, check_writable, exclusive_use
from utils.logs import console, get_logger
from utils.seeds import RANDOM_SEED
from utils.sinks import check_loggers

log = get_logger(__name__)


def train(args: Namespace, until: float = math.inf) -> bool:
    """Run the stage that `args` (of trainer/cli.py) describe. Returns whether its end was reached, not a signal or the
    time `until`, of time.monotonic()."""
    config = load_config(args.config_path, args.overrides)
    if config.seed == RANDOM_SEED:
        raise UserError(f"seed={RANDOM_SEED} draws one for inference; give training one that a resumed run can repeat")
    ranks = Ranks.from_env()
    console(quiet=not ranks.first)
    logdir = check_writable(args.logdir or f"logs/{Path(args.config_path).stem}", "--logdir")
    device = pick_device(config.device, ranks.local_rank)
    check_training(config, ranks.world, gpu_memory(device))
    if config.training.distill.teacher_fp8:
        check_fp8(device, "training.distill.teacher_fp8=true", "teacher_fp8=false")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # shapes never change within a stage
    set_threads(config.cpu_threads, training=True)
    check_resumable(config, logdir)
    check_init_finished(config)
    if not args.no_save:
        check_export(config, logdir)
        if at_end(config, logdir):
            log.info("%s is at its end, step %d; nothing is left to do", logdir, config.training.steps)
            return True
    if ranks.first:
        if not args.no_save:
            check_room(config, logdir, export_folder(config, logdir), len(folders(logdir)))
        check_loggers(config.training.loggers, wandb=not args.disable_wandb)
        logdir.mkdir(parents=True, exist_ok=True)
    alone = exclusive_use(logdir, "--logdir") if ranks.first else nullcontext()
    with alone, process_group(ranks, device, config.training.timeout_s):
        stage = build_stage(config, device, ranks)
        if ranks.first:
            with atomic_path(logdir / "config.yaml") as temporary:
                temporary.write_text(to_yaml(config), encoding="utf-8")
        sinks = make_sinks(config, logdir, wandb=not args.disable_wandb, wandb_dir=args.wandb_save_dir)
        return run(stage, logdir, sinks, save=not args.no_save, until=until)
