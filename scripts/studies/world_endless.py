"""Whether a stream of the moving world stays what it is: measures of streams of any length, read window by window.

    watch = Watch(captions)            # one caption a stream
    for frames in stream:              # [B, t, 3, H, W], any t
        watch.add(frames)
    print(watch.report())

Memory does not grow with the pictures: a window of WINDOW frames is read as a clip is (trainer/world/measures.py), and
a few numbers a frame are kept. Legend: B streams, W windows, T frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.errors import UserError
from trainer.world.captions import COLOURS, MOTIONS, SHAPES, parse_caption
from trainer.world.measures import UNHIDDEN, mean_over, measure_track
from trainer.world.scene import PERIOD
from trainer.world.track import track
from utils.intervals import Interval, mean_interval

WINDOW = 96  # frames: 6 s, one and a half of the slowest periods
LONGEST_HIDDEN = 0.55  # periods for which a hiding subject may be gone; a third is usual
KEPT = 0.10  # by which size and rate may differ from the first window's


@dataclass(frozen=True)
class Stay:
    """Each [B], of whole streams."""

    number: Tensor  # share of frames with the right number of subjects
    colour: Tensor  # share of frames that show the subject in which it has the caption's colour
    shape: Tensor  # the same of frames in which nothing covers it, and its shape
    size: Tensor  # largest |size / size of the first window - 1| over windows
    rate: Tensor  # the same of the rate, at most 1, which it is where the motion is not seen
    rate_share: Tensor  # share of windows whose rate is within KEPT of the first one's, the same motion being seen
    saturation_trend: Tensor  # relative change over ten minutes, by a straight line through the windows
    sharpness_trend: Tensor

    def summary(self) -> dict[str, Interval]:
        """Means over streams; an interval of a trend that holds 0 is no trend."""
        rows = {name: mean_interval(value) for name, value in vars(self).items()}
        rows["size_kept"] = mean_interval((self.size <= KEPT).float())
        rows["rate_kept"] = mean_interval((self.rate <= KEPT).float())
        return rows


class Watch:
    """Reads streams as they come. captions: what each is meant to show."""

    def __init__(self, captions: Sequence[str], fps: float = 16.0):
        self.said, self.fps = [parse_caption(text) for text in captions], fps
        if any(stated["motion"] is None for stated in self.said):
            raise UserError("a caption states no motion, without which a stream cannot be judged; state it")
        periods = [PERIOD[stated["rate"]] if stated["rate"] else WINDOW for stated in self.said]
        self._whole_periods = torch.tensor([WINDOW // period * period for period in periods])  # frames of a window
        self._rest: Tensor | None = None
        self._frames: list[dict[str, Tensor]] = []
        self._windows: list[dict[str, Tensor]] = []

    def add(self, frames: Tensor) -> None:
        """The next frames [B, t, 3, H, W], uint8 or in [-1, 1]. What does not fill a window is kept for later."""
        if len(frames) != len(self.said):
            raise UserError(f"frames={len(frames)} streams do not match {len(self.said)} captions; give one for each")
        waiting = frames if self._rest is None else torch.cat([self._rest, frames], dim=1)
        while waiting.shape[1] >= WINDOW:
            self._read(waiting[:, :WINDOW])
            waiting = waiting[:, WINDOW:]
        self._rest = waiting.clone()

    def _read(self, window: Tensor) -> None:
        tracks = track(window)
        values = measure_track(tracks)
        largest = torch.where(tracks.seen, tracks.size, 0).quantile(0.9, dim=1, keepdim=True)
        hides = self._hides(window.device)[:, None]
        clear = tracks.whole & (~hides | (tracks.size > UNHIDDEN * largest))
        kept = {name: vars(tracks)[name] for name in ("number", "seen", "colour", "shape")} | {"clear": clear}
        self._frames.append({name: value.cpu() for name, value in kept.items()})
        # over whole periods: in half a period more a pulse is larger, or smaller, than it is on average
        use = tracks.whole & (torch.arange(WINDOW) < self._whole_periods[:, None]).to(window.device)
        means = {name: mean_over(vars(tracks)[name], use) for name in ("size", "saturation", "sharpness")}
        row = {name: values[name] for name in ("motion", "period")} | means
        self._windows.append({name: value.cpu() for name, value in row.items()})

    def _hides(self, device: torch.device | str = "cpu") -> Tensor:
        return torch.tensor([stated["motion"] == "hide" for stated in self.said], device=device)

    def report(self) -> Stay:
        """What is known by now. UserError: not two windows yet."""
        if len(self._windows) < 2:
            raise UserError(f"a stream of {len(self._windows) * WINDOW} frames is too short; give {2 * WINDOW} or more")
        frames = {name: torch.cat([row[name] for row in self._frames], dim=1) for name in self._frames[0]}
        windows = {name: torch.stack([row[name] for row in self._windows], dim=1) for name in self._windows[0]}
        minutes = 10 * 60 * self.fps / WINDOW  # windows in ten minutes
        same_motion = windows["motion"] == torch.tensor([[MOTIONS.index(s["motion"])] for s in self.said])
        rate = windows["period"][:, :1] / windows["period"]
        off = torch.where(same_motion, (rate - 1).abs(), 1).nan_to_num(1).clamp_max(1)  # a lost motion: all of it
        size = windows["size"] / windows["size"][:, :1].clamp_min(1)
        return Stay(
            number=self._number(frames).float().mean(1),
            colour=self._share(frames["colour"], "colour", COLOURS, frames["seen"]),
            shape=self._share(frames["shape"], "shape", SHAPES, frames["clear"]),
            size=(size - 1).abs().amax(1),
            rate=off.amax(1),
            rate_share=(off <= KEPT).float().mean(1),
            saturation_trend=_trend(windows["saturation"]) * minutes,
            sharpness_trend=_trend(windows["sharpness"]) * minutes,
        )

    def _number(self, frames: dict[str, Tensor]) -> Tensor:
        """[B, T] whether the number of subjects is right; a hiding one may be gone for a part of its period."""
        expected = torch.tensor([[2 if stated["motion"] == "orbit" else 1] for stated in self.said])
        right = frames["number"] == expected
        for i in self._hides().nonzero()[:, 0].tolist():
            longest = LONGEST_HIDDEN * PERIOD[self.said[i]["rate"] or "slow"]
            gone = (frames["number"][i] == 0).long()
            count = torch.arange(1, len(gone) + 1)
            last_seen = torch.where(gone == 0, count, 0).cummax(0).values
            right[i] |= (gone == 1) & (count - last_seen <= longest)
        return right

    def _share(self, index: Tensor, name: str, values: Sequence[str], use: Tensor) -> Tensor:
        """[B] share of the frames in use whose index is the caption's value; NaN where the caption has none."""
        wanted = torch.tensor([[-2 if s[name] is None else values.index(s[name])] for s in self.said])
        share = ((index == wanted) & use).sum(1) / use.sum(1).clamp_min(1)
        return torch.where(wanted[:, 0] == -2, torch.nan, share)


def _trend(values: Tensor) -> Tensor:
    """[B] slope a window of values [B, W], over their mean."""
    t = torch.arange(values.shape[1], dtype=torch.float64)
    t = t - t.mean()
    values = values.double()
    mean = values.mean(1)
    return ((values - mean[:, None]) * t).sum(1) / t.square().sum() / mean.clamp_min(1e-6)
