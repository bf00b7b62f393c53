"""Tables as text: aligned columns, and Markdown. rows: of cells, all of one length; the first is the head."""

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def number(value: float, form: str) -> str:
    """`value` in a format such as ".3f"; "-" for what is not finite, such as a mean of nothing."""
    return format(value, form) if math.isfinite(value) else "-"


def aligned(rows: Rows, left: int = 1) -> str:
    """Columns as wide as their widest cell, the first `left` of them aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust if i < left else str.rjust for i in range(len(widths))]
    lines = ([align(*cell) for align, *cell in zip(sides, row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def markdown(rows: Rows) -> str:
    """A table of Markdown."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
