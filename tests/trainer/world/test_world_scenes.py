"""The moving world: captions say what scenes are, and every video is defined for all time."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.load import CHECKOUT
from trainer.world.captions import (
    ATTRIBUTES,
    MOTIONS,
    SHAPES,
    VALUES,
    VOCABULARY,
    applicable,
    flip_stated,
    parse_caption,
    words_of,
)
from trainer.world.render import render, shape_distance
from trainer.world.scene import PERIOD, TRAINED_SHARES, WAVE, World, caption, poses, training_caption, turn

WORLD = World()
SCENES = WORLD.scenes(1, 300)
ONE_OF_EACH = [next(scene for scene in SCENES if scene.motion == motion) for motion in MOTIONS]


def stated(scene) -> dict:
    return {name: vars(scene)[name] for name in ATTRIBUTES}


def test_the_standard_wording_says_everything():
    assert [parse_caption(caption(scene)) for scene in SCENES] == [stated(scene) for scene in SCENES]


def test_wordings_of_people_say_nothing_wrong_leave_up_to_two_open_and_use_known_words():
    missing = []
    for scene in SCENES:
        text = training_caption(scene)
        said = parse_caption(text)
        assert all(value in (None, vars(scene)[name]) for name, value in said.items()), text
        assert set(words_of(text)) <= set(VOCABULARY), text
        assert training_caption(scene) == text
        if said["motion"] is not None:
            missing.append(sum(said[name] is None for name in applicable(scene.motion)))
    assert set(missing) == {0, 1, 2}
    assert len({training_caption(replace(SCENES[0], seed=seed)) for seed in range(200)}) > 60


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_flipped_caption_differs_in_what_it_should(attribute):
    rng = np.random.default_rng(0)
    scene = next(scene for scene in SCENES if vars(scene)[attribute] is not None)
    changed = flip_stated(stated(scene), attribute, rng)
    differs = {name for name in ATTRIBUTES if changed[name] != vars(scene)[name]}
    follow = {"direction", "partner"} if attribute == "motion" else set()
    assert attribute in differs and differs <= {attribute} | follow
    assert changed["partner"] is None or changed["partner"] != changed["colour"]


def test_what_cannot_be_flipped_is_refused():
    with pytest.raises(UserError, match="speed is unknown"):
        flip_stated(stated(SCENES[0]), "speed", np.random.default_rng(0))
    swing = next(scene for scene in SCENES if scene.motion == "swing")
    with pytest.raises(UserError, match="not stated"):
        flip_stated(stated(swing), "partner", np.random.default_rng(0))


def test_scenes_are_functions_of_their_seed_and_balanced_ones_are_even():
    assert WORLD.scenes(7, 5) == WORLD.scenes(7, 5) != WORLD.scenes(8, 5)
    even = WORLD.scenes(4322222, 84, balanced=True)
    for name in ("colour", "shape", "motion", "rate", "amplitude", "ground"):
        counts = [sum(vars(scene)[name] == value for scene in even) for value in VALUES[name]]
        assert max(counts) - min(counts) <= 1, name
    assert all(scene.partner != scene.colour for scene in even)


def test_what_is_learnt_late_is_trained_more_often():
    drawn = WORLD.trained_scenes(7, 3000)
    assert drawn == WORLD.trained_scenes(7, 3000) != WORLD.trained_scenes(8, 3000)
    share = Counter(scene.motion for scene in drawn)
    for motion, times in TRAINED_SHARES.items():
        assert abs(share[motion] / share["bounce"] - times) < 0.25 * times, motion
    for name in ("colour", "shape", "rate", "amplitude", "ground"):
        counts = Counter(vars(scene)[name] for scene in drawn)
        assert len(counts) == len(VALUES[name]) and min(counts.values()) > 0.8 * max(counts.values()), name


def test_stated_attributes_are_kept_and_the_rest_is_drawn():
    asked = dict.fromkeys(ATTRIBUTES) | {"motion": "spin", "direction": "clockwise", "colour": "blue"}
    drawn = [WORLD.place(asked, np.random.default_rng(i)) for i in range(30)]
    assert {(s.motion, s.direction, s.colour, s.partner) for s in drawn} == {("spin", "clockwise", "blue", None)}
    assert {s.shape for s in drawn} == set(SHAPES)


def test_a_frame_is_a_function_of_its_index_alone():
    for scene in ONE_OF_EACH:
        whole = render(WORLD, [scene], 5, start_frame=70)
        assert torch.equal(render(WORLD, [scene], 1, start_frame=73)[:, 0], whole[:, 3])
    together = render(WORLD, ONE_OF_EACH, 2)
    assert torch.equal(together[3], render(WORLD, ONE_OF_EACH[3:4], 2)[0])


def test_videos_go_on_for_ever():
    """Hours later everything is where the period says, and nothing has left the frame."""
    for scene in ONE_OF_EACH:
        period = int(PERIOD[scene.rate])
        periods = 32 if scene.motion == "travel" else 1  # after which the ground, too, is where it was
        later = period * periods * 3000
        a, b = (render(WORLD, [scene], 2, start_frame=first) for first in (11, 11 + later))
        assert (a - b).abs().max() < 1e-3, scene.motion
        pose = poses([scene], np.arange(later, later + 200))
        margin = 1.4 * pose.size if scene.motion != "hide" else 0
        assert (pose.x - margin > 0).all() and (pose.x + margin < 160).all(), scene.motion
        assert (pose.y - margin > -3).all() and (pose.y + margin < 99).all(), scene.motion


def test_a_traveller_stays_and_the_ground_goes_by():
    scene = next(scene for scene in SCENES if scene.motion == "travel")
    pose = poses([scene], np.arange(10))
    assert (pose.x == scene.x).all()
    assert np.allclose(np.diff(pose.ground), turn(scene) * WAVE / PERIOD[scene.rate])


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_one_size_cover_the_same_area(shape):
    grid = torch.arange(-30, 31).float()
    x, y = torch.broadcast_tensors(grid, grid[:, None])
    area = (0.5 - shape_distance(shape, x, y, torch.tensor(12.0))).clamp(0, 1).sum()
    assert abs(area / (torch.pi * 144) - 1) < 0.03


def test_outlines_are_smooth_under_small_motion():
    """Moved by a tenth of a pixel, a picture changes everywhere by a tenth of an edge at most."""
    scene = replace(ONE_OF_EACH[MOTIONS.index("pulse")], phase=0.0)
    a, b = render(WORLD, [scene, replace(scene, x=scene.x + 0.1)], 1)
    assert 0 < (a - b).abs().max() < 0.35


def test_bytes_are_the_rounded_picture():
    scene = ONE_OF_EACH[:2]
    exact, whole = render(WORLD, scene, 2), render(WORLD, scene, 2, dtype=torch.uint8)
    assert whole.dtype == torch.uint8 and ((exact + 1) * 127.5 - whole.float()).abs().max() <= 0.51


def test_prompts_of_people_are_understood():
    """Written by hand: no template makes them."""
    lines = (CHECKOUT / "assets" / "prompts_world.txt").read_text(encoding="utf-8").splitlines()
    said = [{name: value for name, value in parse_caption(line).items() if value} for line in lines]
    golden = {"colour": "yellow", "shape": "ball", "motion": "bounce", "rate": "fast", "amplitude": "large"}
    assert said[0] == golden | {"ground": "brick"}
    assert said[2] == {
        "motion": "pulse", "colour": "red", "shape": "square", "amplitude": "large", "ground": "dotted",
    }  # fmt: skip
    assert said[5] == {"rate": "slow", "colour": "purple", "shape": "ball", "motion": "orbit", "partner": "green"}
    assert {row["motion"] for row in said} == set(MOTIONS)
    assert {word for line in lines for word in words_of(line)} <= set(VOCABULARY)
