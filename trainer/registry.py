"""Stages by name."""

import torch

from configs.schema import Config
from trainer.distill.stage import Distill
from trainer.ode_regression import ODERegression
from trainer.stage import Stage
from trainer.tiny.codec import TinyCodec
from trainer.tiny.few_steps import FewSteps
from trainer.tiny.flow import Pretrain, TeacherForcing
from trainer.tiny.text import TextStage
from trainer.world.flow import WorldCausal, WorldTeacher
from trainer.world.text import WorldText
from trainer.world.vae import WorldVAE
from utils.distributed import Ranks

STAGES: dict[str, type[Stage]] = {
    stage.name: stage
    for stage in (
        *(TextStage, TinyCodec, Pretrain, TeacherForcing, FewSteps, ODERegression, Distill),
        *(WorldText, WorldVAE, WorldTeacher, WorldCausal),
    )
}


def build_stage(config: Config, device: torch.device, ranks: Ranks) -> Stage:
    """The stage that `training.stage` names, ready for its first step."""
    return STAGES[config.training.stage](config, device, ranks)
