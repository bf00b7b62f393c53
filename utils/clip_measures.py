"""Measures of a clip's pixels, independent of its content: seams, flicker, motion, drift, sharpness.

Legend: B clips, T pixel frames, H x W pixels. Frames are uint8 in 0..255 or float in [-1, 1], [B, T, 3, H, W] or one
clip [T, 3, H, W]. Brightness and chroma are in [0, 1]; luma is BT.709's 0.2126 R + 0.7152 G + 0.0722 B of the values
as they are stored; chroma is max(R, G, B) - min(R, G, B). `borders` are the first frames of chunks: 9, 21, 33, ...

The measures do not know what is intended: a pan drifts, a strobe light flickers, fog is not sharp. They are for
comparing clips of the same prompts and for finding suspicious ones (scripts/quality/clip_defects.py).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.2126, 0.7152, 0.0722)
FLICKER_REACH = 3  # frames to each side that a frame's brightness is compared with
BLUR_PIXELS = 9  # length of the box that sharpness is measured with
LEAST_DIFFERENCE = 3 / 255  # brightness between neighbours; less is a gentle slope, or noise of a codec
SMALLEST_STEP = 1e-6  # brightness; keeps ratios finite where nothing moves


@dataclass(frozen=True)
class Measure:
    """Description of a measure. better: low, high, or none if neither is better."""

    unit: str
    better: str
    meaning: str


MEASURES = {
    "seam": Measure("ratio", "low", "mean change between frames at chunk borders over that inside chunks; 1 = no seam"),
    "flicker": Measure("levels", "low", "mean distance of a frame's luma to the median of 7 frames around it"),
    "motion": Measure("levels", "none", "mean absolute difference of a frame to the one before"),
    "motion_trend": Measure("ratio", "none", "motion of the last quarter over that of the first; below 1 = it dies"),
    "colour_drift": Measure("levels", "low", "distance of mean RGB between first and last quarter of the clip"),
    "contrast_drift": Measure("share", "low", "change of luma's standard deviation, first to last quarter, sign lost"),
    "saturation_drift": Measure("share", "low", "change of mean chroma, first to last quarter, sign lost"),
    "sharpness": Measure("share", "high", "differences between neighbours that a blur takes away, median of frames"),
    "repeated": Measure("share", "low", "frames that repeat the one before"),
}


def unit_frames(frames: Tensor) -> Tensor:
    """uint8 or float in [-1, 1] -> float32 in [0, 1]."""
    if frames.dtype == torch.uint8:
        return frames.float() / 255
    return ((frames.float() + 1) / 2).clamp(0, 1)


def luma(images: Tensor) -> Tensor:
    """[..., 3, H, W] in [0, 1] -> [..., H, W]."""
    red, green, blue = images.unbind(-3)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def frame_distances(frames: Tensor, lag: int = 1) -> Tensor:
    """[B, T - lag] mean absolute difference in brightness of frame t + lag to frame t; one pair in memory at a time."""
    pairs = range(frames.shape[1] - lag)
    if not pairs:
        return torch.zeros(len(frames), 0, device=frames.device)
    steps = [(unit_frames(frames[:, t + lag]) - unit_frames(frames[:, t])).abs().mean((1, 2, 3)) for t in pairs]
    return torch.stack(steps, dim=1)


def seam_ratio(steps: Tensor, borders: Sequence[int], among: Sequence[int] | None = None) -> Tensor:
    """[B] mean of `steps` [B, T - 1] at chunk borders over that inside chunks; NaN where no border is in the clip.

    borders: first frames of chunks. among: frames inside chunks with which they are compared; None = all the others.
    """

    def of(frames: Sequence[int]) -> Tensor:
        at = torch.zeros(steps.shape[1], dtype=torch.bool, device=steps.device)
        at[[frame - 1 for frame in frames if 0 < frame <= steps.shape[1]]] = True
        return at

    at = of(borders)
    inside = ~at if among is None else of(among)
    return steps[:, at].mean(1) / steps[:, inside].mean(1).clamp_min(SMALLEST_STEP)


def seam_score(frames: Tensor, borders: Sequence[int]) -> Tensor:
    """[B] mean frame difference at chunk borders over that inside chunks; 1 = no seam is visible.

    borders: indices of the first frames of chunks, e.g. 9, 21, 33; NaN where none lies inside the clip.
    """
    return seam_ratio(frame_distances(frames), borders)


def motion_energy(frames: Tensor) -> Tensor:
    """[B] mean absolute difference between consecutive frames, brightness in [0, 1]."""
    return frame_distances(frames).mean(1)


@dataclass(frozen=True, eq=False)
class FrameSeries:
    """Measures of each frame of a clip; all float32 on the CPU."""

    steps: Tensor  # [T - 1] difference of frame t + 1 to frame t (`frame_distances`)
    far_steps: Tensor  # [T - 4] difference of frame t + 4 to frame t
    rgb: Tensor  # [T, 3] mean colour
    luma: Tensor  # [T] mean luma
    contrast: Tensor  # [T] standard deviation of luma over the frame: RMS contrast (Peli, JOSA A 7, 1990)
    saturation: Tensor  # [T] mean chroma
    sharpness: Tensor  # [T] share of the differences between neighbouring pixels that blurring takes away

    @property
    def frames(self) -> int:
        return len(self.luma)


FAR = 4  # frames; longer than the longest flash that is detected


def series(clip: Tensor) -> FrameSeries:
    """Measures of each frame of a clip [T, 3, H, W].

    Sharpness is 1 minus the blur metric of Crete et al. (SPIE 6492, 2007): blurring removes much of the differences
    between neighbouring pixels from a sharp image, and little from a blurred one. It does not depend on contrast.
    Images larger than 256 on both sides are first averaged over 2 x 2 pixels, so that grain counts less.
    """
    table = torch.tensor([_frame(unit_frames(image)) for image in clip], dtype=torch.float32)
    return FrameSeries(
        steps=frame_distances(clip[None])[0].cpu(),
        far_steps=frame_distances(clip[None], FAR)[0].cpu(),
        rgb=table[:, :3],
        luma=table[:, 3],
        contrast=table[:, 4],
        saturation=table[:, 5],
        sharpness=table[:, 6],
    )


def _grey(image: Tensor) -> Tensor:
    """Luma of one image [3, H, W] in [0, 1], averaged over 2 x 2 pixels where both sides are above 256."""
    grey = luma(image)
    return F.avg_pool2d(grey[None, None], 2)[0, 0] if min(grey.shape) > 256 else grey


def _frame(image: Tensor) -> list[float]:
    """Mean R, G, B, mean luma, contrast, saturation, sharpness of one image [3, H, W] in [0, 1]."""
    grey = _grey(image)
    chroma = (image.amax(0) - image.amin(0)).mean()
    return torch.stack((*image.mean((1, 2)), grey.mean(), grey.var().sqrt(), chroma, _sharpness(grey))).tolist()


def _sharpness(grey: Tensor) -> Tensor:
    """Share of the differences between neighbours in grey [H, W] that a box blur of BLUR_PIXELS removes, in [0, 1]."""
    reach = BLUR_PIXELS // 2
    padded = F.pad(grey[None, None], (reach,) * 4, mode="replicate")
    lost, total = [], []
    for axis, box in ((0, (BLUR_PIXELS, 1)), (1, (1, BLUR_PIXELS))):
        crop = padded[..., reach:-reach] if axis == 0 else padded[..., reach:-reach, :]
        before = grey.diff(dim=axis).abs()
        after = F.avg_pool2d(crop, box, stride=1)[0, 0].diff(dim=axis).abs()
        use = before > LEAST_DIFFERENCE
        lost.append(((before - after).clamp_min(0) * use).sum())
        total.append((before * use).sum())
    return sum(lost) / sum(total).clamp_min(1e-6)


def flicker(values: Tensor) -> Tensor:
    """[T] distance of each frame's luma [T] to the median of the frames within FLICKER_REACH around it.

    Ramps and cuts give 0, since the window is symmetric (it shrinks towards the clip's ends); a change that lasts at
    most 3 frames gives its amplitude.
    """
    frames = len(values)
    distances = torch.zeros_like(values)
    for t in range(frames):
        reach = min(FLICKER_REACH, t, frames - 1 - t)
        distances[t] = (values[t] - values[t - reach : t + reach + 1].median()).abs()
    return distances


def repeats(steps: Tensor) -> Tensor:
    """[T - 1] bool: whether frame t + 1 repeats frame t. steps [T - 1]: `frame_distances`.

    A repeat has a difference below a tenth of the clip's median, or below a hundredth of an 8-bit level: after a codec
    a repeated frame is not always exactly the same.
    """
    typical = float(steps.median()) if len(steps) else 0.0
    return steps <= max(0.1 * typical, 0.01 / 255)


def quarters(values: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the first and the last quarter of frames, values [T, ...]."""
    quarter = max(1, len(values) // 4)
    return values[:quarter].mean(0), values[-quarter:].mean(0)


def relative_change(values: Tensor) -> float:
    """|last quarter / first quarter - 1| of values [T]."""
    first, last = quarters(values)
    return float((last - first).abs() / first.clamp_min(0.01))


def colour_change(rgb: Tensor) -> float:
    """Euclidean distance of mean RGB [T, 3] between the first and the last quarter, in 8-bit levels."""
    first, last = quarters(rgb)
    return 255 * float((last - first).norm())


def summary(clip: FrameSeries, borders: Sequence[int]) -> dict[str, float]:
    """MEASURES of one clip; NaN if one is undefined (a single frame)."""
    if clip.frames < 2:
        return {name: math.nan for name in MEASURES} | {"sharpness": float(clip.sharpness.median())}
    early, late = quarters(clip.steps)
    return {
        "seam": float(seam_ratio(clip.steps[None], borders)[0]),
        "flicker": 255 * float(flicker(clip.luma).mean()),
        "motion": 255 * float(clip.steps.mean()),
        "motion_trend": float(late / early.clamp_min(SMALLEST_STEP)),
        "colour_drift": colour_change(clip.rgb),
        "contrast_drift": relative_change(clip.contrast),
        "saturation_drift": relative_change(clip.saturation),
        "sharpness": float(clip.sharpness.median()),
        "repeated": float(repeats(clip.steps).float().mean()),
    }


def as_clip(frames) -> Tensor:
    """uint8 array [T, H, W, 3], as `read_video` returns -> tensor [T, 3, H, W]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def runs(flags: Tensor) -> Iterator[tuple[int, int]]:
    """(first, last) index of each run of true values in flags [n]."""
    start = None
    for i, flag in enumerate([*flags.tolist(), False]):
        if flag and start is None:
            start = i
        elif not flag and start is not None:
            yield start, i - 1
            start = None
