"""What a clip of the tiny world shows, measured from its pixels alone, and how well that agrees with captions.

Legend: B clips, T pixel frames, H x W pixels. Frames are uint8 in 0..255 or float in [-1, 1]. Distances in pixels,
x right, y down; velocities in pixels a frame; chroma is max(R, G, B) - min(R, G, B) of values in [0, 1].

The subject is the only thing with colour, so its mask is a threshold on chroma, relative to the clip's strongest
(the trail stays below it). Colour is the mask's hue, shape the best of a bank of templates, motion the drift of the
centroid, background what the colourless pixels resemble. An index of -1 says: like none of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.errors import UserError
from trainer.tiny.captions import ATTRIBUTES, BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, VALUES, parse_caption
from trainer.tiny.world import CLIP_FRAMES, background_image, shape_distance, velocity
from utils.clip_measures import unit_frames
from utils.intervals import Interval, mean_interval, wilson

LEAST_CHROMA = 0.2  # a clip whose strongest colour is fainter has no subject
LEAST_AREA = 80.0  # pixels; the smallest subject covers about 200
MASK = (0.36, 0.52)  # chroma, relative to the clip's strongest, at which the mask begins and is full; trail: 0.31
WINDOW = 20.0  # pixels around the subject's middle within which the mask belongs to it
PATCH = 35  # pixels: side of the square that shapes are compared in
SIZES = tuple(8.5 + 0.5 * i for i in range(7))  # of the shape templates, pixels
WORST_FIT = 0.30  # share of energy in which a patch may differ from the best template
LEAST_SPEED = 0.06  # pixels a frame below which a subject stands still; the slowest moves at 0.15
LAG = CLIP_FRAMES // 3  # frames; the mean displacement over a third of a line is nearly as exact as a fitted slope
JUMP = 2.5  # pixels between two frames, besides the steady motion, that count as a jump
SECOND = 0.25  # mask outside the window, relative to inside, from which on there is a second subject
WRAP = 23.0  # pixels by which space is larger than the frame (twice the half extent of a typical subject)
HIDDEN = 48  # frames for which a subject may be gone after or before it touched an edge
PLAIN_CHROMA = 0.15  # pixels with less are background
WORST_BACKGROUND = 0.12  # mean difference in brightness
STEADY = 0.9  # share of consistent frames that makes a clip consistent
SPEED_BAND = (0.75, 1.25)  # ratio to the caption's speed; the middle between two speed words is at 1.26


def _blur(images: Tensor) -> Tensor:
    """[N, C, H, W] with the binomial filter 1 2 1 along both axes; tames codec noise before the maximum is taken."""
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    rows = padded[..., :-2, :] + 2 * padded[..., 1:-1, :] + padded[..., 2:, :]
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16


@cache
def _templates() -> Tensor:
    """[shapes * sizes, PATCH^2] masks around their centroids, made as masks of clips are; CPU."""
    grid = torch.arange(-30, 31, dtype=torch.float32)
    half = PATCH // 2
    patch = torch.arange(-half, half + 1, dtype=torch.float32)
    masks = []
    for shape in SHAPES:
        for size in SIZES:
            whole = (0.5 - shape_distance(shape, grid[None, :], grid[:, None], torch.tensor(size))).clamp(0, 1)
            drop = float((whole * grid[:, None]).sum() / whole.sum())  # a triangle's centroid lies below its middle
            distance = shape_distance(shape, patch[None, :], patch[:, None] + drop, torch.tensor(size))
            coverage = _blur((0.5 - distance).clamp(0, 1)[None, None])[0, 0]
            masks.append(((coverage - MASK[0]) / (MASK[1] - MASK[0])).clamp(0, 1).flatten())
    return torch.stack(masks)


@dataclass(frozen=True)
class _Track:
    """The subject in each frame: all [B, T], `centre` [B, T, 2]."""

    centre: Tensor
    area: Tensor
    second: Tensor  # mask outside the window, relative to inside
    at_edge: Tensor  # bool: the frame cuts it
    present: Tensor  # bool
    rgb: Tensor  # [B, T, 3] its mean colour
    chroma: Tensor  # its mean chroma
    shape: Tensor  # index, -1 = none


def _locate(mask: Tensor) -> tuple[Tensor, Tensor]:
    """mask [N, H, W] -> centroid [N, 2] of the densest spot, and the mask [N, H, W] within the window around it."""
    n, height, width = mask.shape
    x = torch.arange(width, device=mask.device, dtype=mask.dtype) + 0.5
    y = torch.arange(height, device=mask.device, dtype=mask.dtype) + 0.5
    dense = F.avg_pool2d(mask[:, None], 15, stride=1, padding=7, count_include_pad=True)[:, 0].flatten(1).argmax(1)
    centre = torch.stack((dense % width, dense // width), dim=1).to(mask.dtype) + 0.5
    own = mask
    for _ in range(2):  # the second window stands around the first one's centroid
        dx2 = (x - centre[:, :1])[:, None, :] ** 2
        dy2 = (y - centre[:, 1:])[:, :, None] ** 2
        own = mask * (dx2 + dy2 <= WINDOW**2)
        total = own.sum((1, 2)).clamp_min(1e-6)
        centre = torch.stack(((own.sum(1) * x).sum(1) / total, (own.sum(2) * y).sum(1) / total), dim=1)
    return centre, own


def _shapes(mask: Tensor, centre: Tensor) -> Tensor:
    """Index [N] of the shape whose template differs least from the mask [N, H, W] around its centroid [N, 2]."""
    n, height, width = mask.shape
    step = torch.arange(PATCH, device=mask.device, dtype=mask.dtype) - PATCH // 2
    gx = ((centre[:, :1] + step) * (2 / width) - 1)[:, None, :].expand(n, PATCH, PATCH)
    gy = ((centre[:, 1:] + step) * (2 / height) - 1)[:, :, None].expand(n, PATCH, PATCH)
    patch = F.grid_sample(mask[:, None], torch.stack((gx, gy), dim=-1), align_corners=False).flatten(1)
    templates = _templates().to(mask.device)
    energy = (patch**2).sum(1, keepdim=True) + (templates**2).sum(1)
    misfit = (1 - 2 * patch @ templates.T / energy).view(n, len(SHAPES), len(SIZES)).amin(2)
    best, index = misfit.min(1)
    return torch.where(best <= WORST_FIT, index, -1)


def _track(frames: Tensor) -> tuple[_Track, Tensor]:
    """[B, T, 3, H, W] in [0, 1] -> the subject's track, and the frames' chroma [B, T, H, W]."""
    b, t, _, height, width = frames.shape
    images = _blur(frames.flatten(0, 1))
    chroma = images.amax(1) - images.amin(1)
    strongest = F.avg_pool2d(chroma[:, None], 4, stride=2).flatten(1).amax(1).view(b, t).median(1).values
    relative = chroma / strongest.clamp_min(LEAST_CHROMA).repeat_interleave(t)[:, None, None]
    mask = ((relative - MASK[0]) / (MASK[1] - MASK[0])).clamp(0, 1)
    centre, own = _locate(mask)
    area = own.sum((1, 2))
    rim = own[:, (0, -1), :].sum((1, 2)) + own[:, :, (0, -1)].sum((1, 2))
    weight = own / area.clamp_min(1e-6)[:, None, None]
    track = _Track(
        centre=centre.view(b, t, 2),
        area=area.view(b, t),
        second=((mask.sum((1, 2)) - area) / area.clamp_min(LEAST_AREA)).view(b, t),
        at_edge=(rim > 2.0).view(b, t),
        present=(area >= LEAST_AREA).view(b, t) & (strongest >= LEAST_CHROMA)[:, None],
        rgb=(images * weight[:, None]).sum((2, 3)).view(b, t, 3),
        chroma=(chroma * weight).sum((1, 2)).view(b, t),
        shape=_shapes(own, centre).view(b, t),
    )
    return track, chroma.view(b, t, height, width)


def _hues(rgb: Tensor) -> Tensor:
    """[..., 3] -> hue in degrees [...]; on the hexagonal wheel's two axes, so that it is smooth."""
    red, green, blue = rgb.unbind(-1)
    return torch.rad2deg(torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360


def _majority(index: Tensor, use: Tensor, kinds: int) -> Tensor:
    """[B] the commonest of index [B, T] over the frames in use; -1 where nothing was recognised in most of them."""
    votes = torch.stack([((index == k) & use).sum(1) for k in range(-1, kinds)], dim=1)
    return votes.argmax(1) - 1


def _displacement(centre: Tensor, lag: int, size: Tensor) -> Tensor:
    """[B, T - lag, 2] from frame t to t + lag, the short way round a space of this size [2]."""
    moved = centre[:, lag:] - centre[:, : centre.shape[1] - lag]
    return torch.remainder(moved + size / 2, size) - size / 2


def _velocity(track: _Track, size: Tensor) -> Tensor:
    """[B, 2] pixels a frame: mean displacement over LAG frames, from whole subjects where there are enough."""
    t = track.present.shape[1]
    if t < 2:
        return torch.zeros_like(track.centre[:, 0])
    lag = max(1, min(t // 3, LAG))
    whole = track.present & ~track.at_edge
    pairs = whole[:, lag:] & whole[:, :-lag]
    any_pair = track.present[:, lag:] & track.present[:, :-lag]
    pairs = torch.where((pairs.sum(1) >= pairs.shape[1] // 8 + 1)[:, None], pairs, any_pair)[..., None]
    return (_displacement(track.centre, lag, size) * pairs).sum(1) / pairs.sum(1).clamp_min(1) / lag


def _steady_share(track: _Track, hues: Tensor, colour: Tensor, shape: Tensor, motion: Tensor, size: Tensor) -> Tensor:
    """[B] share of frames with one subject that did not jump, of hues [B, T] and shapes like the clip's colour [B] and
    shape [B]. A subject that is wholly or partly past the edge is excused from having a shape.
    """
    whole = track.present & ~track.at_edge
    good = (hues == colour[:, None]) & ((track.shape == shape[:, None]) | track.at_edge) & (track.second < SECOND)
    if good.shape[1] > 1:
        jump = (_displacement(track.centre, 1, size) - motion[:, None]).norm(dim=-1) > JUMP
        jump &= whole[:, 1:] & whole[:, :-1]
        good &= ~F.pad(jump, (1, 0))
    near_edge = F.max_pool1d((track.at_edge & (track.area > 1)).float()[:, None], 2 * HIDDEN + 1, 1, HIDDEN)[:, 0] > 0
    return torch.where(track.present, good, near_edge).float().mean(1)


def _background(frames: Tensor, chroma: Tensor) -> Tensor:
    """[B] index of the background that the colourless pixels of every eighth frame resemble."""
    frames, plain = frames[:, ::8], (chroma[:, ::8] < PLAIN_CHROMA).float()
    grey = (frames.mean(2) * plain).sum(1) / plain.sum(1).clamp_min(1)
    seen = (plain.sum(1) > 0.2 * plain.shape[1]).float()
    known = torch.stack([background_image(name, *grey.shape[1:]) for name in BACKGROUNDS]).to(grey.device)
    misfit = ((grey[:, None] - known).abs() * seen[:, None]).sum((2, 3)) / seen.sum((1, 2)).clamp_min(1)[:, None]
    best, index = misfit.min(1)
    return torch.where(best <= WORST_BACKGROUND, index, -1)


def _measure_group(frames: Tensor) -> dict[str, Tensor]:
    """`measure` for as many clips as fit into memory at once; frames in [0, 1]."""
    track, chroma = _track(frames)
    size = torch.tensor([frames.shape[-1], frames.shape[-2]], device=frames.device) + WRAP
    motion = _velocity(track, size)
    hue = _hues(track.rgb)
    colour = ((hue + 30) // 60).long() % len(COLOURS)
    whole = track.present & ~track.at_edge
    judged = torch.where(whole.any(1, keepdim=True), whole, track.present)
    main_colour = _majority(torch.where(track.present, colour, -1), track.present, len(COLOURS))
    main_shape = _majority(track.shape, judged, len(SHAPES))
    none = ~track.present.any(1)
    angle = torch.rad2deg(torch.atan2(motion[:, 1], motion[:, 0]))
    turn = torch.round(angle / 45).long() % len(DIRECTIONS)
    speed = motion.norm(dim=1)
    first = track.present.float().argmax(1)
    return {
        "colour": torch.where(none, -1, main_colour),
        "shape": torch.where(none, -1, main_shape),
        "direction": torch.where(none | (speed < LEAST_SPEED), -1, turn),
        "background": _background(frames, chroma),
        "velocity": motion,
        "speed": speed,
        "heading": angle,
        "start": track.centre[torch.arange(len(first), device=first.device), first],
        "consistency": _steady_share(track, colour, main_colour, main_shape, motion, size) * ~none,
        "track": track.centre,
        "present": track.present,
        "saturation": track.chroma,
    }


def measure(frames: Tensor) -> dict[str, Tensor]:
    """Clips [B, T, 3, H, W] -> what each shows.

    colour, shape, direction, background [B]: indices into their names, -1 = none; velocity [B, 2], speed [B] in pixels
    a frame; heading [B] in degrees, 0 = right, 90 = down; start [B, 2] first seen position; consistency [B] share of
    frames; track [B, T, 2] centroids; present [B, T] bool; saturation [B, T] mean chroma of the subject.
    """
    if frames.ndim != 5 or frames.shape[2] != 3:
        raise ValueError(f"frames={tuple(frames.shape)} is not [B, T, 3, H, W]; stack clips along a new first axis")
    group = max(1, ((1 << 23) if frames.device.type == "cpu" else (1 << 27)) // math.prod(frames.shape[1:]))
    parts = [_measure_group(unit_frames(part)) for part in frames.split(group)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class Scores:
    """Agreement of clips with their captions.

    columns: colour, shape, direction, axis (direction up to its sign), sign (direction right, of those whose axis is),
    speed (within SPEED_BAND of the caption's), background, consistency (STEADY of the frames), all (all of colour,
    shape, direction, speed, background and consistency): shares with Wilson intervals. speed_ratio: mean of measured
    speed over the caption's. What a caption does not state is not counted.
    """

    columns: dict[str, Interval]
    measured: dict[str, Tensor]  # of `measure`
    correct: dict[str, Tensor]  # float [B] per column: 1, 0, or NaN where not stated


def _agreement(captions: Sequence[str], measured: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per column [B]: 1 right, 0 wrong, NaN not stated; speed_ratio: the ratio."""
    stated = [parse_caption(text) for text in captions]
    nan = float("nan")
    correct = {}
    for name in ("colour", "shape", "direction", "background"):
        wanted = torch.tensor([VALUES[name].index(s[name]) if s[name] else -2 for s in stated])
        correct[name] = torch.where(wanted == -2, nan, (measured[name] == wanted).float())
        if name == "direction":
            same = (measured[name] % 4 == wanted % 4) & (measured[name] >= 0)
            correct["axis"] = torch.where(wanted == -2, nan, same.float())
            correct["sign"] = torch.where(same & (wanted != -2), correct[name], nan)
    speeds = [s["speed"] and s["direction"] and math.hypot(*velocity(s["direction"], s["speed"])) for s in stated]
    ratio = measured["speed"] / torch.tensor([v or nan for v in speeds])
    within = (ratio >= SPEED_BAND[0]) & (ratio <= SPEED_BAND[1])
    correct["speed"] = torch.where(ratio.isnan(), ratio, within.float())
    correct["speed_ratio"] = ratio
    correct["consistency"] = (measured["consistency"] >= STEADY).float()
    together = torch.stack([correct[name] for name in (*ATTRIBUTES, "consistency")])
    correct["all"] = (together.isnan() | (together == 1)).all(0).float()
    return correct


COLUMNS = (
    *("colour", "shape", "direction", "axis", "sign", "speed", "speed_ratio"),
    *("background", "consistency", "all"),
)


def score(captions: Sequence[str], frames: Tensor) -> Scores:
    """Scores of clips [B, T, 3, H, W] against their captions."""
    if len(captions) != len(frames):
        raise UserError(f"captions={len(captions)} does not match {len(frames)} clips; give one for each clip")
    return score_measured(captions, {name: value.cpu() for name, value in measure(frames).items()})


def score_measured(captions: Sequence[str], measured: dict[str, Tensor]) -> Scores:
    """Scores from the results of `measure` (on the CPU), so that clips need not be in memory together."""
    correct = _agreement(captions, measured)
    columns = {}
    for name in COLUMNS:
        values = correct[name][~correct[name].isnan()]
        share = name != "speed_ratio"
        columns[name] = wilson(int(values.sum()), len(values)) if share else mean_interval(values)
    return Scores(columns, measured, correct)
