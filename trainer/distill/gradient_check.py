"""Gradient check: the gradient of each loss term on the student, before training begins.

A term that is on but has no gradient is an error that no loss curve shows. The flow loss of diagdistill up to commit
4ea418d was one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.errors import UserError
from trainer.parallel.apply import average_gradients, local, sum_over_shards
from utils.tables import aligned


@dataclass(frozen=True)
class GradientCheck:
    """Gradient norms of the terms and the cosines between them."""

    names: tuple[str, ...]
    norms: tuple[float, ...]
    cosines: tuple[tuple[float, ...], ...]

    def table(self) -> str:
        """As text, one line per term."""
        rows = [["term", "gradient norm", *(f"cos {name}" for name in self.names)]]
        for name, norm, cosines in zip(self.names, self.norms, self.cosines, strict=True):
            rows.append([name, f"{norm:.4g}", *(f"{value:.3f}" for value in cosines)])
        return aligned(rows)

    def figures(self) -> dict[str, float]:
        """As numbers by name."""
        figures = {f"audit_norm_{name}": norm for name, norm in zip(self.names, self.norms, strict=True)}
        for i, a in enumerate(self.names):
            figures |= {f"audit_cos_{a}_{b}": self.cosines[i][j] for j, b in enumerate(self.names) if j > i}
        return figures


def gradient_check(
    terms: Callable[[], Mapping[str, Tensor]], parameters: Sequence[Tensor], *, settings: dict[str, str]
) -> GradientCheck:
    """Differentiate the terms one by one. `terms()` recomputes them all, with their weights and equal values.

    settings: the setting that switches each term on. An empty string: its gradient is cut on purpose.
    Raises UserError for a term without a gradient. Gradients are cleared afterwards.
    """
    values, gradients = terms(), []
    names = list(values)
    for name in names:
        value = (values or terms())[name]  # recomputed: FSDP allows one backward pass for each forward pass
        values = None
        if value.requires_grad:
            value.backward()
            average_gradients(parameters)
        gradients.append([torch.zeros_like(local(p)) if p.grad is None else local(p.grad).clone() for p in parameters])
        for p in parameters:
            p.grad = None
    products = torch.stack([_dot(x, y) for x in gradients for y in gradients])
    products = sum_over_shards(products, parameters[0]).view(len(names), len(names)).cpu()
    norms = products.diagonal().sqrt()
    cosines = products / (norms[:, None] * norms[None, :]).clamp_min(1e-300)
    for name, norm in zip(names, norms.tolist(), strict=True):
        if not norm > 0 and (name not in settings or settings[name]):
            what = "no gradient" if norm == 0 else f"a gradient of {norm}"
            why = f"{settings[name]} switches the {name} term on, but it" if name in settings else f"the {name} term"
            raise UserError(f"{why} sends {what} to the student; switch it off, or find out what cuts it")
    return GradientCheck(tuple(names), tuple(norms.tolist()), tuple(tuple(row) for row in cosines.tolist()))


def _dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """Dot product, in float64."""
    return torch.stack([(a * b).sum(dtype=torch.float64) for a, b in zip(x, y, strict=True)]).sum()
