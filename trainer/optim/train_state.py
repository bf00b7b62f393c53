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


def replica_of(module: nn.Module) -> nn.Module:
    """A copy of `module` for its EMA: trained parameters are copied, frozen ones are those of `module` themselves."""
    frozen = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, frozen).eval().requires_grad_(False)


class EMA:
    """Exponential moving average of a module's trained parameters: e <- d e + (1 - d) p; a copy until `start_step`.

    replica: a copy of `module` that holds the average; needed if `module` is sharded and cannot be copied.
    """

    def __init__(self, module: nn.Module, decay: float, start_step: int, replica: nn.Module | None = None):
        self.decay, self.start_step = decay, start_step
        self.module = replica_of(module) if replica is None else replica

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Update with the parameters after optimizer step `step` (from 0)."""
        reshard(self.module)
        weight = 1.0 if step < self.start_step else 1.0 - self.decay
        pairs = zip(self.module.parameters(), module.parameters(), strict=True)
        averages, trained = zip(*((average, p) for average, p in pairs if p.requires_grad), strict=True)
        torch._foreach_lerp_(averages, trained, weight)


class TrainState:
    """A trained module with its optimizer, learning rate and EMA. It does not know its loss.

    Its state leaves out frozen parameters: these are read again from what the run started from.

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
        self.frozen = frozenset(name for name, p in module.named_parameters() if not p.requires_grad)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The trained module and its EMA, by their names in a state."""
        return {"module": self.module} | ({} if self.average is None else {"average": self.average.module})

    def saved(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """`state` of one of the modules without what is frozen."""
        return {name: value for name, value in state.items() if name not in self.frozen}

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
        optimizer = {"optimizer": optimizer_state(self.module, self.optimizer)}
        return {name: self.saved(module_state(module)) for name, module in self.modules.items()} | optimizer

    def load_state_dict(self, state: dict) -> None:
        for name, module in self.modules.items():
            load_module_state(module, state[name], self.frozen)
        load_optimizer_state(self.module, self.optimizer, state["optimizer"])
