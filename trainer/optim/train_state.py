"""Optimizer, learning rate, gradient clipping and EMA of a trained module."""

import copy
import math

import torch
from torch import Tensor, nn

from configs.optimizer_schema import OptimizerConfig
from configs.train_schema import TrainingConfig
from trainer.optim.adam import adamw_class
from trainer.optim.muon import MuonAdamW, parameter_groups
from trainer.parallel.apply import (
    average_gradients,
    full_tensor,
    load_module_state,
    load_optimizer_state,
    module_state,
    optimizer_state,
    reshard,
)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Linear warm-up over `warmup_steps`, then cosine decay to `final_lr_share` of the peak at `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * cosine)


class EMA:
    """Exponential moving average of a module's parameters: e <- d e + (1 - d) p; a copy until `start_step`.

    replica: a copy of `module` that holds the average; needed if `module` is sharded and cannot be copied.
    """

    def __init__(self, module: nn.Module, decay: float, start_step: int, replica: nn.Module | None = None):
        self.decay, self.start_step = decay, start_step
        self.module = (copy.deepcopy(module) if replica is None else replica).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Update with the parameters after optimizer step `step` (from 0)."""
        reshard(self.module)
        weight = 1.0 if step < self.start_step else 1.0 - self.decay
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), weight)


class TrainState:
    """A trained module with its optimizer, learning rate and EMA. It does not know its loss.

    Args:
        optimizer: settings of the optimizer (default: `config.optimizer`).
        steps: length of the learning rate schedule (default: `config.steps`).
        averaged: keep an EMA, in `replica` if that is given.
    """

    def __init__(
        self,
        module: nn.Module,
        config: TrainingConfig,
        *,
        optimizer: OptimizerConfig | None = None,
        steps: int | None = None,
        averaged: bool = True,
        replica: nn.Module | None = None,
    ):
        self.module = module
        self.optimizer_config, self.steps = optimizer or config.optimizer, steps or config.steps
        device = next(module.parameters()).device
        o = self.optimizer_config
        kind = MuonAdamW if o.muon_lr else adamw_class(tuple(o.betas))
        self.optimizer = kind(
            parameter_groups(module, o), lr=o.lr, betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay,
            fused=device.type == "cuda",
        )  # fmt: skip
        self.average = EMA(module, config.ema_decay, config.ema_start_step, replica) if averaged else None

    @property
    def parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, step: int) -> Tensor:
        """Average and clip gradients, make optimizer step `step`, update the EMA. Returns the gradient norm."""
        reshard(self.module)  # otherwise the next pass would use the old weights
        average_gradients(self.parameters)
        norm = full_tensor(nn.utils.clip_grad_norm_(self.parameters, self.optimizer_config.max_grad_norm))
        for group in self.optimizer.param_groups:
            group["lr"] = group.get("lr_share", 1.0) * learning_rate(self.optimizer_config, step, self.steps)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.module, step)
        return norm

    def state_dict(self) -> dict:
        """Full tensors, gathered on the first rank if sharded; a collective."""
        state = {"module": module_state(self.module), "optimizer": optimizer_state(self.module, self.optimizer)}
        return state if self.average is None else state | {"average": module_state(self.average.module)}

    def averaged_state(self) -> dict[str, Tensor]:
        """The EMA alone, gathered as in `state_dict`."""
        return module_state(self.average.module)

    def load_state_dict(self, state: dict) -> None:
        load_module_state(self.module, state["module"])
        load_optimizer_state(self.module, self.optimizer, state["optimizer"])
        if self.average is not None:
            load_module_state(self.average.module, state["average"])
