"""AdamW without a first moment, for the paper's betas of 0 and 0.999."""

import torch


class AdamWWithoutMomentum(torch.optim.AdamW):
    """Equals torch's AdamW for beta_1 = 0 bit for bit: the first moment is then the gradient, which replaces it.
    Saves 4 bytes per parameter of memory and of checkpoints.
    """

    def step(self, closure: None = None) -> None:
        """One step from existing gradients."""
        assert closure is None, "gradients must exist before the step"
        try:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is None:
                        continue
                    if not self.state[p]:
                        count = torch.zeros((), device=p.device if group["fused"] else None)
                        self.state[p] |= {"step": count, "exp_avg_sq": torch.zeros_like(p)}
                    self.state[p]["exp_avg"] = p.grad  # overwritten by the step
            super().step()
        finally:
            for state in self.state.values():
                state.pop("exp_avg", None)


def adamw_class(betas: tuple[float, ...]) -> type[torch.optim.AdamW]:
    """The AdamW class for these betas."""
    return torch.optim.AdamW if betas[0] else AdamWWithoutMomentum


def dropped_state(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Entries of AdamW's state that this optimizer does not have."""
    return ("exp_avg",) if isinstance(optimizer, AdamWWithoutMomentum) else ()
