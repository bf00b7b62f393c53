"""The rows of the ablation as a table, and goals of the distilled student."""

from collections.abc import Mapping, Sequence
from typing import Any

from configs.geometry import pixel_frames

RowData = Mapping[str, Any]  # a row's JSON
PERCENT = ("colour", "shape", "direction", "axis", "sign", "background")
COLUMNS = {
    **{name: f"{name} %" for name in PERCENT},
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
BEST, BASELINE, TEACHER = "4322222", "self_forcing", "teacher"  # rows that the goals compare
TOWARDS_ONE = ("speed_ratio", "motion", "seam")  # better the nearer to 1
TOWARDS_ZERO = ("frechet", "drift", "long_drift")


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


def goals(rows: Mapping[str, RowData]) -> str:
    """What the distilled student should reach, and whether it does: a line a goal, for the rows that are there."""
    if BEST not in rows or TEACHER not in rows:
        return ""
    ours, teacher = _values(rows[BEST]), _values(rows[TEACHER])
    found = [(f"{name} within 2 points of the teacher", ours[name] >= teacher[name] - 0.02)
             for name in ("colour", "shape", "axis", "direction")]  # fmt: skip
    found += [(f"{name} at least 95%", ours[name] >= 0.95) for name in ("colour", "shape", "axis")]
    if teacher["direction"] >= 0.95:
        found.append(("direction at least 95%, as the teacher has it", ours["direction"] >= 0.95))
    found.append(("speed ratio 0.9 to 1.1", 0.9 <= ours["speed_ratio"] <= 1.1))
    found += [(f"{COLUMNS[name]}: at least 90% of the teacher's", ours[name] >= 0.9 * teacher[name])
              for name in ("start_spread", "heading_spread")]  # fmt: skip
    if BASELINE in rows:
        baseline = _values(rows[BASELINE])
        found += [(f"{COLUMNS[n]} not worse than Self-Forcing's", badness(n, ours[n]) <= badness(n, baseline[n]))
                  for n in COLUMNS if n in ours and n in baseline]  # fmt: skip
    if "no_flow" in rows:
        without = _values(rows["no_flow"])["motion"]
        nearer = abs(ours["motion"] - teacher["motion"]) < abs(without - teacher["motion"])
        found.append(("motion amplitude nearer to the teacher's with the flow loss than without", nearer))
    lines = [f"- [{'x' if reached else ' '}] {goal}" for goal, reached in found]
    return "\n".join(["Goals, by the values without their intervals:", "", *lines]) + "\n"


def badness(name: str, value: float) -> float:
    """Grows as a column's figure gets worse."""
    if name in TOWARDS_ONE:
        return abs(value - 1)
    return abs(value) if name in TOWARDS_ZERO else -value


def _values(row: RowData) -> dict[str, float]:
    """NaN, which reaches no goal, where a row has no figure."""
    return {name: float("nan") if c["value"] is None else c["value"] for name, c in row["columns"].items()}
