"""The rows of the ablation as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from configs.geometry import pixel_frames

RowData = Mapping[str, Any]  # a row's JSON
PERCENT = ("colour", "shape", "direction", "axis", "sign", "background", "speed", "consistency", "all")
COLUMNS = {
    **{name: f"{name} %" for name in PERCENT},
    "speed": "speed class %",
    "consistency": "consistent %",
    "all": "all of these %",
    "speed_ratio": "speed ratio",
    "motion": "motion amplitude",
    "frechet": "Fréchet",
    "start_spread": "spread of starts (px)",
    "heading_spread": "spread of headings",
    "seam": "seam score",
    "drift": "saturation drift",
    "long_drift": "saturation drift of long clips",
}
MAIN = ("colour", "shape", "direction", "speed_ratio", "motion", "frechet", "seam", "drift", "long_drift")


def markdown(rows: Sequence[RowData]) -> str:
    """Two tables with a line a row: what each costs and shows, and the rest; figures with their 95% intervals."""
    asked = [row["asked"] | {"steps": row["steps"]} for row in rows]
    notes = {f"{a['clips']} clips a row, {a['open_clips']} for the spread of headings, {a['long_clips']} long ones of "
             f"{pixel_frames(a['long_frames'])} frames; {a['steps']} updates of the critic a training."
             for a in asked}  # fmt: skip
    costs = {row["title"]: [str(row["nfe"]), f"{row['cpu_seconds']:.2f}"] for row in rows}
    rest = [name for name in COLUMNS if name not in MAIN]
    tables = (_table(rows, ["NFE", "CPU s a clip"], MAIN, costs), _table(rows, [], rest, {}))
    return "\n\n".join(["\n".join(lines) for lines in tables] + ["\n".join(sorted(notes))]) + "\n"


def _table(
    rows: Sequence[RowData], first: Sequence[str], names: Sequence[str], costs: Mapping[str, Sequence[str]]
) -> list[str]:
    """Lines of a table of the columns `names`, after those of `costs`, headed `first`."""
    head = ["row", *first, *(COLUMNS[name] for name in names)]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    for row in rows:
        figures = (_cell(name, row["columns"].get(name)) for name in names)
        lines.append(f"| {' | '.join([row['title'], *costs.get(row['title'], ()), *figures])} |")
    return lines


def _cell(name: str, figure: Mapping[str, float | None] | None) -> str:
    """`value ± half` where the interval is symmetric to the last digit, else `value (low .. high)`."""
    if figure is None or figure["value"] is None:
        return "-"
    scale, digits = (100, 1) if name in PERCENT else (1, 1 if name == "start_spread" else 3 if "drift" in name else 2)
    value, low, high = (None if figure[k] is None else figure[k] * scale for k in ("value", "low", "high"))
    if low is None:
        return f"{value:.{digits}f}"
    if abs(value - low - (high - value)) < 0.5 * 10**-digits:
        return f"{value:.{digits}f} ± {high - value:.{digits}f}"
    return f"{value:.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"
