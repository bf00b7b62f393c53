"""Scenes of the moving world: what each shows, and where everything is in any frame, for all time.

Legend: B scenes, T frames; positions in pixels from the upper left corner, x right, y down; angles in radians, growing
clockwise on the screen; periods in frames (at 16 frames a second). A frame is a function of (scene, frame index) alone.

    travel   the camera follows the subject, the ground goes by; the subject weaves up and down
    spin     about a pin beside its middle, so that it wobbles
    swing    a pendulum on a rod
    pulse    its size changes
    bounce   on a floor, by gravity
    orbit    around a second, still subject, the sun
    hide     goes behind a board, stays there for a third of the time, comes back

Every motion has the period that its rate says; its amplitude is in AMPLITUDE. A dark spot on the subject shows how it
is turned and, where it goes somewhere, its heading, so that a single frame shows it: attention with relative positions
alone learns "which way" from the order of frames with difficulty.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.world.captions import (
    ATTRIBUTES,
    COLOURS,
    DIRECTIONS_OF,
    MOTIONS,
    TURNS,
    VALUES,
    phrase,
    varied_phrase,
)

CLIP_FRAMES = 81
HEIGHT, WIDTH = 96, 160  # pixels
PERIOD = {"slow": 64.0, "medium": 40.0, "fast": 24.0}  # frames
AMPLITUDE = {  # pixels; of pulse, a share of the size
    "travel": {"small": 5.0, "large": 12.0},  # height of the waves above their middle
    "spin": {"small": 4.0, "large": 9.0},  # from the pin to the subject's middle
    "swing": {"small": 18.0, "large": 38.0},  # sideways
    "pulse": {"small": 0.14, "large": 0.30},
    "bounce": {"small": 16.0, "large": 36.0},  # height of a hop
    "orbit": {"small": 25.0, "large": 36.0},  # radius
    "hide": {"small": 28.0, "large": 44.0},  # how far the middle comes out, beyond the board's edge
}
WAVE = 80.0  # pixels that a traveller goes in one period
ROD = 52.0  # pixels from the pendulum's pin to the subject's middle
SIZE = {"orbit": (9.0, 10.0), "pulse": (12.5, 14.0)}  # pixels: radius of the disc of equal area
USUAL_SIZE = (11.0, 13.0)
SUN = 8.0  # pixels: radius of what is orbited
# How often a motion is trained, relative to the others: outlines that turn, and grounds that go by, are learnt late.
TRAINED_SHARES = {"travel": 2, "spin": 4, "swing": 2, "pulse": 1, "bounce": 1, "orbit": 3, "hide": 2}
GROUND_PERIOD = 32.0  # pixels after which a ground repeats, both ways
_SALT = 20261130  # keeps these draws apart from other uses of the same seed


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One video: what its caption can say, and what it leaves open."""

    colour: str
    shape: str
    motion: str
    direction: str | None  # of travel, spin and orbit
    rate: str
    amplitude: str
    partner: str | None  # colour of what is orbited
    ground: str
    x: float  # pixels: the place about which the subject moves
    y: float
    size: float  # pixels: radius of the disc of equal area
    phase: float  # of the motion at frame 0, in periods
    ground_x: float  # pixels by which the ground is shifted
    ground_y: float
    side: int = 1  # of hide: the board is to the right (1) or to the left (-1)
    seed: int = 0  # of the caption's wording


@dataclass(frozen=True)
class Pose:
    """Where things are: each [B, T] float64."""

    x: np.ndarray
    y: np.ndarray
    size: np.ndarray
    angle: np.ndarray  # of the shape
    spot: np.ndarray  # angle at which the dark spot is
    ground: np.ndarray  # pixels by which the ground has gone to the left


def caption(scene: Scene, rng: np.random.Generator | None = None, without: Sequence[str] = ()) -> str:
    """What a scene shows, in words: everything but attributes in `without`, in the standard wording; with `rng` as a
    person might type it."""
    stated = {name: None if name in without else vars(scene)[name] for name in ATTRIBUTES}
    return phrase(stated) if rng is None else varied_phrase(stated, rng)


def training_caption(scene: Scene) -> str:
    """The varied wording that belongs to a scene: the same one each time."""
    return caption(scene, np.random.default_rng([_SALT, 1, scene.seed]))


def turn(scene: Scene) -> int:
    """1 to the right or clockwise, -1 to the left or counterclockwise."""
    return -1 if scene.direction in ("left", TURNS[1]) else 1


def poses(scenes: Sequence[Scene], frames: Sequence[int] | np.ndarray) -> Pose:
    """Of every scene in every frame, which may be any whole numbers."""
    rows = [_pose(scene, np.asarray(frames, dtype=np.float64)) for scene in scenes]
    return Pose(*(np.stack(column) for column in zip(*rows, strict=True)))


def _pose(scene: Scene, t: np.ndarray) -> tuple[np.ndarray, ...]:
    """x, y, size, angle, spot, ground over frames t [T]. The phase is reduced first, so that it keeps its digits."""
    turns = np.mod(t / PERIOD[scene.rate] + scene.phase, 1.0)
    theta, way, far = 2 * math.pi * turns, turn(scene), AMPLITUDE[scene.motion][scene.amplitude]
    still = np.zeros_like(t)
    x, y, size, angle, spot, ground = scene.x + still, scene.y + still, scene.size + still, still, still - 0.8, still
    if scene.motion == "travel":
        y, spot = scene.y + far * np.sin(theta), still + (0.0 if way > 0 else math.pi)
        ground = way * WAVE * np.mod(t / PERIOD[scene.rate], GROUND_PERIOD)  # a whole number of the ground's periods
    elif scene.motion == "spin":
        angle = spot = way * theta
        x, y = scene.x + far * np.cos(angle), scene.y + far * np.sin(angle)
    elif scene.motion == "swing":
        lean = np.arcsin(far / ROD) * np.cos(theta)
        x, y, angle, spot = scene.x + ROD * np.sin(lean), scene.y + ROD * np.cos(lean), -lean, math.pi / 2 - lean
    elif scene.motion == "pulse":
        size = scene.size * (1 + far * np.cos(theta))
    elif scene.motion == "bounce":
        y, spot = scene.y - far * 4 * turns * (1 - turns), still - math.pi / 2
    elif scene.motion == "orbit":
        x, y = scene.x + far * np.cos(way * theta), scene.y + far * np.sin(way * theta)
        spot = way * (theta + math.pi / 2)  # ahead
    else:  # hide: x, y is where the board's edge is
        x = scene.x - scene.side * far * np.cos(theta)
        spot = still + (math.pi if scene.side > 0 else 0.0)
    return x, y, size, angle, spot, ground


class World:
    """Scenes, drawn by seed on the CPU. Rendering is in trainer/world/render.py."""

    def __init__(self, height: int = HEIGHT, width: int = WIDTH):
        self.height, self.width = height, width

    def scene(self, seed: int) -> Scene:
        """The scene of a seed; every attribute is drawn evenly."""
        return self.place(dict.fromkeys(ATTRIBUTES), np.random.default_rng([_SALT, seed]), seed)

    def scenes(self, seed: int, n: int, *, balanced: bool = False) -> list[Scene]:
        """n scenes; `balanced`: each value of an attribute comes up equally often (+-1), in independent orders."""
        if not balanced:
            return [self.scene(int(s)) for s in np.random.SeedSequence([_SALT, seed]).generate_state(n, np.uint32)]
        rng = np.random.default_rng([_SALT, 2, seed])
        columns: dict[str, list[str]] = {}
        for name in ATTRIBUTES:
            if name in ("direction", "partner"):
                continue  # which depend on others, and are drawn
            rounds = [rng.permutation(len(VALUES[name])) for _ in range(-(-n // len(VALUES[name])))]
            columns[name] = [VALUES[name][i] for i in rng.permutation(np.concatenate(rounds)[:n])] if n else []
        seeds = rng.integers(0, 2**32, size=n)
        open_ones = dict.fromkeys(("direction", "partner"))
        rows = [{name: columns[name][i] for name in columns} | open_ones for i in range(n)]
        return [self.place(row, rng, int(seeds[i])) for i, row in enumerate(rows)]

    def trained_scenes(self, seed: int, n: int) -> list[Scene]:
        """n scenes of motions that come up as TRAINED_SHARES says; all else is drawn evenly."""
        rng = np.random.default_rng([_SALT, 3, seed])
        shares = np.array([TRAINED_SHARES[motion] for motion in MOTIONS]) / sum(TRAINED_SHARES.values())
        motions, seeds = rng.choice(MOTIONS, n, p=shares), rng.integers(0, 2**32, size=n)
        others = dict.fromkeys(ATTRIBUTES)
        return [self.place(others | {"motion": str(m)}, rng, int(s)) for m, s in zip(motions, seeds, strict=True)]

    def prompts(self, seed: int, n: int) -> list[str]:
        """n captions that state everything, attributes balanced, for evaluation."""
        return [caption(scene) for scene in self.scenes(seed, n, balanced=True)]

    def place(self, stated: dict[str, str | None], rng: np.random.Generator, seed: int = 0) -> Scene:
        """A scene with these attributes, the missing ones drawn, placed so that all of its motion is in the frame."""
        drawn = {name: stated[name] or VALUES[name][int(rng.integers(len(VALUES[name])))] for name in ATTRIBUTES}
        fits = DIRECTIONS_OF.get(drawn["motion"])
        if fits is None:
            drawn["direction"] = None
        elif drawn["direction"] not in fits:
            drawn["direction"] = fits[int(rng.integers(2))]
        others = [colour for colour in COLOURS if colour != drawn["colour"]]
        if drawn["motion"] != "orbit":
            drawn["partner"] = None
        elif drawn["partner"] == drawn["colour"] or stated["partner"] is None:
            drawn["partner"] = others[int(rng.integers(len(others)))]
        size = float(rng.uniform(*SIZE.get(drawn["motion"], USUAL_SIZE)))
        side = 1 if rng.random() < 0.5 else -1
        x, y = self._anchor(drawn["motion"], AMPLITUDE[drawn["motion"]][drawn["amplitude"]], size, side, rng)
        phase, ground_x, ground_y = rng.random(3) * (1.0, GROUND_PERIOD, GROUND_PERIOD)
        return Scene(
            **drawn, x=x, y=y, size=size, side=side, phase=float(phase), ground_x=float(ground_x),
            ground_y=float(ground_y), seed=seed,
        )  # fmt: skip

    def _anchor(self, motion: str, far: float, size: float, side: int, rng) -> tuple[float, float]:
        """Where the motion takes place, in pixels, so that the subject (1.4 sizes each way at most) stays inside."""
        middle, half = self.width / 2, 1.4 * size + 1
        if motion == "swing":  # the pin
            return float(middle + rng.uniform(-18, 18)), float(rng.uniform(2, 10))
        if motion == "hide":  # the board's edge: the way out and the way in are equally long
            return float(middle + rng.uniform(-6, 6)), float(rng.uniform(half, self.height - half))
        if motion == "bounce":  # the subject's middle when it touches the floor
            return float(middle + rng.uniform(-40, 40)), float(self.height - 1.25 * size - rng.uniform(8, 12))
        reach = {"travel": (half, far + half), "pulse": (1.35 * half,) * 2}.get(motion, (far + half,) * 2)
        room_x, room_y = min(40.0, middle - reach[0]), max(0.0, self.height / 2 - reach[1])
        return float(middle + rng.uniform(-room_x, room_x)), float(self.height / 2 + rng.uniform(-room_y, room_y))
