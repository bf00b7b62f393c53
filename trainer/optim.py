"""How trained weights move: AdamW, learning rate, clipping, and the moving average."""

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from configs.train_schema import OptimizerConfig, TrainingConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Linear warm-up over `warmup_steps`, then cosine decay to `final_lr_share` of the peak at `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * cosine)


class Average:
    """Exponential moving average of a module's parameters: e <- d e + (1 - d) p; a copy until `start_step`."""

    def __init__(self, module: nn.Module, decay: float, start_step: int):
        self.decay, self.start_step = decay, start_step
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the parameters that optimiser step `step` (from 0) produced."""
        weight = 1.0 if step < self.start_step else 1.0 - self.decay
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), weight)


class Player:
    """A trained module with its optimiser, its learning rate and its average. It does not know its loss."""

    def __init__(self, module: nn.Module, config: TrainingConfig):
        self.module, self.config = module, config
        device = next(module.parameters()).device
        matrices = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
        vectors = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        o = config.optimizer
        self.optimizer = torch.optim.AdamW(
            groups, lr=o.lr, betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay, fused=device.type == "cuda"
        )
        self.average = Average(module, config.ema_decay, config.ema_start_step)

    @property
    def parameters(self) -> Iterable[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, step: int) -> Tensor:
        """Clip the gradients that are there, take optimiser step `step`, update the average. Returns the norm."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.optimizer, step, self.config.steps)
        self.optimizer.step()
        self.average.update(self.module, step)
        return norm

    def state_dict(self) -> dict:
        return {
            "module": self.module.state_dict(),
            "average": self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.module.load_state_dict(state["module"])
        self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
