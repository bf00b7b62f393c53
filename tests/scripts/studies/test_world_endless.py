"""Measures of long streams of the moving world find each way in which a stream can go wrong, and nothing else."""

from dataclasses import replace

import pytest
import torch

from configs.errors import UserError
from scripts.studies.world_endless import WINDOW, Watch, _trend
from trainer.world.render import render
from trainer.world.scene import World, caption

WORLD = World()
SCENES = WORLD.scenes(4, 200)


def one(**wanted):
    return next(s for s in SCENES if all(vars(s)[name] == value for name, value in wanted.items()))


SWING = one(motion="swing", rate="medium", amplitude="small", colour="red")
HIDE = one(motion="hide", rate="medium")
ORBIT = one(motion="orbit", rate="fast")
LENGTH = 2 * WINDOW


def frames(scene, count=LENGTH, start=0):
    return render(WORLD, [scene], count, dtype=torch.uint8, start_frame=start)[0]


def vanishing():
    clip = frames(SWING)
    clip[110:140] = frames(replace(SWING, size=0.1), 30, 110)
    return clip


def doubled():
    clip, other = frames(SWING), frames(replace(SWING, x=SWING.x + 45), 40, 120).float()
    top = other.amax(1)
    there = (top - other.amin(1)) / top.clamp_min(1) > 0.5
    clip[120:160] = torch.where(there[:, None], other, clip[120:160].float()).byte()
    return clip


def recoloured():
    return torch.cat([frames(SWING, WINDOW), frames(replace(SWING, colour="green"), WINDOW, WINDOW)])


def drifting():
    """Up to a quarter faster from frame to frame."""
    t = torch.arange(LENGTH)
    faster = (t + 0.25 * (t - WINDOW).clamp_min(0)).round().long()
    return frames(SWING, int(faster[-1]) + 1)[faster]


def lost():
    """Goes behind the board and stays there."""
    clip = frames(HIDE)
    clip[120:] = frames(replace(HIDE, phase=0.5), 1)[0]
    return clip


STREAMS = {
    "hide": (HIDE, frames), "orbit": (ORBIT, frames), "vanishing": (SWING, vanishing), "doubled": (SWING, doubled),
    "recoloured": (SWING, recoloured), "drifting": (SWING, drifting), "lost": (HIDE, lost),
}  # fmt: skip


@pytest.fixture(scope="module")
def stay() -> dict[str, dict[str, float]]:
    watch = Watch([caption(scene) for scene, _ in STREAMS.values()])
    clips = torch.stack([make(scene) if make is frames else make() for scene, make in STREAMS.values()])
    for part in clips.split(100, dim=1):  # windows do not depend on how the frames come
        watch.add(part)
    report = watch.report()
    assert set(report.summary()) > set(vars(report))
    return {name: {key: float(value[i]) for key, value in vars(report).items()} for i, name in enumerate(STREAMS)}


@pytest.mark.parametrize("name", ["hide", "orbit"])
def test_a_rendered_stream_stays_what_it_is(stay, name):
    found = stay[name]
    assert found["number"] > 0.99 and found["colour"] == 1 and found["shape"] > 0.98
    assert found["size"] < 0.05 and found["rate"] < 0.05 and found["rate_share"] == 1


def test_windows_that_hold_half_a_period_more_read_the_same():
    """A window of 96 frames is one and a half slow periods: it sees a pulse that is large twice, or small twice."""
    scenes = [one(motion="pulse", rate=rate, amplitude="large") for rate in ("slow", "medium")]
    watch = Watch([caption(scene) for scene in scenes])
    watch.add(torch.stack([frames(scene, 3 * WINDOW) for scene in scenes]))
    report = watch.report()
    assert float(report.size.max()) < 0.01
    assert float(report.sharpness_trend.abs().max()) < 0.1


@pytest.mark.parametrize("name, wrong", [("vanishing", 30), ("doubled", 40), ("lost", LENGTH - 120 - 22)], ids=str)
def test_a_wrong_number_is_found(stay, name, wrong):
    """A hiding subject may be gone for 22 frames at medium rate."""
    assert (1 - stay[name]["number"]) * LENGTH == pytest.approx(wrong, abs=10)


def test_a_changed_colour_is_found(stay):
    assert stay["recoloured"]["colour"] == pytest.approx(0.5, abs=0.03)
    assert stay["recoloured"]["number"] > 0.98


def test_a_drifting_rate_is_found(stay):
    assert 0.15 < stay["drifting"]["rate"] < 0.4 and stay["drifting"]["rate_share"] < 1


def test_trends_are_found():
    rising = 1 + 0.01 * torch.arange(10.0)
    assert float(_trend(rising[None])[0]) == pytest.approx(0.01 / float(rising.mean()))


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(UserError, match="states no motion"):
        Watch(["a red star"])
    watch = Watch(["a red star spins"])
    with pytest.raises(UserError, match="too short"):
        watch.report()
    with pytest.raises(UserError, match="2 streams do not match 1"):
        watch.add(torch.zeros(2, 1, 3, 96, 160))
