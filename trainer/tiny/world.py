"""The tiny world: captioned clips of one coloured shape that moves steadily, rendered from formulas.

Legend: B clips, T pixel frames, H x W pixels; positions in pixels from the upper left corner, x right, y down;
speeds in pixels a frame (at 16 frames a second).

Heading is visible in every single frame, to first order. A network whose attention sees only relative positions learns
"which way" from the mere order of frames with great difficulty: with start positions spread evenly, left and right
differ in no mean and no spatial correlation of the frames. So (1) the subject is bright in front and dark behind and
drags a fading trail that is longer at higher speed, and (2) it starts upstream, so that the path of one clip fits into
the frame. Past the clip's end it leaves at one edge and enters at the opposite one: space is a torus as much larger
than the frame as the subject is, and the caption stays true for ever.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainer.tiny.captions import ATTRIBUTES, COLOURS, SHAPES, VALUES, flip_stated, parse_caption, phrase, varied_phrase

CLIP_FRAMES = 81  # frames over which the path stays inside the frame
RADIUS = (9.0, 11.0)  # pixels; a shape of size r covers about as much as a disc of radius r
EDGE = 1.0  # pixels between the subject and the frame's edge that a path keeps
# Pixels a frame along each axis that moves. The frame is lower than wide, so vertical and diagonal motion is slower.
WIDE_SPEED = {"slow": 0.25, "medium": 0.5, "fast": 0.8}
TALL_SPEED = {"slow": 0.15, "medium": 0.3, "fast": 0.45}
TRAIL = {"slow": 12.0, "medium": 20.0, "fast": 30.0}  # pixels behind the subject over which the trail fades
TRAIL_ALPHA = 0.5  # opacity of the trail where it starts
TRAIL_VALUE = 0.6  # brightness of the trail's colour
SHADE = (0.55, 1.0)  # brightness of the subject at its trailing and at its leading side
SATURATION = 0.92
# Half width and half height of a shape's bounding box, as a share of its size; its centre is the subject's position.
EXTENT = {"circle": (1.0, 1.0), "square": (0.89, 0.89), "triangle": (1.17, 1.015), "cross": (1.1, 1.1)}
CROSS_ARM = 0.4  # half width of a cross's arms, as a share of its size
TILE = 8  # pixels: width of a stripe; a checker is twice as wide
OPEN = ("direction", "speed")  # what an open caption leaves out: where the subject goes and how fast
_SALT = 20260309  # keeps these draws apart from other uses of the same seed


@dataclass(frozen=True, kw_only=True)
class TinyScene:
    """One clip: what its caption can say, and what it leaves open."""

    colour: str
    shape: str
    direction: str
    speed: str
    background: str
    x: float  # pixels, centre of the subject in frame 0
    y: float
    size: float  # pixels, about the radius
    seed: int = 0  # of the caption's wording


def caption(scene: TinyScene, rng: np.random.Generator | None = None, *, without: Sequence[str] = ()) -> str:
    """What a scene shows, in words: everything, in the standard wording; with `rng` as a person might type it.

    `without`: attributes that go unsaid, such as OPEN.
    """
    stated = {name: vars(scene)[name] for name in ATTRIBUTES} | dict.fromkeys(without)
    return phrase(stated) if rng is None else varied_phrase(stated, rng)


def training_caption(scene: TinyScene, *, open_share: float = 0.0) -> str:
    """The varied wording that belongs to a scene: the same one each time. `open_share` of all scenes have open ones."""
    is_open = np.random.default_rng([_SALT, 2, scene.seed]).random() < open_share
    return caption(scene, np.random.default_rng([_SALT, 1, scene.seed]), without=OPEN if is_open else ())


def flip_attribute(source: TinyScene | str, attribute: str, rng: np.random.Generator) -> str:
    """A caption in the standard wording with one attribute changed, the others kept.

    `attribute`: one of ATTRIBUTES, or `sign` (direction reversed), or `axis` (direction turned by 90 degrees). Compare
    its loss with that of `caption(scene)`, or of `phrase(parse_caption(text))`: then only the attribute differs.
    UserError: the attribute is unknown or not stated.
    """
    if isinstance(source, TinyScene):
        return flip_stated({name: vars(source)[name] for name in ATTRIBUTES}, attribute, rng)
    return flip_stated(parse_caption(source), attribute, rng)


def velocity(direction: str, speed: str) -> tuple[float, float]:
    """(vx, vy) in pixels a frame. Diagonals go at 45 degrees, each component as fast as vertical motion."""
    tall = TALL_SPEED[speed]
    sideways = {"left": -1.0, "right": 1.0}.get(direction.split("-")[-1], 0.0)
    upright = {"up": -1.0, "down": 1.0}.get(direction.split("-")[0], 0.0)
    return sideways * (tall if upright else WIDE_SPEED[speed]), upright * tall


def colour_rgb(colour: str) -> tuple[float, float, float]:
    """RGB in [0, 1] at full brightness; colour i has hue 60 i degrees."""
    hue = COLOURS.index(colour) * 60.0
    pure = [min(max(abs((hue / 60.0 - offset) % 6.0 - 3.0) - 1.0, 0.0), 1.0) for offset in (0.0, 2.0, 4.0)]
    return tuple(1.0 - SATURATION + SATURATION * c for c in pure)


def background_image(background: str, height: int, width: int) -> Tensor:
    """[H, W] brightness in [0, 1]; backgrounds have no colour. Edges of patterns lie on multiples of 8 pixels."""
    y = torch.arange(height)[:, None].expand(height, width)
    x = torch.arange(width)[None, :].expand(height, width)
    if background == "striped":
        return torch.where(x // TILE % 2 == 0, 0.2, 0.5)
    if background == "checkered":
        return torch.where((x // (2 * TILE) + y // (2 * TILE)) % 2 == 0, 0.25, 0.65)
    if background == "gradient":
        return 0.1 + 0.75 * (y.float() + 0.5) / height
    return torch.full((height, width), {"black": 0.04, "gray": 0.4, "white": 0.9}[background])


def shape_distance(shape: str, dx: Tensor, dy: Tensor, size: Tensor) -> Tensor:
    """Signed distance in pixels to a shape's edge (negative inside; beyond corners an under-estimate)."""
    if shape == "circle":
        return torch.sqrt(dx * dx + dy * dy) - size
    ex, ey = EXTENT[shape]
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - ex * size
    if shape == "cross":
        across = torch.maximum(dx.abs() - ex * size, dy.abs() - CROSS_ARM * size)
        down = torch.maximum(dx.abs() - CROSS_ARM * size, dy.abs() - ey * size)
        return torch.minimum(across, down)
    # Triangle: apex up at (0, -ey), base corners at (+-ex, +ey), all times size.
    norm = math.hypot(ex, 2.0 * ey)
    slope = (2.0 * ey * dx.abs() - ex * (dy + ey * size)) / norm
    return torch.maximum(slope, dy - ey * size)


class TinyWorld:
    """Scenes, their captions and their clips. All draws are by seed, on the CPU."""

    def __init__(self, height: int = 64, width: int = 96):
        self.height, self.width = height, width

    def scene(self, seed: int) -> TinyScene:
        """The scene of a seed; every attribute is drawn evenly."""
        rng = np.random.default_rng([_SALT, seed])
        drawn = {name: VALUES[name][int(rng.integers(len(VALUES[name])))] for name in ATTRIBUTES}
        return self.place(drawn, rng, seed)

    def scenes(self, seed: int, n: int, balanced: bool = False) -> list[TinyScene]:
        """n scenes; `balanced`: each value of an attribute comes up equally often (+-1), in independent orders."""
        if not balanced:
            return [self.scene(int(s)) for s in np.random.SeedSequence([_SALT, seed]).generate_state(n, np.uint32)]
        rng = np.random.default_rng([_SALT, 2, seed])
        columns = {}
        for name in ATTRIBUTES:
            # A fresh order of the values for each round, so that the remainder is drawn evenly too.
            rounds = [rng.permutation(len(VALUES[name])) for _ in range(-(-n // len(VALUES[name])))]
            columns[name] = [VALUES[name][i] for i in rng.permutation(np.concatenate(rounds)[:n])] if n else []
        seeds = rng.integers(0, 2**32, size=n)
        return [
            self.place({name: columns[name][i] for name in ATTRIBUTES}, rng, int(seeds[i])) for i in range(n)
        ]

    def prompts(self, seed: int, n: int) -> list[str]:
        """n full captions with every attribute balanced, for evaluation."""
        return [caption(scene) for scene in self.scenes(seed, n, balanced=True)]

    def place(self, stated: dict[str, str | None], rng: np.random.Generator, seed: int = 0) -> TinyScene:
        """A scene with these attributes, the missing ones drawn, at a start from which the path fits the frame."""
        drawn = {n: stated[n] or VALUES[n][int(rng.integers(len(VALUES[n])))] for n in ATTRIBUTES}
        size = float(rng.uniform(*RADIUS))
        x, y = (float(rng.uniform(low, high)) for low, high in self.start_box(drawn, size))
        return TinyScene(**drawn, x=x, y=y, size=size, seed=seed)

    def start_box(self, stated: dict[str, str], size: float) -> list[tuple[float, float]]:
        """[(low x, high x), (low y, high y)] of the starts from which a clip's path fits the frame, in pixels.

        Where none fits (a frame that is too small), both ends are the start that misses by equally much at both edges.
        """
        box = []
        motion = velocity(stated["direction"], stated["speed"])
        for length, extent, v in zip((self.width, self.height), EXTENT[stated["shape"]], motion, strict=True):
            path = v * (CLIP_FRAMES - 1)
            low = extent * size + EDGE - min(path, 0.0)
            high = length - extent * size - EDGE - max(path, 0.0)
            box.append((low, high) if low < high else ((low + high) / 2,) * 2)
        return box

    def expected_starts(self, scenes: Sequence[TinyScene]) -> Tensor:
        """[B, 2] where a subject of middling size starts on average, given all that the caption says; pixels."""
        boxes = [self.start_box(vars(scene), sum(RADIUS) / 2) for scene in scenes]
        return torch.tensor(boxes, dtype=torch.float32).mean(-1)

    def continued(self, scene: TinyScene, frame: int) -> TinyScene:
        """The scene as it is `frame` frames later: what frame 0 of the rest of the stream shows."""
        vx, vy = velocity(scene.direction, scene.speed)
        return replace(scene, x=scene.x + vx * frame, y=scene.y + vy * frame)

    def position(self, scene: TinyScene, frame: int) -> tuple[float, float]:
        """Where the subject's centre is in a frame, in pixels; a radius beyond the edge while it crosses it."""
        motion = velocity(scene.direction, scene.speed)
        place = []
        for start, v, length, extent in zip((scene.x, scene.y), motion, (self.width, self.height),
                                            EXTENT[scene.shape], strict=True):  # fmt: skip
            margin = extent * scene.size + 0.5
            place.append((start + v * frame + margin) % (length + 2 * margin) - margin)
        return tuple(place)

    def render(
        self,
        scenes: Sequence[TinyScene],
        num_frames: int = CLIP_FRAMES,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        start_frame: int = 0,
    ) -> Tensor:
        """Clips [B, T, 3, H, W] in [-1, 1], frames start_frame .. start_frame + num_frames - 1 of each scene."""
        device = torch.device(device)
        out = torch.empty(len(scenes), num_frames, 3, self.height, self.width, device=device, dtype=dtype)
        # Scenes of one shape are rendered together, in groups whose temporaries stay small.
        budget = (1 << 22) if device.type == "cpu" else (1 << 26)
        group = max(1, budget // (num_frames * self.height * self.width))
        for shape in SHAPES:
            members = [i for i, scene in enumerate(scenes) if scene.shape == shape]
            for first in range(0, len(members), group):
                rows = members[first : first + group]
                clip = self._render_group(shape, [scenes[i] for i in rows], num_frames, device, start_frame)
                out[torch.tensor(rows, device=device)] = clip.to(dtype)
        return out

    def _render_group(self, shape: str, scenes: list[TinyScene], frames: int, device, start_frame: int) -> Tensor:
        """[b, T, 3, H, W] float32 of scenes of one shape. Axes of the temporaries: [b, T, H, W]."""

        def column(values) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device).view(len(scenes), 1, 1, 1)

        size = column([s.size for s in scenes])
        dx, dy = self._offsets(shape, scenes, frames, device, start_frame)
        headings = [velocity(s.direction, s.speed) for s in scenes]
        norms = [math.hypot(*v) for v in headings]
        ux = column([v[0] / n for v, n in zip(headings, norms, strict=True)])
        uy = column([v[1] / n for v, n in zip(headings, norms, strict=True)])
        along = dx * ux + dy * uy  # pixels ahead of the centre
        body = (0.5 - shape_distance(shape, dx, dy, size)).clamp_(0, 1)
        shade = SHADE[0] + (SHADE[1] - SHADE[0]) * (0.5 + along / (2 * size)).clamp_(0, 1)
        trail = self._trail(along, (dx * uy - dy * ux).abs(), size, column([TRAIL[s.speed] for s in scenes]))
        trail = trail * (1 - body)
        still = torch.stack([background_image(s.background, self.height, self.width) for s in scenes]).to(device)
        colourless = still[:, None] * (1 - body - trail)
        coloured = body * shade + trail * TRAIL_VALUE
        rgb = torch.tensor([colour_rgb(s.colour) for s in scenes], device=device)
        picture = colourless[:, :, None] + coloured[:, :, None] * rgb[:, None, :, None, None]
        return picture.mul_(2).sub_(1)

    def _offsets(self, shape: str, scenes: list[TinyScene], frames: int, device, start_frame: int):
        """Pixel coordinates relative to the subject, to its nearest image on the torus: [b, T, 1, W], [b, T, H, 1]."""
        time = torch.arange(start_frame, start_frame + frames, dtype=torch.float64)
        motion = torch.tensor([velocity(s.direction, s.speed) for s in scenes], dtype=torch.float64)
        start = torch.tensor([(s.x, s.y) for s in scenes], dtype=torch.float64)
        size = torch.tensor([s.size for s in scenes], dtype=torch.float64)
        offsets = []
        for axis, (length, extent) in enumerate(zip((self.width, self.height), EXTENT[shape], strict=True)):
            period = (length + 2 * extent * size + 1)[:, None, None]
            # In float64 on the CPU: an endless stream's position must not lose its fraction.
            centre = (start[:, axis, None] + motion[:, axis, None] * time)[:, :, None]
            pixels = torch.arange(length, dtype=torch.float64) + 0.5
            offset = torch.remainder(pixels - centre + period / 2, period) - period / 2
            offsets.append(offset.to(device, torch.float32))
        return offsets[0][:, :, None, :], offsets[1][:, :, :, None]

    @staticmethod
    def _trail(along: Tensor, aside: Tensor, size: Tensor, length: Tensor) -> Tensor:
        """Opacity of the trail: from the centre backwards, narrowing, fading out `length` pixels behind the subject."""
        fade = 1 + (along + 0.8 * size) / length
        width = size * (0.3 + 0.4 * fade.clamp(0, 1))
        edge = (0.5 - (aside - width)).clamp_(0, 1)
        return TRAIL_ALPHA * edge * fade.clamp_(0, 1) * (0.5 - along).clamp_(0, 1)
