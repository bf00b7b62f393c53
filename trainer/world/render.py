"""Pictures of the moving world, drawn from formulas on any device.

Legend: N pictures, H x W pixels; colours are RGB in [0, 1]. Every outline is a signed distance in pixels, which gives
coverage (0.5 - distance, clamped: anti-aliased and stable under motion by parts of a pixel), soft shadows (the same
over some pixels) and the shade near an edge. What is drawn, from behind: ground, shadows, rod or floor, sun, subject,
board. Only subjects have a saturated colour; light comes from the upper left.
"""

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from trainer.world.captions import TURNS
from trainer.world.scene import CLIP_FRAMES, GROUND_PERIOD, SUN, Scene, World, poses

RGB = {
    "red": (0.91, 0.24, 0.20), "yellow": (0.95, 0.80, 0.16), "green": (0.26, 0.74, 0.26),
    "cyan": (0.16, 0.77, 0.79), "blue": (0.22, 0.36, 0.93), "purple": (0.78, 0.25, 0.85),
}  # fmt: skip
# Dark and light brightness of each ground, and its tint: too faint to be taken for a subject
GROUND = {
    "checkered": (0.62, 0.76, (1.0, 1.0, 1.0)),
    "striped": (0.52, 0.66, (0.93, 0.99, 1.07)),
    "dotted": (0.66, 0.86, (1.05, 1.0, 0.90)),
    "brick": (0.50, 0.68, (1.08, 0.98, 0.92)),
}
SPOT = (0.42, 0.25, 0.42)  # distance from the middle and radius, in sizes, and brightness
TAIL = 2.2  # radians behind the spot of a spinning subject over which it fades
SHADOW = (4.0, 5.0, 4.0, 0.40)  # pixels right and down, pixels of softness to each side, strength
BOARD_WIDTH = 66.0  # pixels
STAR = (1.312, 0.56)  # outer radius in sizes, and the inner one as a share of it
BELOW = {"ball": 1.0, "square": 0.89, "triangle": 0.783, "star": STAR[0] * math.cos(math.pi / 5) + 0.04}  # sizes


def shape_distance(shape: str, x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    """Signed distance in pixels to the outline (negative inside) of a shape that covers pi size^2 pixels."""
    if shape == "ball":
        return torch.sqrt(x * x + y * y) - size
    if shape == "square":  # with rounded corners
        half, corner = 0.89 * size, 0.18 * size
        dx, dy = x.abs() - (half - corner), y.abs() - (half - corner)
        outside = torch.sqrt(dx.clamp_min(0).square() + dy.clamp_min(0).square())
        return outside + torch.maximum(dx, dy).clamp_max(0) - corner
    if shape == "triangle":  # equilateral, apex up, with rounded corners
        corner = 0.16 * size
        inner = 0.783 * size - corner  # radius of the circle inside the sharp triangle
        # Folded onto one side: the edge below the middle
        angle = torch.atan2(x, y)
        sector = 2 * math.pi / 3
        folded = torch.remainder(angle + sector / 2, sector) - sector / 2
        radius = torch.sqrt(x * x + y * y)
        along, down = (radius * torch.sin(folded)).abs(), radius * torch.cos(folded)
        beyond = (along - math.sqrt(3) * inner).clamp_min(0)
        edge = down - inner
        return torch.where(edge > 0, torch.sqrt(edge.square() + beyond.square()), edge) - corner
    outer = STAR[0] * size
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)  # from the upper tip
    folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    radius = torch.sqrt(x * x + y * y)
    px, py = radius * torch.cos(folded), radius * torch.sin(folded)  # the tip is at (outer, 0)
    tip_x = STAR[1] * outer * math.cos(sector / 2)
    tip_y = STAR[1] * outer * math.sin(sector / 2)
    ex, ey = tip_x - outer, tip_y  # the edge from tip to notch
    along = (((px - outer) * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
    away = torch.sqrt((px - outer - along * ex).square() + (py - along * ey).square())
    return torch.where((px - outer) * ey - py * ex < 0, -away, away) - 0.04 * size


def ground_pattern(ground: str, x: Tensor, y: Tensor) -> Tensor:
    """Coverage by the lighter of the two brightnesses, at ground coordinates in pixels; repeats every 32 both ways."""
    period = GROUND_PERIOD

    def wave(u: Tensor, length: float, width: float) -> Tensor:
        """Distance to bands of a width around the multiples of a length."""
        return (torch.remainder(u + length / 2, length) - length / 2).abs() - width / 2

    if ground == "striped":
        return (0.5 - wave(x, period, period / 2)).clamp(0, 1)
    if ground == "checkered":
        a, b = (0.5 - wave(x, period, period / 2)).clamp(0, 1), (0.5 - wave(y, period, period / 2)).clamp(0, 1)
        return a + b - 2 * a * b
    if ground == "dotted":
        row = torch.floor(y / (period / 2))
        dx = torch.remainder(x + (period / 2) * torch.remainder(row, 2), period) - period / 2
        dy = torch.remainder(y, period / 2) - period / 4
        return (0.5 + torch.sqrt(dx * dx + dy * dy) - 5.0).clamp(0, 1)
    row = torch.floor(y / (period / 2))  # bricks of 32 x 16 with mortar between
    upright = wave(x + (period / 2) * torch.remainder(row, 2), period, 2.5)
    level = wave(y, period / 2, 2.5)
    return (0.5 - torch.minimum(upright, level)).clamp(0, 1)


class _Canvas:
    """N pictures of one kind while they are drawn. Columns of numbers are [N, 1, 1]."""

    def __init__(self, world: World, count: int, device: torch.device):
        self.x = torch.arange(world.width, device=device, dtype=torch.float32) + 0.5
        self.y = (torch.arange(world.height, device=device, dtype=torch.float32) + 0.5)[:, None]
        self.count, self.device = count, device
        self.rgb = torch.empty(0)

    def column(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, torch.float32).view(-1, 1, 1)

    def put(self, coverage: Tensor, colour: Tensor) -> None:
        """Lay a colour [N or 1, 3, H or 1, W or 1] over what there is."""
        self.rgb = self.rgb + coverage[:, None] * (colour - self.rgb)

    def shade(self, coverage: Tensor, strength: float) -> None:
        """Darken what there is."""
        self.rgb = self.rgb * (1 - strength * coverage)[:, None]


def _soft(distance: Tensor) -> Tensor:
    """Coverage of a shadow whose outline has this distance: a smooth step over its softness."""
    u = (0.5 - distance / (2 * SHADOW[2])).clamp(0, 1)
    return u * u * (3 - 2 * u)


def _grey(value: float, tint: tuple[float, float, float], canvas: _Canvas) -> Tensor:
    return (value * torch.tensor(tint, device=canvas.device)).view(1, 3, 1, 1)


def _body(canvas: _Canvas, distance: Tensor, x: Tensor, y: Tensor, size: Tensor, colour: str, dark: Tensor | None):
    """A shaded subject: brighter towards the light, darker at the rim, with a faint highlight."""
    lit = 0.90 - 0.17 * ((x + y) / (1.6 * size)).clamp(-1.2, 1.2)
    rim = 0.80 + 0.20 * (-distance / 3.0).clamp(0, 1)
    value = lit * rim
    if dark is not None:
        value = value * (1 - (1 - SPOT[2]) * dark)
    shine = 0.16 * torch.exp(-((x + 0.38 * size).square() + (y + 0.42 * size).square()) / (0.10 * size.square()))
    base = torch.tensor(RGB[colour], device=canvas.device).view(1, 3, 1, 1)
    canvas.put((0.5 - distance).clamp(0, 1), base * value[:, None] + shine[:, None])


def _mark(x: Tensor, y: Tensor, size: Tensor, spot: Tensor, tail: int) -> Tensor:
    """Coverage of the dark spot and, where the subject spins (tail = its sense), of what fades behind it."""
    away, radius = SPOT[0] * size, SPOT[1] * size
    dx, dy = x - away * torch.cos(spot), y - away * torch.sin(spot)
    dark = (0.5 + radius - torch.sqrt(dx * dx + dy * dy)).clamp(0, 1)
    if tail:
        behind = torch.remainder(tail * (spot - torch.atan2(y, x)), 2 * math.pi)
        ring = (0.5 + 0.6 * radius - (torch.sqrt(x * x + y * y) - away).abs()).clamp(0, 1)
        dark = torch.maximum(dark, 0.8 * ring * (1 - behind / TAIL).clamp(0, 1))
    return dark


def _draw(world: World, scene_of: Sequence[Scene], frames: np.ndarray, device: torch.device) -> Tensor:
    """[N, 3, H, W] in [0, 1]: scenes of equal shape, motion, ground, colours and direction, each in all `frames`."""
    first, count = scene_of[0], len(scene_of) * len(frames)
    canvas, pose = _Canvas(world, count, device), poses(scene_of, frames)
    place = {name: canvas.column(value) for name, value in vars(pose).items()}

    def each(values: Sequence[float]) -> Tensor:
        return canvas.column(np.repeat(np.asarray(values, dtype=np.float64), len(frames)))

    moving = first.motion == "travel"
    gx, gy = each([s.ground_x for s in scene_of]), each([s.ground_y for s in scene_of])
    shift = gx + place["ground"] if moving else gx
    if not moving:  # a still ground is drawn once a scene
        shift, gy = shift[:: len(frames)], gy[:: len(frames)]
    dark, light, tint = GROUND[first.ground]
    x, y = torch.broadcast_tensors(canvas.x + shift, canvas.y + gy)
    plain = dark + (light - dark) * ground_pattern(first.ground, x, y)
    if not moving:
        plain = plain.repeat_interleave(len(frames), dim=0)
    canvas.rgb = plain[:, None] * torch.tensor(tint, device=device).view(1, 3, 1, 1)

    size, cos, sin = place["size"], torch.cos(place["angle"]), torch.sin(place["angle"])

    def outline(dx: float, dy: float) -> tuple[Tensor, Tensor, Tensor]:
        """Distance to the subject's outline, moved by (dx, dy), and the place relative to its middle."""
        px, py = torch.broadcast_tensors(canvas.x - place["x"] - dx, canvas.y - place["y"] - dy)
        return shape_distance(first.shape, cos * px + sin * py, cos * py - sin * px, size), px, py

    anchor_x, anchor_y = each([s.x for s in scene_of]), each([s.y for s in scene_of])
    if first.motion == "orbit":
        sun_x, sun_y = torch.broadcast_tensors(canvas.x - anchor_x, canvas.y - anchor_y)
        canvas.shade(_soft(torch.hypot(sun_x - SHADOW[0], sun_y - SHADOW[1]) - SUN), SHADOW[3])
    canvas.shade(_soft(outline(*SHADOW[:2])[0]), SHADOW[3])
    if first.motion == "swing":
        _rod(canvas, anchor_x, anchor_y, place["x"], place["y"])
    if first.motion == "bounce":
        _floor(canvas, anchor_y, each([_below(s) for s in scene_of]))
    if first.motion == "orbit":
        radius = torch.full_like(size, SUN)
        _body(canvas, torch.hypot(sun_x, sun_y) - SUN, sun_x, sun_y, radius, first.partner, None)
    distance, px, py = outline(0.0, 0.0)
    tail = 0 if first.motion != "spin" else (1 if first.direction == TURNS[0] else -1)
    _body(canvas, distance, px, py, size, first.colour, _mark(px, py, size, place["spot"], tail))
    if first.motion == "hide":
        _board(canvas, anchor_x, each([s.side for s in scene_of]))
    return canvas.rgb.clamp_(0, 1)


def _below(scene: Scene) -> float:
    """Pixels from a subject's middle to its lowest point."""
    return scene.size * BELOW[scene.shape]


def _rod(canvas: _Canvas, pin_x: Tensor, pin_y: Tensor, x: Tensor, y: Tensor) -> None:
    """A dark line from the pin to the subject, 2 pixels wide, and the pin."""
    ex, ey = x - pin_x, y - pin_y
    px, py = torch.broadcast_tensors(canvas.x - pin_x, canvas.y - pin_y)
    along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp(0, 1)
    line = torch.hypot(px - along * ex, py - along * ey) - 1.1
    pin = torch.hypot(px, py) - 3.0
    canvas.put((0.5 - torch.minimum(line, pin)).clamp(0, 1), _grey(0.30, (1.0, 1.0, 1.02), canvas))


def _floor(canvas: _Canvas, lowest: Tensor, below: Tensor) -> None:
    """A slab that the subject touches, with a light edge."""
    depth = (canvas.y - (lowest + below)).expand(-1, -1, len(canvas.x))
    colour = _grey(0.36, (1.0, 1.0, 1.04), canvas)
    canvas.put((0.5 + depth).clamp(0, 1), colour)
    canvas.put(0.45 * ((0.5 + depth).clamp(0, 1) * (2.5 - depth).clamp(0, 1)), _grey(0.9, (1.0, 1.0, 1.0), canvas))


def _board(canvas: _Canvas, edge: Tensor, side: Tensor) -> None:
    """An upright board from `edge` to its side, over the whole height, with a shadow beside it."""
    inside = (side * (canvas.x - edge)).expand(-1, len(canvas.y), -1)  # pixels behind the edge
    width = BOARD_WIDTH
    beside = torch.maximum(-inside, inside - width)  # distance outside of the board
    canvas.shade((1 - beside / 6.0).clamp(0, 1).square(), 0.35)
    grain = 0.34 + 0.05 * torch.sin(inside * (2 * math.pi / 15.5)) + 0.06 * (1 - inside / width)
    cover = (0.5 - beside).clamp(0, 1)
    colour = grain[:, None] * torch.tensor((1.06, 1.0, 0.94), device=canvas.device).view(1, 3, 1, 1)
    canvas.put(cover, colour)


def kind(scene: Scene) -> tuple:
    """Scenes of one kind are drawn together."""
    return (scene.motion, scene.shape, scene.ground, scene.colour, scene.partner or "", scene.direction or "")


def render(
    world: World, scenes: Sequence[Scene], num_frames: int = CLIP_FRAMES, device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32, start_frame: int = 0,
) -> Tensor:  # fmt: skip
    """Clips [B, T, 3, H, W] in [-1, 1] of frames start_frame .. start_frame + num_frames - 1; uint8: in 0..255."""
    device = torch.device(device)
    out = torch.empty(len(scenes), num_frames, 3, world.height, world.width, device=device, dtype=dtype)
    # So many pictures at once that temporaries stay in a CPU's cache, and fill a GPU
    together = 8 if device.type == "cpu" else 4096
    order = sorted(range(len(scenes)), key=lambda i: kind(scenes[i]))
    for _, some in groupby(order, key=lambda i: kind(scenes[i])):
        rows = list(some)
        for first in range(0, num_frames, together):
            frames = np.arange(first, min(first + together, num_frames))
            step = max(1, together // len(frames))
            for i in range(0, len(rows), step):
                part = rows[i : i + step]
                pictures = _draw(world, [scenes[r] for r in part], frames + start_frame, device)
                pictures = (pictures * 255).round_() if dtype == torch.uint8 else pictures.mul_(2).sub_(1)
                block = pictures.to(dtype).unflatten(0, (len(part), len(frames)))
                out[torch.tensor(part, device=device)[:, None], torch.from_numpy(frames).to(device)] = block
    return out
