"""What is seen in each frame of a clip of the moving world, read from its pixels alone.

Legend: B clips, T frames, N = B T pictures, H x W pixels; K colours. Frames are uint8 in 0..255 or float in [-1, 1].
Distances in pixels, x right, y down; saturation is (max - min) / max of RGB in [0, 1], which shade and shadow leave
alone. Subjects are what has a saturated colour; which colours there are is decided a clip, so that the pixels at an
outline do not become a colour of their own. Of two colours the one that moves more is the subject, the other the sun.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.world.captions import COLOURS, GROUNDS, SHAPES
from trainer.world.render import GROUND, RGB, shape_distance
from trainer.world.scene import GROUND_PERIOD
from utils.clip_measures import luma, unit_frames

MASK = (0.30, 0.55)  # saturation at which a pixel begins to be a subject's, and is one
LEAST_AREA = 60.0  # pixels: what is smaller is not counted
PRESENT = 0.1  # share of frames in which a colour must be seen to be one of the clip's
SUN_SHARE = 0.5  # the same of a sun
CELL = 4  # pixels: side of the cells in which subjects are counted
REACH = 14  # cells from end to end of a subject, at most
RADII = torch.linspace(0.08, 1.72, 28)  # of the polar samples, in radii of the disc of equal area
ANGLES = 72
HARMONICS = 7  # of the outline that are looked at
WORST_SHAPE = 0.09  # distance to the nearest shape's harmonics
LEAST_GROUND = 0.04  # share of pixels like one brightness of a ground times that like the other, root


@dataclass(frozen=True)
class Track:
    """Each [B, T] but where a shape is given; what is not seen is NaN."""

    x: Tensor  # the subject's centroid
    y: Tensor
    size: Tensor  # radius of the disc of equal area
    left: Tensor  # its leftmost and rightmost pixel
    right: Tensor
    seen: Tensor  # bool
    whole: Tensor  # bool: no part of it is hidden or outside
    spot: Tensor  # angle at which it is dark
    outline: Tensor  # [B, T, HARMONICS] of the distance from its centroid to its outline, in pixels
    shape: Tensor  # index, -1 = none
    colour: Tensor  # index of the nearest colour
    saturation: Tensor
    sharpness: Tensor  # steepest fall of saturation a pixel at the outline, mean over it, relative to inside
    number: Tensor  # of subjects, the sun included
    sun_x: Tensor
    sun_y: Tensor
    sun: Tensor  # index of its colour, -1 = none
    ground: Tensor  # index, -1 = none
    shift: Tensor  # pixels by which the ground went to the left since the frame before; NaN in the first


def _blur(pictures: Tensor) -> Tensor:
    """[N, C, H, W] with the binomial filter 1 2 1 both ways, against a codec's noise."""
    padded = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16


def _hue_axes(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """The two coordinates [N, ...] on the colour wheel of colours [N, 3, ...]."""
    red, green, blue = rgb.unbind(1)
    return 2 * red - green - blue, math.sqrt(3) * (green - blue)


def _palette(device: torch.device) -> Tensor:
    """[K, 2] unit vectors on the colour wheel."""
    axes = torch.stack(_hue_axes(torch.tensor([RGB[name] for name in COLOURS])), dim=1)
    return F.normalize(axes, dim=1).to(device)


def _by_colour(pictures: Tensor, colours: Tensor | None) -> tuple[Tensor, Tensor]:
    """Blurred pictures [N, 3, H, W] -> saturation [N, H, W] and mask [N, K, H, W].

    colours: bool [N, K], those among which a pixel's is looked for; None = all.
    """
    top = pictures.amax(1)
    saturation = (top - pictures.amin(1)) / top.clamp_min(0.05)
    mask = ((saturation - MASK[0]) / (MASK[1] - MASK[0])).clamp(0, 1)
    a, b = _hue_axes(pictures)
    near = torch.einsum("ki,inhw->nkhw", _palette(pictures.device), torch.stack([a, b]))
    if colours is not None:
        near = near.masked_fill(~colours[:, :, None, None], -math.inf)
    return saturation, mask[:, None] * (near == near.amax(1, keepdim=True))


def _dilate(picture: Tensor, steps: int = 1) -> Tensor:
    """[..., H, W], not negative: the largest value within so many pixels, both ways. Much faster than max_pool2d."""
    for _ in range(steps):
        rows = F.pad(picture, (0, 0, 1, 1))
        picture = torch.maximum(torch.maximum(rows[..., 2:, :], rows[..., :-2, :]), picture)
        columns = F.pad(picture, (1, 1))
        picture = torch.maximum(torch.maximum(columns[..., 2:], columns[..., :-2]), picture)
    return picture


def _moments(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mask [..., H, W] -> area, x and y of the centroid [...]."""
    x = torch.arange(mask.shape[-1], device=mask.device) + 0.5
    y = torch.arange(mask.shape[-2], device=mask.device) + 0.5
    area = mask.sum((-1, -2))
    some = area.clamp_min(1e-6)
    return area, (mask.sum(-2) * x).sum(-1) / some, (mask.sum(-1) * y).sum(-1) / some


def _count(mask: Tensor) -> Tensor:
    """[N] connected parts of at least LEAST_AREA pixels in masks [N, K, H, W], colour by colour."""
    cells = F.avg_pool2d(mask, CELL)
    on = (cells > 0.4).float()
    n, k, h, w = cells.shape
    own = torch.arange(1, h * w + 1, device=mask.device, dtype=torch.float32).view(1, 1, h, w) * on
    label = own
    for _ in range(REACH):  # the largest number of a part spreads over it
        label = _dilate(label) * on
    area = torch.zeros(n * k, h * w + 1, device=mask.device)
    area.scatter_add_(1, label.reshape(n * k, -1).long(), cells.reshape(n * k, -1) * CELL**2)
    return (area[:, 1:] >= LEAST_AREA).sum(1).view(n, k).sum(1)


def _polar(picture: Tensor, x: Tensor, y: Tensor, size: Tensor) -> Tensor:
    """Pictures [N, C, H, W] around (x, y): [N, C, radii, ANGLES]."""
    angle = torch.arange(ANGLES, device=picture.device) * (2 * math.pi / ANGLES)
    radius = size[:, None] * RADII.to(picture.device)
    px = x[:, None, None] + radius[:, :, None] * torch.cos(angle)
    py = y[:, None, None] + radius[:, :, None] * torch.sin(angle)
    h, w = picture.shape[-2:]
    place = torch.stack([px * (2 / w) - 1, py * (2 / h) - 1], dim=-1)
    return F.grid_sample(picture, place, align_corners=False, padding_mode="border")


def _harmonics(mask: Tensor) -> Tensor:
    """Polar masks [N, radii, ANGLES] -> [N, HARMONICS] sizes of harmonics 1, 2, .. of the outline, over its mean."""
    reach = RADII[0] + mask.sum(1) * (RADII[1] - RADII[0])
    spectrum = torch.fft.rfft(reach, dim=1).abs()
    return spectrum[:, 1 : HARMONICS + 1] / spectrum[:, :1].clamp_min(1e-6)


def _shape_templates() -> Tensor:
    """[shapes, HARMONICS] of the four shapes as they are seen, mean over sizes and turns."""
    grid = torch.arange(64, dtype=torch.float32) + 0.5
    rows = []
    for shape in SHAPES:
        pictures = []
        for size in (9.0, 11.0, 14.0):
            for turn in (0.0, 0.4, 1.1, 2.3):
                x, y = torch.broadcast_tensors(grid - 31.7, grid[:, None] - 32.2)
                u, v = math.cos(turn) * x + math.sin(turn) * y, math.cos(turn) * y - math.sin(turn) * x
                pictures.append((0.5 - shape_distance(shape, u, v, torch.tensor(size))).clamp(0, 1))
        mask = ((_blur(torch.stack(pictures)[:, None])[:, 0] - 0.35) / 0.4).clamp(0, 1)
        area, x, y = _moments(mask)
        rows.append(_harmonics(_polar(mask[:, None], x, y, (area / math.pi).sqrt())[:, 0]).mean(0))
    return torch.stack(rows)


TEMPLATES = _shape_templates()


def _nearest_shape(harmonics: Tensor) -> Tensor:
    """[N] index of the shape of outlines [N, HARMONICS], -1 = none."""
    keep = slice(2, 6)  # harmonics 3 to 6: the lower ones are of a wrong middle
    distance = torch.cdist(harmonics[:, keep], TEMPLATES[:, keep].to(harmonics.device))
    least, index = distance.min(1)
    return torch.where(least < WORST_SHAPE, index, -1)


def _dark_side(polar: Tensor) -> Tensor:
    """[N] angle of the dark spot in polar brightness [N, radii, ANGLES]."""
    inside = (RADII < 0.75).to(polar.device)
    value, radius = polar[:, inside], RADII.to(polar.device)[inside][:, None]
    usual = value.flatten(1).median(1).values[:, None, None]
    dark = (0.8 - value / usual.clamp_min(1e-3)).clamp_min(0) * radius.square()
    angle = torch.arange(ANGLES, device=polar.device) * (2 * math.pi / ANGLES)
    return torch.atan2((dark * torch.sin(angle)).sum((1, 2)), (dark * torch.cos(angle)).sum((1, 2)))


def _edges(mask: Tensor) -> tuple[Tensor, Tensor]:
    """[N] places of the leftmost and the rightmost column of masks [N, H, W], to parts of a pixel."""
    full = (mask.sum(1) / 3).clamp(0, 1)  # three pixels make a column
    width = mask.shape[-1]
    return width - full.cummax(1).values.sum(1), full.flip(1).cummax(1).values.sum(1)


def _ground(pictures: Tensor, plain: Tensor) -> Tensor:
    """[N] index of the ground whose two brightnesses the pixels of `plain` [N, H, W] have; -1 = none."""
    scores = []
    for name in GROUNDS:
        dark, light, tint = GROUND[name]
        shares = []
        for value in (dark, light):
            there = (value * torch.tensor(tint, device=pictures.device)).view(1, 3, 1, 1)
            near = torch.exp(-(pictures - there).square().sum(1) / 0.05**2)
            shares.append((near * plain).sum((1, 2)) / plain.sum((1, 2)).clamp_min(1))
        scores.append((shares[0] * shares[1]).sqrt())
    best, index = torch.stack(scores, dim=1).max(1)
    return torch.where(best > LEAST_GROUND, index, -1)


def _row_phases(pictures: Tensor, plain: Tensor) -> Tensor:
    """Complex [N, H]: what each row has of the ground's period, where nothing stands before it."""
    bright = luma(pictures)
    mean = (bright * plain).sum(2, keepdim=True) / plain.sum(2, keepdim=True).clamp_min(1)
    x = torch.arange(bright.shape[-1], device=bright.device) * (2 * math.pi / GROUND_PERIOD)
    wave = torch.complex(torch.cos(x), -torch.sin(x))
    return ((bright - mean) * plain).to(wave.dtype) @ wave


def _blocks(frames: Tensor) -> list[slice]:
    """Pictures that are looked at together, so that temporaries stay small."""
    together = 27 if frames.device.type == "cpu" else 1024
    return [slice(i, i + together) for i in range(0, frames.shape[0] * frames.shape[1], together)]


@torch.no_grad()
def colour_areas(frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Area, x and y of the centroid [B, T, K] of what each colour covers in clips [B, T, 3, H, W]."""
    flat = frames.flatten(0, 1)
    area, x, y = (torch.empty(len(flat), len(COLOURS), device=frames.device) for _ in range(3))
    for part in _blocks(frames):
        small = F.avg_pool2d(unit_frames(flat[part]), 2)
        area[part], x[part], y[part] = _moments(_by_colour(small, None)[1])
    return tuple(v.unflatten(0, frames.shape[:2]) for v in (4 * area, 2 * x, 2 * y))


@torch.no_grad()
def track(frames: Tensor) -> Track:
    """Read clips [B, T, 3, H, W]."""
    b, t = frames.shape[:2]
    flat = frames.flatten(0, 1)
    subject, sun, colours = _cast(*colour_areas(frames))
    cast = [v.repeat_interleave(t, 0) for v in (subject, sun, colours)]
    rows = [_look(flat[part], *(v[part] for v in cast)) for part in _blocks(frames)]
    shown = {name: torch.cat([row[name] for row in rows]).unflatten(0, (b, t)) for name in rows[0]}
    phases = shown.pop("phases")
    turned = torch.angle((phases[:, :-1].conj() * phases[:, 1:]).sum(-1)) * (GROUND_PERIOD / (2 * math.pi))
    shift = torch.cat([torch.full_like(turned[:, :1], torch.nan), turned], dim=1)
    largest = torch.where(shown["seen"], shown["size"], 0).quantile(0.9, dim=1, keepdim=True)
    inside = (shown["left"] > 1) & (shown["right"] < frames.shape[-1] - 1)
    return Track(**shown, shift=shift, whole=shown["seen"] & inside & (shown["size"] > 0.5 * largest))


def _cast(area: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From areas and centroids [B, T, K] of colours: the subject's colour [B], the sun's or -1, and those there are."""
    there = area > LEAST_AREA
    share = there.float().mean(1)
    colours = share >= PRESENT
    weight = there.float()
    total = weight.sum(1).clamp_min(1)

    def spread(v: Tensor) -> Tensor:
        mean = (v * weight).sum(1) / total
        return ((v - mean[:, None]).square() * weight).sum(1) / total

    moved = torch.where(share >= SUN_SHARE, spread(x) + spread(y), -1.0)
    two = (share >= SUN_SHARE).sum(1) >= 2
    most = (area * weight).sum(1).argmax(1)
    subject = torch.where(two, moved.argmax(1), most)
    still = torch.where(share >= SUN_SHARE, moved, math.inf).argmin(1)
    sun = torch.where(two, still, -1)
    colours = colours | F.one_hot(subject, area.shape[2]).bool()
    return subject, sun, colours


def _look(frames: Tensor, subject: Tensor, sun: Tensor, colours: Tensor) -> dict[str, Tensor]:
    """Everything that a single picture shows. frames [N, 3, H, W]; subject, sun [N]; colours [N, K]."""
    exact = unit_frames(frames)
    pictures = _blur(exact)
    saturation, masks = _by_colour(pictures, colours)
    pick = torch.arange(len(frames), device=frames.device)
    mask = masks[pick, subject]
    area, x, y = _moments(mask)
    size, seen = (area / math.pi).sqrt(), area > LEAST_AREA
    left, right = _edges(mask)
    sun_area, sun_x, sun_y = _moments(masks[pick, sun.clamp_min(0)])
    polar = _polar(torch.stack([mask, saturation, pictures.amax(1)], dim=1), x, y, size.clamp_min(1))
    harmonics = _harmonics(polar[:, 0])
    weight = mask / area.clamp_min(1e-6)[:, None, None]
    rgb = (pictures * weight[:, None]).sum((2, 3))
    axes = torch.stack(_hue_axes(rgb), dim=1)
    inside = (saturation * weight).sum((1, 2))
    fall = -(polar[:, 1].diff(dim=1).amin(1).mean(1)) / ((RADII[1] - RADII[0]) * size.clamp_min(1))
    near = _dilate((saturation > MASK[0]).float(), 5)  # with the outline's surroundings
    plain = 1 - near
    nothing = torch.full_like(x, torch.nan)
    values = {
        "x": x, "y": y, "size": size, "left": left, "right": right, "spot": _dark_side(polar[:, 2]),
        "saturation": inside, "sharpness": fall / inside.clamp_min(1e-3),
    }  # fmt: skip
    return {name: torch.where(seen, value, nothing) for name, value in values.items()} | {
        "seen": seen,
        "outline": harmonics * size[:, None],
        "shape": torch.where(seen, _nearest_shape(harmonics), -1),
        "colour": torch.where(seen, (axes @ _palette(axes.device).T).argmax(1), -1),
        "number": _count(masks),
        "sun": torch.where(sun_area > LEAST_AREA, sun, -1),
        "sun_x": torch.where(sun >= 0, sun_x, nothing),
        "sun_y": torch.where(sun >= 0, sun_y, nothing),
        "ground": _ground(exact[..., ::2, ::2], plain[..., ::2, ::2]),
        "phases": _row_phases(pictures, plain),
    }
