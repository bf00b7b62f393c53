"""Clip measures against figures known beforehand, and defects that are found where they were put, and nothing else."""

import math

import numpy as np
import pytest
import torch

from scripts import validate_measures as validate
from scripts.quality.clip_defects import KINDS, find_defects
from trainer.tiny.world import TinyWorld
from utils.clip_measures import (
    FLOW_MEASURES,
    MEASURES,
    as_clip,
    flicker,
    frame_distances,
    has_flow,
    luma,
    repeats,
    runs,
    series,
    summary,
    unit_frames,
)
from utils.intervals import T95, Z95, mean_interval, paired_interval, t95

NEEDS_OPENCV = pytest.mark.skipif(not has_flow(), reason="no OpenCV")


def flat(levels: list[float], height: int = 12, width: int = 16) -> torch.Tensor:
    """Frames [T, 3, H, W] in [-1, 1], each of one grey level in [0, 1]."""
    return (2 * torch.tensor(levels) - 1)[:, None, None, None].expand(-1, 3, height, width).contiguous()


def noise(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(frames, 3, 20, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_steps_of_known_height_give_known_figures():
    found = series(flat([0.2, 0.2, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]))
    assert found.steps.tolist() == pytest.approx([0, 0.3, 0, 0, 0, 0, 0])
    values = summary(found, [2])
    assert set(values) == set(MEASURES)
    assert values["motion"] == pytest.approx(255 * 0.3 / 7)
    assert values["seam"] > 1000, "all of the change is at the border"
    assert values["colour_drift"] == pytest.approx(255 * 0.3 * math.sqrt(3), rel=1e-4)
    assert values["repeated"] == pytest.approx(6 / 7)
    assert math.isnan(summary(found, [])["seam"])


def test_far_steps_and_distances_agree_with_a_naive_twin():
    clip = noise(7)
    for lag, found in ((1, series(clip).steps), (4, series(clip).far_steps)):
        naive = [float(((clip[t + lag] - clip[t]) / 2).abs().mean()) for t in range(7 - lag)]
        assert found.tolist() == pytest.approx(naive, rel=1e-5)
    assert frame_distances(clip[None], 9).shape == (1, 0)


def test_flicker_is_blind_to_ramps_and_cuts_and_sees_what_comes_and_goes():
    assert flicker(torch.linspace(0, 1, 20)).max() < 1e-6
    assert flicker(torch.tensor([0.2] * 10 + [0.7] * 10)).max() == 0
    flash = torch.tensor([0.2] * 10 + [0.7] * 3 + [0.2] * 10)
    assert flicker(flash)[10:13].tolist() == pytest.approx([0.5] * 3) and flicker(flash)[:10].max() == 0


def test_sharpness_falls_with_blur_and_not_with_contrast():
    clip = TinyWorld().render(TinyWorld().scenes(3, 1))[0, :2]
    sharp = series(clip).sharpness
    pale = series(clip * 0.6).sharpness
    soft = series(validate.F.avg_pool2d(clip, 3, stride=1, padding=1, count_include_pad=False)).sharpness
    assert (soft < 0.85 * sharp).all()
    assert torch.allclose(pale, sharp, rtol=0.1)


def test_contrast_and_saturation_are_those_of_numpy():
    clip = noise(1, seed=3)
    picture = (clip[0].numpy() + 1) / 2
    grey = np.tensordot([0.2126, 0.7152, 0.0722], picture, axes=1)
    found = series(clip)
    assert float(found.contrast[0]) == pytest.approx(grey.std(ddof=1), rel=1e-4)
    assert float(found.saturation[0]) == pytest.approx((picture.max(0) - picture.min(0)).mean(), rel=1e-4)


def moving(frames: int, step: tuple[int, int] = (2, 1), size: tuple[int, int] = (96, 128)) -> torch.Tensor:
    """[T, 3, H, W] in [-1, 1]: a smooth random texture that moves `step` (right, down) pixels a frame."""
    right, down = step
    height, width = size[0] + down * frames, size[1] + right * frames
    coarse = torch.rand(1, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(7)) * 2 - 1
    sheet = validate.F.interpolate(coarse, (height, width), mode="bicubic").clamp(-1, 1)[0]
    corners = [(down * (frames - t), right * (frames - t)) for t in range(frames)]
    return torch.stack([sheet[:, y : y + size[0], x : x + size[1]] for y, x in corners])


def luma_change(clip: torch.Tensor) -> torch.Tensor:
    """[T - 1] mean absolute difference of luma, levels: the warping error if the flow were nil."""
    return 255 * luma(unit_frames(clip)).diff(dim=0).abs().mean((1, 2))


@NEEDS_OPENCV
@pytest.mark.parametrize(
    "size, step", [((96, 128), (2, 1)), ((96, 128), (0, 3)), ((288, 384), (2, 1)), ((289, 385), (6, 4))]
)
def test_flow_of_a_known_motion_is_its_length_in_pixels(size, step):
    """Also above 256 pixels, where images are halved first."""
    clip = moving(4, step, size)
    found = series(clip, flow=True)
    assert found.flow.tolist() == pytest.approx([math.hypot(*step)] * 3, rel=0.05)
    assert (found.flow_warp < 0.1 * luma_change(clip)).all(), "nothing but motion"
    values = summary(found, [])
    assert set(values) == {*MEASURES, *FLOW_MEASURES}
    assert values["flow"] == pytest.approx(float(found.flow.mean()))


@NEEDS_OPENCV
def test_a_still_clip_has_no_flow():
    values = summary(series(moving(3, (0, 0)), flow=True), [])
    assert values["flow"] < 0.01 and values["flow_warp"] < 0.1
    values = summary(series(flat([0.5] * 3), flow=True), [])
    assert (values["flow"], values["flow_warp"]) == (0, 0)


@NEEDS_OPENCV
def test_warping_error_is_what_is_not_motion():
    clip = moving(12)
    clean = series(clip, flow=True)
    flash = clip * 0.8
    flash[5] += 0.2  # a tenth of the range
    lit = series(flash, flow=True)
    assert lit.flow_warp[4:6].tolist() == pytest.approx([25.5] * 2, rel=0.15)
    assert lit.flow_warp.argsort()[-2:].sort().values.tolist() == [4, 5] and lit.flow_warp[:4].max() < 1
    cut = torch.cat((clip[:6], clip[6:].flip(-1)))
    found = series(cut, flow=True)
    assert int(found.flow_warp.argmax()) == 5 and found.flow_warp[5] > 10 * clean.flow_warp.max()
    assert summary(found, [])["flow_warp"] > 2 * summary(clean, [])["flow_warp"]


@NEEDS_OPENCV
def test_what_leaves_the_frame_or_is_uncovered_is_no_error():
    """A square in front of a texture that stands still covers one part of it and uncovers another."""
    ground = moving(1, (0, 0))[0]
    clip = ground.expand(4, -1, -1, -1).clone()
    for t in range(4):
        clip[t, :, 30:62, 10 + 6 * t : 42 + 6 * t] = -ground[:, :32, :32]
    found = series(clip, flow=True)
    assert (found.flow_warp < 0.35 * luma_change(clip)).all()


@NEEDS_OPENCV
@pytest.mark.parametrize("frames, size", [(1, (96, 128)), (3, (8, 10))])
def test_flow_is_nan_where_it_cannot_be(frames, size):
    values = summary(series(moving(9, (1, 1), size)[:frames], flow=True), [])
    assert math.isnan(values["flow"]) and math.isnan(values["flow_warp"])


def test_flow_is_not_computed_unasked():
    found = series(noise(3))
    assert found.flow is None and set(summary(found, [])) == set(MEASURES)


def test_repeats_are_relative_to_the_clip():
    assert repeats(torch.tensor([0.01, 0.01, 0.0005, 0.01])).tolist() == [False, False, True, False]
    assert repeats(torch.zeros(3)).all(), "a still clip repeats throughout"
    assert list(runs(torch.tensor([1, 1, 0, 1]).bool())) == [(0, 1), (3, 3)]


def test_uint8_and_float_agree():
    clip = noise(5)
    array = ((clip + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    a, b = summary(series(clip), [2]), summary(series(as_clip(array)), [2])
    for name in MEASURES:
        assert a[name] == pytest.approx(b[name], rel=0.02, abs=0.02), name


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
def test_short_clips_have_measures_and_no_alarm(frames):
    found = series(noise(1).expand(frames, -1, -1, -1))
    assert set(summary(found, [9])) == set(MEASURES)
    assert not [d for d in find_defects(found, [9]) if d.kind != "freeze"]


def test_a_defect_is_found_and_nothing_else():
    found = validate.confusion(clips=10, seed=5, decoded=False)
    assert not any(found["none"].values())
    for kind in KINDS:
        assert found[kind][kind] >= 8, f"{kind} is missed"
        others = {other: n for other, n in found[kind].items() if other != kind}
        # a cut to a scene with the same background is small: it may be taken for drift; docs/evaluation.md counts it
        assert max(others.values()) <= (2 if kind in ("cut", "drift") else 0), f"{kind} sets off {others}"


def test_a_defect_is_placed_where_it_is():
    clip = TinyWorld().render(TinyWorld().scenes(3, 1))[0]
    clip[40:42] += 0.5
    (flash,) = find_defects(series(clip.clamp(-1, 1)), validate.BORDERS)
    assert (flash.kind, flash.first, flash.last) == ("flash", 40, 41)
    clip = TinyWorld().render(TinyWorld().scenes(3, 1))[0]
    clip[50:57] = clip[50].clone()
    (freeze,) = find_defects(series(clip), validate.BORDERS)
    assert (freeze.kind, freeze.first, freeze.last) == ("freeze", 51, 56)


def student_tail(t: float, freedom: int) -> float:
    """Share of Student's distribution beyond +-t, by the trapezoid rule."""
    x = torch.linspace(-t, t, 200_001, dtype=torch.float64)
    density = torch.distributions.StudentT(torch.tensor(float(freedom), dtype=torch.float64)).log_prob(x).exp()
    return 1 - float(torch.trapezoid(density, x))


@pytest.mark.parametrize("n", [2, 3, 5, 12, 21, 22, 40, 200])
def test_quantiles_of_students_t(n):
    assert student_tail(t95(n), n - 1) == pytest.approx(0.05, abs=5e-5)
    assert t95(len(T95) + 2) > Z95


def test_paired_intervals_drop_what_pairs_share():
    base = torch.tensor([1.0, 50.0, 200.0, float("nan")])
    found = paired_interval(base, base + torch.tensor([1.0, 2.0, 3.0, 0.0]))
    assert found.n == 3 and found.value == pytest.approx(2)
    assert found.high - found.value == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert mean_interval(base).n == 3
    assert math.isinf(paired_interval(base[:1], base[1:2]).high), "one pair says nothing about spread"
