"""Knobs of one optimiser."""

from dataclasses import dataclass, field

from configs.validate import at_least, between


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (and Muon, if asked for) with linear warm-up and cosine decay to `final_lr_share` of the peak."""

    lr: float = 1e-3
    muon_lr: float = 0.0  # above 0: peak rate of Muon for hidden matrices and kernels; AdamW keeps the rest
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 100
    final_lr_share: float = 0.05  # of lr, reached at the last step; 1 = constant
    max_grad_norm: float = 1.0  # gradients are clipped to this norm

    def __post_init__(self):
        at_least(0, "optimizer", self, "lr", "muon_lr", "eps", "weight_decay", "warmup_steps", "max_grad_norm")
        between(0, 1, "optimizer", self, "final_lr_share")
