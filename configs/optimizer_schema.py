"""Settings of an optimizer."""

from dataclasses import dataclass

from configs.errors import UserError, shown
from configs.validate import check_bounds, number


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (and Muon, if asked for) with linear warm-up and cosine decay to `final_lr_share` of the peak."""

    lr: float = number(1e-3, 0, 10)
    # above 0: peak rate of Muon for hidden matrices and kernels; AdamW keeps the rest
    muon_lr: float = number(0.0, 0, 10)
    betas: list[float] = number([0.9, 0.99], 0, 0.999999)
    eps: float = number(1e-8, 0, 1)
    weight_decay: float = number(0.01, 0, 100)
    warmup_steps: int = number(100, 0, 1_000_000_000)
    final_lr_share: float = number(0.05, 0, 1)  # of lr, reached at the last step; 1 = constant
    max_grad_norm: float = number(1.0, 0, 1_000_000_000)  # gradients are clipped to this norm

    def check(self, section: str) -> None:
        """Raise a UserError for values that cannot be. section: where the optimizer is configured, for its sentence."""
        check_bounds(section, self)
        if len(self.betas) != 2:
            raise UserError(f"{section}.betas={shown(self.betas)} is no pair of numbers; give two, [0.9, 0.99]")
