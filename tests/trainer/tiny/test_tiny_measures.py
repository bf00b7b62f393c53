"""The measures agree with what was rendered, not with anything else, and find defects."""

import math

import pytest
import torch
import torch.nn.functional as F

from configs.errors import UserError
from scripts.quality.tiny_features import (
    clip_features,
    frechet_distance,
    heading_spread,
    saturation_drift,
    start_spread,
)
from trainer.tiny.captions import ATTRIBUTES, VALUES
from trainer.tiny.measures import COLUMNS, measure, score, score_measured
from trainer.tiny.world import TinyScene, TinyWorld, caption, velocity
from utils.clip_measures import motion_energy, seam_ratio, seam_score
from utils.intervals import mean_interval, wilson

WORLD = TinyWorld()
SCENES = WORLD.scenes(11, 40, balanced=True)
CAPTIONS = [caption(s) for s in SCENES]


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return WORLD.render(SCENES)


@pytest.fixture(scope="module")
def truth(clips):
    return score(CAPTIONS, clips)


def one(**changes) -> TinyScene:
    values = {"colour": "green", "shape": "square", "direction": "right", "speed": "medium", "background": "gray"}
    return TinyScene(**{**values, "x": 20.0, "y": 30.0, "size": 10.0, **changes})


def degraded(clips: torch.Tensor, sigma: float = 0.7, noise: float = 0.02) -> torch.Tensor:
    """What a codec does: Gaussian blur (pixels), noise (of brightness 0..1), 8 bits."""
    kernel = torch.exp(-torch.arange(-3, 4.0) ** 2 / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    x = F.pad(clips.flatten(0, 2)[:, None], (3, 3, 3, 3), mode="replicate")
    x = F.conv2d(F.conv2d(x, kernel.view(1, 1, 1, 7)), kernel.view(1, 1, 7, 1)).view(clips.shape)
    x = x + 2 * noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte()


def assert_all_right(scores):
    wrong = {name: c for name, c in scores.columns.items() if name != "speed_ratio" and c.value < 0.99}
    assert not wrong
    assert abs(scores.columns["speed_ratio"].value - 1) < 0.01


def test_ground_truth_scores_above_99_percent(truth):
    assert_all_right(truth)
    assert tuple(truth.columns) == COLUMNS and truth.columns["all"].n == 40
    measured = truth.measured
    starts = torch.tensor([(s.x, s.y) for s in SCENES])
    assert (measured["start"] - starts).norm(dim=1).max() < 4.5  # a triangle's centroid lies below its middle
    motions = torch.tensor([velocity(s.direction, s.speed) for s in SCENES])
    torch.testing.assert_close(measured["velocity"], motions, atol=0.01, rtol=0)


def test_ground_truth_seen_through_a_codec_scores_above_99_percent(clips):
    assert_all_right(score(CAPTIONS[:12], degraded(clips[:12])))


def test_wrong_captions_score_near_chance(truth):
    scenes = WORLD.scenes(5, 40 * 25)
    hits = dict.fromkeys(ATTRIBUTES, 0.0)
    for first in range(0, len(scenes), 40):
        wrong = score_measured([caption(s) for s in scenes[first : first + 40]], truth.measured)
        for name in hits:
            hits[name] += wrong.columns[name].value / 25
        assert wrong.columns["all"].value <= 0.05
    for name, share in hits.items():
        chance = 1 / len(VALUES[name])
        # The speed's word means another speed for another direction, so it is a little off its third.
        assert abs(share - chance) < (0.1 if name == "speed" else 0.05), name


def test_each_attribute_is_measured_by_itself(truth):
    """With one attribute of the captions changed, that column falls to nothing and the others stay."""
    for attribute in ATTRIBUTES:
        changed = []
        for s in SCENES:
            values = VALUES[attribute]
            other = values[(values.index(vars(s)[attribute]) + 1) % len(values)]
            changed.append(caption(TinyScene(**{**vars(s), attribute: other})))
        columns = score_measured(changed, truth.measured).columns
        assert columns[attribute].value == 0 == columns["all"].value
        for name in set(ATTRIBUTES) - {attribute, "speed" if attribute == "direction" else ""}:
            assert columns[name].value == 1


def test_what_a_caption_leaves_out_is_not_counted(truth):
    columns = score_measured(["a red circle"] * 40, truth.measured).columns
    assert columns["direction"].n == columns["speed_ratio"].n == columns["background"].n == 0
    assert columns["colour"].n == 40
    assert score_measured(["a red circle"] * 40, truth.measured).columns["direction"].to_dict()["value"] is None
    with pytest.raises(UserError, match="captions=1 does not match 2 clips"):
        score(["a red circle"], torch.zeros(2, 5, 3, 64, 96))


def test_long_clips_that_wrap_are_measured_alike():
    scenes = WORLD.scenes(3, 5) + [one(speed="fast", direction="up")]
    assert_all_right(score([caption(s) for s in scenes], WORLD.render(scenes, 241)))


def test_defects_make_a_clip_inconsistent():
    base = WORLD.render([one()])[0]
    red, circle = WORLD.render([one(colour="red"), one(shape="circle")])
    recoloured = torch.cat((base[:50], red[50:]))
    reshaped = torch.cat((base[:50], circle[50:]))
    gone = torch.cat((base[:50], torch.full_like(base[50:], -0.2)))
    other = WORLD.render([one(y=52.0, x=80.0, speed="slow", direction="left", size=6.5)])[0]
    doubled = torch.where((other.amax(1) - other.amin(1) > 0.8)[:, None], other, base)
    hops = WORLD.render([one(x=20.0 + 8 * (t % 2)) for t in range(81)], 1)[:, 0]
    found = measure(torch.stack((base, recoloured, reshaped, gone, doubled, hops)))
    assert found["consistency"][0] == 1
    assert (found["consistency"][1:] < 0.8).all()
    assert (found["consistency"][1:4] > 0.5).all()  # the share of good frames, not all or nothing


def test_a_clip_without_a_subject_or_motion_is_recognised_as_such():
    still = WORLD.render([one()], 1).expand(1, 81, -1, -1, -1)[0]
    empty = torch.full((81, 3, 64, 96), -0.2)
    noise = torch.randn(81, 3, 64, 96, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    found = measure(torch.stack((still, empty, noise)))
    assert found["direction"].tolist()[:2] == [-1, -1]
    assert (found["colour"][0], found["colour"][1]) == (VALUES["colour"].index("green"), -1)
    assert found["shape"][1] == -1 and found["background"][2] == -1
    assert (found["consistency"][1:] < 0.5).all()


def test_wilson_against_published_values():
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    for hits, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        interval = wilson(hits, n)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-4)
    assert math.isnan(wilson(0, 0).value)
    mean = mean_interval(torch.tensor([1.0, 2.0, 3.0, float("nan")]))
    assert (mean.value, mean.n) == (2.0, 3) and mean.high == pytest.approx(2 + 1.96 / math.sqrt(3), abs=1e-3)


def test_seams_are_found_at_borders_only(clips):
    borders = [9, 21, 33, 45, 57, 69]
    assert (seam_score(clips[:4], borders) - 1).abs().max() < 0.05
    flash = clips[:4].clone()
    for k, b in enumerate(borders):
        flash[:, b:] += 0.05 * (-1) ** k
    assert (seam_score(flash.clamp(-1, 1), borders) > 2).all()
    assert (seam_score(flash.clamp(-1, 1), [b + 3 for b in borders]) < 0.8).all()
    assert seam_score(clips[:1, :5], borders).isnan().all()
    steps = torch.tensor([[1.0, 2.0, 8.0, 1.0, 4.0, 3.0, 8.0, 1.0]])  # into frames 1 .. 8
    assert seam_ratio(steps, [3, 7]).item() == pytest.approx(8 / 2)
    assert seam_ratio(steps, [3, 7, 11], [5, 2, 20]).item() == pytest.approx(8 / 3)


def test_saturation_drift_and_motion(clips, truth):
    assert saturation_drift(truth.measured).abs().max() < 0.02
    fade = torch.linspace(1, 0.7, 81).view(1, 81, 1, 1, 1)
    grey = clips[:4].mean(2, keepdim=True)
    drift = saturation_drift(measure(grey + (clips[:4] - grey) * fade))
    assert ((drift > -0.32) & (drift < -0.15)).all()
    slow, fast = motion_energy(WORLD.render([one(speed="slow"), one(speed="fast")], 20))
    assert fast > 2 * slow > 0


def test_spread_of_starts_and_headings(truth):
    found = truth.measured
    same = {name: value[:1].expand(8, *value.shape[1:]) for name, value in found.items()}
    assert start_spread(same) == heading_spread(same) == pytest.approx(0, abs=1e-5)
    assert heading_spread(found) > 0.9
    wide, left_open = start_spread(found), start_spread(found, WORLD.expected_starts(SCENES))
    assert wide > left_open > 10


def test_frechet_distance_grows_with_the_defect(clips):
    """Against the closed form for one-dimensional normals, then on clips."""
    a, b = torch.tensor([[-1.0], [1.0]]), torch.tensor([[1.0], [7.0]])
    assert frechet_distance(a, b) == pytest.approx(16 + (math.sqrt(18) - math.sqrt(2)) ** 2)
    clips = clips[:, ::8]
    data = clip_features(clips)
    assert data.shape == (40, 64)
    again = clip_features(WORLD.render(WORLD.scenes(12, 40, balanced=True), 11))
    blurred, more = (clip_features(degraded(clips, sigma, 0.0)) for sigma in (1.0, 2.0))
    stuck = clip_features(clips[:, :1].expand(-1, 11, -1, -1, -1))
    near = frechet_distance(data, again)
    assert frechet_distance(data, data) == pytest.approx(0, abs=1e-5)
    assert 0 < frechet_distance(data, blurred) < frechet_distance(data, more)
    assert frechet_distance(data, data[:4].repeat(10, 1)) > 2 * near
    assert frechet_distance(data, stuck) > 0.1
