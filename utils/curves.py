"""Plots of metrics over steps in a single picture, one panel per metric."""

import math
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from utils.files import atomic_path

PANEL, COLUMNS, TITLE, GAP = (270, 130), 4, 22, 14  # pixels
HEAD, MARGIN = 30, 16
INK, DIM, LINE, RAW, MEAN = "#1b1f24", "#6a7280", "#d5d8dd", "#b5cdf0", "#1756a9"
MEMORY = 10  # logged rows over which the exponential moving average reaches, for a hundred rows or more
LEFT_OUT = ("step", "seconds_per_step")


def group_of(name: str) -> str:
    """The heading of the group to which a metric belongs."""
    if name.startswith("validation_"):
        return "validation"
    if name.endswith("norm") or name.endswith("_gradient"):
        return "gradient norms"
    if "loss" in name or name.startswith("generator_"):
        return "loss terms"
    return "diagnostics"


def draw_curves(rows: Iterable[Mapping[str, Any]], title: str) -> Image.Image:
    """Plot all finite numbers in `rows`, each of which has a "step": thin lines as logged, thick lines smoothed."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in LEFT_OUT and isinstance(value, int | float) and math.isfinite(value):
                series.setdefault(name, []).append((row["step"], float(value)))
    groups: dict[str, list[str]] = {"loss terms": [], "gradient norms": [], "diagnostics": [], "validation": []}
    for name in series:
        groups[group_of(name)].append(name)
    groups = {heading: names for heading, names in groups.items() if names}
    width = 2 * MARGIN + COLUMNS * PANEL[0] + (COLUMNS - 1) * GAP
    lines = sum(math.ceil(len(names) / COLUMNS) for names in groups.values())
    height = HEAD + len(groups) * HEAD + lines * (PANEL[1] + TITLE + GAP) + MARGIN
    picture = Image.new("RGB", (width, height), "white")
    draw, large = ImageDraw.Draw(picture), ImageFont.load_default(15)
    draw.text((MARGIN, 8), title, INK, large)
    _legend(draw, width - MARGIN)
    top = HEAD
    for heading, names in groups.items():
        draw.text((MARGIN, top + 8), heading, DIM, large)
        top += HEAD
        for i, name in enumerate(names):
            place = MARGIN + i % COLUMNS * (PANEL[0] + GAP), top + i // COLUMNS * (PANEL[1] + TITLE + GAP)
            _panel(picture, place, name, series[name])
        top += math.ceil(len(names) / COLUMNS) * (PANEL[1] + TITLE + GAP)
    return picture


def write_curves(path: str | PathLike, rows: Iterable[Mapping[str, Any]], title: str) -> None:
    """Write `draw_curves` as a PNG, atomically."""
    with atomic_path(path) as temporary:
        draw_curves(rows, title).save(temporary, "PNG")


def _legend(draw: ImageDraw.ImageDraw, right: int) -> None:
    """What the two lines of a panel mean, ending at pixel `right` of the first row."""
    font = ImageFont.load_default(12)
    for text, colour, thick in (("moving average", MEAN, 2), ("logged values", RAW, 1)):
        draw.text((right, 10), text, DIM, font, anchor="ra")
        right -= round(font.getlength(text)) + 6
        draw.line((right - 24, 17, right, 17), colour, thick)
        right -= 24 + GAP


def _panel(picture: Image.Image, place: tuple[int, int], name: str, points: Sequence[tuple[int, float]]) -> None:
    """Draw one metric: name and last value above, range of values at the left, range of steps below."""
    (x, y), (width, height), font = place, PANEL, ImageFont.load_default(12)
    draw = ImageDraw.Draw(picture)
    draw.text((x, y + 2), name, INK, font)
    draw.text((x + width, y + 2), f"{points[-1][1]:.4g}", MEAN, font, anchor="ra")
    y += TITLE
    low, high = _range([value for _, value in points])
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)
    scale = 3  # drawn larger and made small again, for smooth lines
    canvas = Image.new("RGB", (width * scale, height * scale), "white")
    pen = ImageDraw.Draw(canvas)

    def at(step: float, value: float) -> tuple[float, float]:
        up = (min(max(value, low), high) - low) / (high - low)
        return (step - first) / (last - first) * (width * scale - 1), (1 - 0.04 - 0.92 * up) * height * scale

    mean, smooth, share = points[0][1], [], 1 / min(MEMORY, 1 + len(points) / MEMORY)
    for step, value in points:
        mean += share * (value - mean)
        smooth.append((step, mean))
    for line, colour, thick in ((points, RAW, scale), (smooth, MEAN, 2 * scale)):
        places = [at(*point) for point in line]
        if len(places) == 1:
            (px, py), r = places[0], 2 * scale
            pen.ellipse((px - r, py - r, px + r, py + r), colour)
        else:
            pen.line(places, colour, thick, joint="curve")
    picture.paste(canvas.resize((width, height), Image.Resampling.LANCZOS), (x, y))
    draw.rectangle((x, y, x + width - 1, y + height - 1), outline=LINE)
    small = ImageFont.load_default(10)
    for text, spot, anchor in (
        (f"{high:.3g}", (x + 4, y + 3), "la"), (f"{low:.3g}", (x + 4, y + height - 4), "ld"),
        (f"step {first} to {last}", (x + width - 4, y + height - 4), "rd"),
    ):  # fmt: skip
        draw.text(spot, text, DIM, small, anchor=anchor, stroke_width=2, stroke_fill="white")


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Range of values to show: percentiles 1 and 99, so that a single peak does not flatten the curve."""
    ordered = sorted(values)
    cut = len(ordered) // 100
    low, high = ordered[cut], ordered[len(ordered) - 1 - cut]
    if high - low > 1e-12 * max(abs(low), abs(high)):
        return low, high
    wide = abs(low) * 0.1 or 1.0
    return low - wide, high + wide
