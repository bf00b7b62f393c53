"""The measure of what comes back from behind the board finds another colour, and nothing else."""

from dataclasses import replace

import pytest
import torch

from scripts.studies.world_memory import GAP, kept_colour
from trainer.world.render import render
from trainer.world.scene import PERIOD, World

WORLD = World()
LENGTH = 117
HIDERS = [s for s in WORLD.scenes(8, 300) if s.motion == "hide" and s.rate in ("slow", "medium")][:8]
MOTIONS = ("swing", "travel", "spin", "bounce")
NOT_HIDING = [next(s for s in WORLD.scenes(8, 300) if s.motion == name) for name in MOTIONS]
OTHER = {"red": "blue", "blue": "yellow", "yellow": "green", "green": "purple", "purple": "cyan", "cyan": "red"}


def clip(scene, count=LENGTH, start=0):
    return render(WORLD, [scene], count, dtype=torch.uint8, start_frame=start)


def hidden(scene):
    """A frame in the middle of the first time behind the board that the clip shows from before it on."""
    period = PERIOD[scene.rate]
    at = (0.5 - scene.phase) % 1.0 * period  # farthest behind the board
    return round(at if at > period / 2 else at + period)


def recoloured(scene, at):
    return torch.cat([clip(scene, at), clip(replace(scene, colour=OTHER[scene.colour]), LENGTH - at, at)], dim=1)


def test_rendered_clips_keep_their_colour_behind_the_board():
    kept = torch.cat([kept_colour(clip(scene)) for scene in HIDERS])
    assert kept.tolist() == [1.0] * len(HIDERS)


def test_a_change_of_colour_behind_the_board_is_found():
    kept = torch.cat([kept_colour(recoloured(scene, hidden(scene))) for scene in HIDERS])
    assert kept.tolist() == [0.0] * len(HIDERS)


def test_a_subject_that_never_comes_back_has_not_kept_its_colour():
    scene = HIDERS[0]
    frames, at = clip(scene), hidden(scene)
    frames[:, at:] = frames[:, at : at + 1]
    assert kept_colour(frames).tolist() == [0.0]


@pytest.mark.parametrize("scene", NOT_HIDING, ids=lambda s: s.motion)
def test_motions_without_a_gap_are_judged_over_one_that_is_given(scene):
    frames, middle = clip(scene, 60), (24, 24 + GAP)
    assert kept_colour(frames).isnan().all() and kept_colour(frames, middle).tolist() == [1.0]
    changed = torch.cat([frames[:, :30], clip(replace(scene, colour=OTHER[scene.colour]), 30, 30)], dim=1)
    assert kept_colour(changed, middle).tolist() == [0.0]


def test_blur_and_noise_change_nothing():
    rng = torch.Generator().manual_seed(0)
    frames = clip(HIDERS[0]).float()
    noisy = (frames + 4 * torch.randn(frames.shape, generator=rng)).round().clamp(0, 255).byte()
    assert kept_colour(noisy).tolist() == [1.0]
