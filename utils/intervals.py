"""95% intervals of shares, means and paired differences."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.files import finite

Z95 = 1.959964
# Two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom; for more, see `t95`.
T95 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)


@dataclass(frozen=True)
class Interval:
    """A measured value with its 95% interval over n clips."""

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        return {name: finite(value) for name, value in vars(self).items()}


def wilson(hits: int, n: int) -> Interval:
    """Share of hits with Wilson's 95% score interval (E. B. Wilson, JASA 22, 1927)."""
    if n == 0:
        return Interval(math.nan, 0.0, 1.0, 0)
    p, z2 = hits / n, Z95**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Interval(p, max(0.0, middle - half), min(1.0, middle + half), n)


def mean_interval(values: Tensor) -> Interval:
    """Mean of values [n] with its 95% interval by the normal approximation; NaN is ignored."""
    return _mean(values, lambda n: Z95)


def paired_interval(a: Tensor, b: Tensor) -> Interval:
    """Mean of b - a over pairs [n] with Student's 95% interval, valid for few pairs too; pairs with NaN are ignored.

    Differences within pairs remove the variation between prompts and seeds.
    """
    return _mean(b - a, t95)


def t95(n: int) -> float:
    """Half width of Student's 95% interval of a mean of n >= 2 values, in standard errors."""
    freedom = n - 1
    if freedom <= len(T95):
        return T95[freedom - 1]
    # Cornish and Fisher's expansion (Abramowitz and Stegun, 26.7.5), to the second term
    z = Z95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _mean(values: Tensor, width) -> Interval:
    values = values[~torch.isnan(values)].double()
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(values.mean())
    half = width(n) * float(values.std()) / math.sqrt(n) if n > 1 else math.inf
    return Interval(mean, mean - half, mean + half, n)
