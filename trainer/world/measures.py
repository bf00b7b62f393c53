"""What a clip of the moving world shows, measured from its pixels, and how well that agrees with captions.

Legend: B clips, T frames. Frames are uint8 in 0..255 or float in [-1, 1], [B, T, 3, H, W]. An index of -1 says: like
none of them. The kind of motion is decided from how the subject and the ground move, never from a caption; its period
and amplitude are then fitted to the signal that this kind has:

    travel   the ground's shift a frame; the height of the waves
    spin     the angle of the dark spot; the circle on which the middle goes
    swing    x
    pulse    size
    bounce   y, a row of parabolas
    orbit    the angle around the sun; the distance from it
    hide     the side of the subject that faces away from the board, which is the last to go and the first to come back
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.errors import UserError
from trainer.world.captions import AMPLITUDES, ATTRIBUTES, MOTIONS, RATES, SHAPES, VALUES, parse_caption
from trainer.world.scene import AMPLITUDE, PERIOD, WAVE
from trainer.world.track import Track, track
from utils.intervals import Interval, mean_interval, wilson
from utils.tables import number

PERIODS = torch.exp(torch.linspace(math.log(14.0), math.log(140.0), 140)).double()  # frames, that are tried
PHASES = 24  # of a bounce, that are tried
LEAST_SHIFT = 0.4  # pixels a frame from which on the ground goes by; the slowest goes 1.25
LEAST_TURN = 0.75  # turns of the spot in a clip that make a spin, if steady
HIDDEN = 0.12  # share of frames in which a hiding subject is not seen, at least
LEAST_BEAT = 0.05  # standard deviation of size over its mean that makes a pulse; 0.10 at the smallest
LEAST_SWING, LEAST_BOUNCE = 6.0, 3.0  # standard deviations in pixels; 12.7 and 4.8 at the smallest
UNHIDDEN = 0.97  # size, over the largest, of a hiding subject that nothing covers
WITHIN = 0.25  # of the caption's rate or amplitude, that counts as near it


@dataclass(frozen=True)
class Fit:
    """All [B]: what fits a signal best."""

    period: Tensor  # frames
    amplitude: Tensor
    phase: Tensor  # periods, in [0, 1)


def _filled(signal: Tensor, use: Tensor) -> tuple[Tensor, Tensor]:
    """signal [B, T] float64 about its mean, zero where it is not used, and the weights."""
    weight = (use & ~signal.isnan()).double()
    value = torch.nan_to_num(signal.double())
    mean = (value * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_min(1)
    return (value - mean) * weight, weight


def fit_sine(signal: Tensor, use: Tensor, periods: Tensor = PERIODS) -> Fit:
    """signal [B, T] ~ c + a cos(2 pi (t / period + phase)) over the frames in use, by least squares."""
    value, weight = _filled(signal, use)
    t, periods = torch.arange(value.shape[1], device=value.device).double(), periods.to(value.device)
    angle = 2 * math.pi * t / periods[:, None]
    basis = torch.stack([torch.ones_like(angle), angle.cos(), angle.sin()], dim=2)  # [P, T, 3]
    normal = torch.einsum("bt,pti,ptj->bpij", weight, basis, basis)
    right = torch.einsum("bt,pti->bpi", value, basis)
    normal = normal + 1e-6 * torch.eye(3, dtype=normal.dtype, device=value.device)
    solved = torch.linalg.solve(normal, right)
    explained = (solved * right).sum(2)
    best, fine = _refined(explained, periods)
    a, b = solved[torch.arange(len(value), device=value.device), best, 1:].unbind(1)
    return Fit(fine, torch.hypot(a, b), torch.atan2(-b, a) / (2 * math.pi) % 1)


def _refined(explained: Tensor, periods: Tensor) -> tuple[Tensor, Tensor]:
    """Index [B] of the best period, and the top of a parabola through it and its neighbours."""
    best = explained.argmax(1)
    if len(periods) < 3:
        return best, periods[best]
    inner = best.clamp(1, len(periods) - 2)
    low, middle, high = (explained.gather(1, (inner + d)[:, None])[:, 0] for d in (-1, 0, 1))
    bend = low - 2 * middle + high
    off = torch.where(bend < 0, 0.5 * (low - high) / bend, 0.0).clamp(-1, 1)
    step = (periods[1] / periods[0]).log()
    return best, torch.where(inner == best, periods[best] * torch.exp(off * step), periods[best])


def fit_bounce(signal: Tensor, use: Tensor) -> Fit:
    """signal [B, T] ~ c - a 4 u (1 - u), u = frac(t / period + phase): hops of height a."""
    value, weight = _filled(signal, use)
    t, periods = torch.arange(value.shape[1], device=value.device).double(), PERIODS.to(value.device)
    phases = torch.arange(PHASES, device=value.device).double() / PHASES
    u = torch.remainder(t / periods[:, None, None] + phases[:, None], 1.0)  # [P, phases, T]
    hop = (4 * u * (1 - u)).flatten(0, 1)
    total = weight.sum(1, keepdim=True).clamp_min(1)
    mean, square, product = weight @ hop.T / total, weight @ (hop * hop).T / total, value @ hop.T / total
    spread = (square - mean * mean).clamp_min(1e-6)
    mean_value = value.sum(1, keepdim=True) / total
    slope = (product - mean * mean_value) / spread
    explained = torch.where(slope < 0, slope * slope * spread, 0.0).view(len(value), len(periods), PHASES)
    over_phases, at = explained.max(2)
    best, fine = _refined(over_phases, periods)
    row = torch.arange(len(value), device=value.device)
    phase = at[row, best]
    height = -slope.view(len(value), len(periods), PHASES)[row, best, phase]
    return Fit(fine, height, phases[phase])


def _turning(angle: Tensor, use: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Angles [B, T] -> turns a frame (clockwise positive), how steady that is in 0..1, and the phase at frame 0."""
    step = torch.remainder(angle.diff(dim=1) + math.pi, 2 * math.pi) - math.pi
    both = use[:, 1:] & use[:, :-1] & ~step.isnan()
    step = torch.nan_to_num(step)
    mean = (step * both).sum(1) / both.sum(1).clamp_min(1)
    t = torch.arange(angle.shape[1], device=angle.device)
    left = torch.polar(torch.ones_like(angle), torch.nan_to_num(angle) - mean[:, None] * t)
    sums = (left * use).sum(1) / use.sum(1).clamp_min(1)
    return mean / (2 * math.pi), sums.abs(), sums.angle() / (2 * math.pi) % 1


def _std(signal: Tensor, use: Tensor) -> Tensor:
    value, weight = _filled(signal, use)
    return (value.square().sum(1) / weight.sum(1).clamp_min(1)).sqrt()


def mean_over(signal: Tensor, use: Tensor) -> Tensor:
    """[B] mean of a signal [B, T] over the frames in use; 0 where there is none."""
    use = use & ~signal.isnan()
    return (torch.nan_to_num(signal) * use).sum(1) / use.sum(1).clamp_min(1)


def majority(index: Tensor, use: Tensor, kinds: int) -> Tensor:
    """[B] the commonest of index [B, T] over the frames in use; -1 where nothing is recognised in most of them."""
    votes = torch.stack([((index == k) & use).sum(1) for k in range(-1, kinds)], dim=1)
    return votes.argmax(1) - 1


def _nearest(value: Tensor, known: Sequence[float]) -> Tensor:
    """[B] index of the nearest ratio; -1 where there is no value."""
    ratios = (value.clamp_min(1e-6).log()[:, None] - torch.tensor(known, device=value.device).log()).abs()
    return torch.where(value > 0, ratios.argmin(1), -1)


def jitter(tracks: Track, whole: Tensor) -> Tensor:
    """[B] pixels by which the outline trembles from frame to frame, in frames [B, T] that show all of it.

    It is what is left of the sizes of the outline's harmonics when steady change is taken away: second differences
    over root 6, which is 1 for white noise of size 1.
    """
    whole = whole[:, 2:] & whole[:, 1:-1] & whole[:, :-2]
    second = tracks.outline.diff(n=2, dim=1).square().sum(2) / 6
    mean = (second * whole).sum(1) / whole.sum(1)
    return mean.sqrt()


def motion_of(tracks: Track) -> dict[str, Tensor]:
    """Kind, direction, period, amplitude and phase of the motion in tracks; all [B]."""
    seen, whole = tracks.seen, tracks.whole
    shift = tracks.shift.nanmean(1)
    sun = (tracks.sun >= 0).float().mean(1) > 0.5
    hidden = 1 - seen.float().mean(1)
    frames = seen.shape[1]
    around, _, around_phase = _turning(torch.atan2(tracks.y - tracks.sun_y, tracks.x - tracks.sun_x), seen)
    turns, steady, spot_phase = _turning(tracks.spot, whole)
    beat = _std(tracks.size, whole) / mean_over(tracks.size, whole).clamp_min(1)
    wide, high = _std(tracks.x, whole), _std(tracks.y, whole)
    rules = {
        "travel": shift.abs() > LEAST_SHIFT,
        "orbit": sun,
        "hide": hidden > HIDDEN,
        "spin": ((turns * frames).abs() > LEAST_TURN) & (steady > 0.5),
        "pulse": beat > LEAST_BEAT,
        "swing": (wide > LEAST_SWING) & (wide > 1.5 * high),
        "bounce": (high > LEAST_BOUNCE) & (high > 2 * wide),
    }
    kind = torch.full_like(turns, -1, dtype=torch.long)
    for name, holds in reversed(rules.items()):  # the first that holds counts
        kind = torch.where(holds, MOTIONS.index(name), kind)
    kind = torch.where(seen.any(1), kind, -1)
    right_side = _std(tracks.right, seen) > _std(tracks.left, seen)  # the board is to the left
    far_side = torch.where(right_side[:, None], tracks.right, tracks.left)
    distance = torch.hypot(tracks.x - tracks.sun_x, tracks.y - tracks.sun_y)
    spin_period = (1 / turns.abs().clamp_min(1e-4)).double()
    travel_period = (WAVE / shift.abs().clamp_min(1e-3)).double()
    size = mean_over(tracks.size, whole).clamp_min(1)
    fits = {
        "travel": _at_period(tracks.y, None, travel_period, whole),
        "spin": _at_period(tracks.x, tracks.y, spin_period, whole, spot_phase),
        "swing": fit_sine(tracks.x, whole),
        "pulse": fit_sine(tracks.size / size[:, None], whole),
        "bounce": fit_bounce(tracks.y, whole),
        "orbit": Fit((1 / around.abs().clamp_min(1e-4)).double(), mean_over(distance, seen).double(), around_phase),
        "hide": fit_sine(far_side, seen),
    }
    way = {"travel": shift, "spin": turns, "orbit": around}
    fitted = {name: torch.full_like(travel_period, torch.nan) for name in ("period", "amplitude", "phase")}
    direction = torch.full_like(kind, -1)
    for i, name in enumerate(MOTIONS):
        here = kind == i
        for key in fitted:
            fitted[key] = torch.where(here, vars(fits[name])[key].double(), fitted[key])
        if name in way:
            forward, back = (VALUES["direction"].index(v) for v in _senses(name))
            direction = torch.where(here, torch.where(way[name] > 0, forward, back), direction)
    return {"motion": kind, "direction": direction} | fitted


def _senses(motion: str) -> tuple[str, str]:
    """What a positive and a negative sense are called."""
    return ("right", "left") if motion == "travel" else ("clockwise", "counterclockwise")


def _at_period(x: Tensor, y: Tensor | None, period: Tensor, use: Tensor, phase: Tensor | None = None) -> Fit:
    """The amplitude of one or two coordinates at a known period [B]."""
    rows = []
    for i in range(len(x)):
        one = slice(i, i + 1)
        rows.append([fit_sine(v[one], use[one], period[one].clamp(8, 400)) for v in (x, y) if v is not None])
    amplitude = torch.stack([sum(fit.amplitude for fit in row) / len(row) for row in rows])[:, 0]
    return Fit(period, amplitude, torch.stack([row[0].phase for row in rows])[:, 0] if phase is None else phase)


def measure(frames: Tensor) -> dict[str, Tensor]:
    """What clips show, a value a clip: indices into VALUES by attribute, and figures of what has no name."""
    return measure_track(track(frames))


def measure_track(tracks: Track) -> dict[str, Tensor]:
    """The same of clips that were read before."""
    moved = motion_of(tracks)
    kind, seen = moved["motion"], tracks.seen
    periods = [PERIOD[name] for name in RATES]
    amplitude_class = torch.full_like(kind, -1)
    for i, name in enumerate(MOTIONS):
        known = [AMPLITUDE[name][size] for size in AMPLITUDES]
        amplitude_class = torch.where(kind == i, _nearest(moved["amplitude"], known), amplitude_class)
    expected = torch.where(kind == MOTIONS.index("orbit"), 2, 1)[:, None]
    hides = (kind == MOTIONS.index("hide"))[:, None]
    right = (tracks.number == expected) | (hides & (tracks.number == 0))
    largest = torch.where(seen, tracks.size, 0).quantile(0.9, dim=1, keepdim=True)
    in_the_open = tracks.whole & (~hides | (tracks.size > UNHIDDEN * largest))
    return moved | {
        "colour": majority(tracks.colour, seen, len(VALUES["colour"])),
        "shape": majority(tracks.shape, in_the_open, len(SHAPES)),
        "rate": _nearest(torch.nan_to_num(moved["period"]), periods),
        "amplitude_class": amplitude_class,
        "partner": torch.where(kind == MOTIONS.index("orbit"), tracks.sun.amax(1), -1),
        "ground": majority(tracks.ground, torch.ones_like(seen), len(VALUES["ground"])),
        "number": right.float().mean(1),
        "jitter": jitter(tracks, in_the_open),
        "saturation": mean_over(tracks.saturation, tracks.whole),
        "sharpness": mean_over(tracks.sharpness, tracks.whole),
        "size": mean_over(tracks.size, tracks.whole),
        "x": mean_over(tracks.x, seen),
        "y": mean_over(tracks.y, seen),
    }


READ = {name: "amplitude_class" if name == "amplitude" else name for name in ATTRIBUTES}  # where `measure` has it
COLUMNS = (
    *ATTRIBUTES, "rate_ratio", "rate_near", "amplitude_ratio", "amplitude_near", "number", "all",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Scores:
    """Columns as intervals of 95%: Wilson's for shares, the normal one for ratios and for the share of frames with the
    right number. `right` [B] by column, NaN where the caption says nothing."""

    columns: dict[str, Interval]
    right: dict[str, Tensor]

    def table(self) -> str:
        rows = [f"{'measure':<18} {'value':>8} {'95% interval':>20} {'clips':>6}"]
        for name, value in self.columns.items():
            mean, low, high = (number(x, ".3f") for x in (value.value, value.low, value.high))
            rows.append(f"{name:<18} {mean:>8} {low:>9} .. {high:<7} {value.n:>6}")
        return "\n".join(rows)


def score(captions: Sequence[str], frames: Tensor) -> Scores:
    """Scores of clips [B, T, 3, H, W] against their captions."""
    if len(captions) != len(frames):
        raise UserError(f"captions={len(captions)} does not match {len(frames)} clips; give one for each clip")
    return score_measured(captions, {name: value.cpu() for name, value in measure(frames).items()})


def score_measured(captions: Sequence[str], measured: dict[str, Tensor]) -> Scores:
    """Scores from what `measure` gives, on the CPU."""
    right = agreement(captions, measured)
    columns = {}
    for name in COLUMNS:
        values = right[name][~right[name].isnan()]
        counts = not (name.endswith("ratio") or name == "number")
        columns[name] = wilson(int(values.sum()), len(values)) if counts else mean_interval(values)
    return Scores(columns, right)


def agreement(captions: Sequence[str], measured: dict[str, Tensor]) -> dict[str, Tensor]:
    """[B] by column: 1 right, 0 wrong, NaN not said; ratios to the caption's rate and amplitude where the motion is
    the caption's. `all`: every attribute that is said, and the number in 95% of frames."""
    said = [parse_caption(text) for text in captions]
    nan = math.nan
    rows: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for i, stated in enumerate(said):
        for name in ATTRIBUTES:
            index = int(measured[READ[name]][i])
            rows[name].append(nan if stated[name] is None else float(index == VALUES[name].index(stated[name])))
        motion = stated["motion"]
        same = motion is not None and rows["motion"][-1] == 1
        period, far = float(measured["period"][i]), float(measured["amplitude"][i])
        rate = PERIOD[stated["rate"]] / period if stated["rate"] and same else nan
        amplitude = far / AMPLITUDE[motion][stated["amplitude"]] if stated["amplitude"] and same else nan
        for name, ratio in (("rate", rate), ("amplitude", amplitude)):
            rows[f"{name}_ratio"].append(ratio)
            near = float(abs(ratio - 1) <= WITHIN) if not math.isnan(ratio) else 0.0
            rows[f"{name}_near"].append(near if stated[name] else nan)
        rows["number"].append(float(measured["number"][i]))
        every = [rows[name][-1] for name in ATTRIBUTES if not math.isnan(rows[name][-1])]
        rows["all"].append(float(all(every) and rows["number"][-1] >= 0.95))
    return {name: torch.tensor(values) for name, values in rows.items()}
