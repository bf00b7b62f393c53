"""Measures of the moving world read rendered clips, also through what a VAE does to them, and no wrong captions."""

import math

import pytest
import torch
import torch.nn.functional as F

from configs.errors import UserError
from scripts.studies.world_diversity import spread
from trainer.world.captions import ATTRIBUTES, MOTIONS, VALUES
from trainer.world.measures import COLUMNS, fit_bounce, fit_sine, measure, score, score_measured
from trainer.world.render import render
from trainer.world.scene import World, caption

WORLD = World()
SCENES = WORLD.scenes(21, 14, balanced=True)  # two of each motion
CAPTIONS = [caption(scene) for scene in SCENES]


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return render(WORLD, SCENES, 81, dtype=torch.uint8)


@pytest.fixture(scope="module")
def found(clips) -> dict[str, torch.Tensor]:
    return measure(clips)


def degraded(clips: torch.Tensor) -> torch.Tensor:
    """As a VAE of some 34 dB leaves clips: less sharp, with fine noise and noise of four pixels and frames."""
    rng = torch.Generator().manual_seed(0)
    exact = clips.float() / 255
    b, t, c, h, w = exact.shape
    blurred = F.avg_pool2d(F.pad(exact.flatten(0, 1), (1, 1, 1, 1), mode="replicate"), 3, 1).view_as(exact)
    noise = torch.randn(b, -(-t // 4), c, h // 4, w // 4, generator=rng).repeat_interleave(4, 1)[:, :t]
    noise = F.interpolate(noise.flatten(0, 1), scale_factor=4, mode="bilinear").view_as(exact)
    fine = torch.randn(exact.shape, generator=rng)
    out = 0.6 * exact + 0.4 * blurred + 0.014 * noise + 0.012 * fine
    return (out.clamp(0, 1) * 255).round().to(torch.uint8)


def assert_right(scores, share: float):
    for name, value in scores.columns.items():
        if name.endswith("ratio"):
            assert abs(value.value - 1) < 0.03, name
        else:
            assert value.value >= share, (name, [i for i, x in enumerate(scores.right[name]) if x == 0])


def test_rendered_clips_are_read_right(found):
    assert_right(score_measured(CAPTIONS, found), 0.99)
    assert found["jitter"].max() < 0.1


def test_clips_are_read_right_after_blur_and_noise(clips):
    kinds = [scene.motion for scene in SCENES]
    some = [kinds.index(motion) for motion in MOTIONS]
    worse = degraded(clips[some])
    error = (worse.float() - clips[some].float()).div(255).square().mean()
    assert 33 < -10 * torch.log10(error) < 36
    assert_right(score([CAPTIONS[i] for i in some], worse), 0.98)


def test_wrong_captions_are_right_by_chance_alone(found):
    rows = [score_measured(CAPTIONS[i:] + CAPTIONS[:i], found) for i in range(1, 14)]
    for name in ATTRIBUTES:
        share = sum(row.columns[name].value for row in rows) / 13
        chance = 1 / (6 * 7 if name == "partner" else 4 if name == "direction" else len(VALUES[name]))
        assert share < chance + 0.15, name
    for name in ("rate_near", "amplitude_near", "all"):
        assert sum(row.columns[name].value for row in rows) / 13 < 0.15, name


def test_columns_are_all_there(found):
    scores = score_measured(CAPTIONS, found)
    assert tuple(scores.columns) == COLUMNS and len(scores.table().splitlines()) == len(COLUMNS) + 1


def test_grey_frames_show_nothing():
    nothing = measure(torch.full((1, 20, 3, 96, 160), 128, dtype=torch.uint8))
    assert nothing["motion"][0] == nothing["colour"][0] == nothing["shape"][0] == nothing["ground"][0] == -1
    assert nothing["number"][0] == 0


def test_as_many_captions_as_clips():
    with pytest.raises(UserError, match="captions=2 does not match 1"):
        score(["a", "b"], torch.zeros(1, 2, 3, 96, 160))


def test_fits_find_period_amplitude_and_phase_where_frames_are_missing():
    t = torch.arange(81).double()
    use = (torch.arange(81) % 40 < 25)[None]
    wave = (7 + 5 * torch.cos(2 * math.pi * (t / 33 + 0.2)))[None]
    fit = fit_sine(wave, use)
    assert fit.period[0] == pytest.approx(33, rel=0.01) and fit.amplitude[0] == pytest.approx(5, rel=0.02)
    assert fit.phase[0] == pytest.approx(0.2, abs=0.02)
    u = (t / 50 + 0.3) % 1
    hop = fit_bounce((60 - 20 * 4 * u * (1 - u))[None], use)
    assert hop.period[0] == pytest.approx(50, rel=0.02) and hop.amplitude[0] == pytest.approx(20, rel=0.05)


def test_the_spread_of_what_captions_leave_open(found):
    """All of one place and phase: none; the data's own: one, relative to itself."""
    left_open = torch.ones(len(found["motion"]), dtype=torch.bool)
    same = {name: value[:1].expand_as(value) for name, value in found.items()}
    assert math.isnan(spread(same, same, left_open)["starts"]), "nothing to compare with"
    whole = spread(found, found, left_open)
    assert whole == pytest.approx({"starts": 1.0, "phases": 1.0, "headings": 1.0})
    assert spread(same, found, left_open)["starts"] == pytest.approx(0, abs=1e-3)
    assert spread(same, found, left_open)["phases"] == pytest.approx(0, abs=1e-3)


def test_headings_count_where_the_caption_leaves_them_open():
    """A model that does what captions say, and always goes to the right where they do not: it has no spread."""
    travel, (left, right) = MOTIONS.index("travel"), (VALUES["direction"].index(way) for way in ("left", "right"))
    data = {"motion": torch.full((8,), travel), "direction": torch.tensor([left, right] * 4)}
    data |= {name: torch.rand(8, generator=torch.Generator().manual_seed(1)) for name in ("x", "y", "phase")}
    left_open = torch.arange(8) >= 4
    made = data | {"direction": torch.where(left_open, right, data["direction"])}
    assert spread(made, data, left_open)["headings"] == pytest.approx(0, abs=1e-6)
    assert spread(data, data, left_open)["headings"] == pytest.approx(1)
    assert math.isnan(spread(made, data, torch.zeros(8, dtype=torch.bool))["headings"]), "all captions state it"
