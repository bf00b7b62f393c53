"""Stages by name."""

import torch

from configs.schema import Config
from trainer.causal_ode import CausalODE
from trainer.codec_stage import CodecStage
from trainer.distillation import Distill
from trainer.few_steps import FewSteps
from trainer.flow_stages import Pretrain, TeacherForcing
from trainer.ode_regression import ODERegression
from trainer.stage import Stage
from trainer.text_stage import TextStage
from utils.distributed import Ranks

STAGES: dict[str, type[Stage]] = {
    stage.name: stage
    for stage in (TextStage, CodecStage, Pretrain, TeacherForcing, FewSteps, CausalODE, ODERegression, Distill)
}


def build_stage(config: Config, device: torch.device, ranks: Ranks) -> Stage:
    """The stage that `training.stage` names, ready for its first step."""
    return STAGES[config.training.stage](config, device, ranks)
