"""Scenes, captions and pictures of the tiny world."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from configs.errors import UserError
from trainer.tiny.captions import (
    ATTRIBUTES,
    DEFAULT_PROMPT,
    DIRECTIONS,
    SHAPES,
    VALUES,
    VOCABULARY,
    opposite,
    parse_caption,
    phrase,
    words_of,
)
from trainer.tiny.world import (
    CLIP_FRAMES,
    EXTENT,
    TinyScene,
    TinyWorld,
    caption,
    flip_attribute,
    training_caption,
    velocity,
)

WORLD = TinyWorld()


def a_scene(**changes) -> TinyScene:
    values = {"colour": "red", "shape": "circle", "direction": "right", "speed": "fast", "background": "black"}
    return TinyScene(**{**values, "x": 20.0, "y": 30.0, "size": 10.0, **changes})


def test_scenes_are_functions_of_their_seed():
    assert WORLD.scene(3) == TinyWorld().scene(3)
    assert len({WORLD.scene(i) for i in range(50)}) == 50
    assert WORLD.scenes(1, 5) == WORLD.scenes(1, 9)[:5]
    assert not set(WORLD.scenes(1, 20)) & set(WORLD.scenes(2, 20))
    assert training_caption(WORLD.scene(3)) == training_caption(WORLD.scene(3))


def test_prompts_are_balanced_and_say_everything():
    prompts = WORLD.prompts(7, 50)
    stated = [parse_caption(p) for p in prompts]
    for name in ATTRIBUTES:
        counts = Counter(s[name] for s in stated)
        assert set(counts) == set(VALUES[name])
        assert max(counts.values()) - min(counts.values()) <= 1
    assert prompts == WORLD.prompts(7, 50) != WORLD.prompts(8, 50)


def test_paths_of_one_clip_stay_inside_and_starts_lie_upstream():
    scenes = WORLD.scenes(0, 400)
    for s in scenes:
        (vx, vy), (ex, ey) = velocity(s.direction, s.speed), EXTENT[s.shape]
        for frame in (0, CLIP_FRAMES - 1):
            x, y = s.x + vx * frame, s.y + vy * frame
            assert ex * s.size + 1 <= x + 1e-6 and x - 1e-6 <= 96 - ex * s.size - 1
            assert ey * s.size + 1 <= y + 1e-6 and y - 1e-6 <= 64 - ey * s.size - 1
    mean_start = {d: np.mean([s.x for s in scenes if s.direction == d]) for d in ("right", "left")}
    assert mean_start["left"] - mean_start["right"] > 30
    for fast in ("right", "up", "down-left"):  # starts still differ where the path is longest
        starts = [(s.x, s.y) for s in scenes if (s.direction, s.speed) == (fast, "fast")]
        assert np.std(starts, axis=0).sum() > 4


def test_captions_read_back():
    for scene in WORLD.scenes(1, 300):
        full = {name: vars(scene)[name] for name in ATTRIBUTES}
        assert parse_caption(caption(scene)) == full
        said = parse_caption(training_caption(scene))
        assert all(said[name] in (None, full[name]) for name in ATTRIBUTES)


def test_every_training_word_is_in_the_vocabulary_and_nearly_every_vocabulary_word_comes_up():
    seen = Counter(w for scene in WORLD.scenes(2, 6000) for w in words_of(training_caption(scene)))
    assert set(seen) <= set(VOCABULARY)
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    values = {word for name in ("colour", "shape", "background") for word in VALUES[name]}
    assert values | {"right", "left", "up", "down", "slowly", "quickly", "medium"} <= set(seen)
    assert set(words_of(DEFAULT_PROMPT)) <= set(VOCABULARY)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red circle moves right", {"colour": "red", "shape": "circle", "direction": "right"}),
        ("PURPLE box, going Up-Left!", {"colour": "magenta", "shape": "square", "direction": "up-left"}),
        ("on stripes a ball drifts leftwards slowly", {
            "shape": "circle", "direction": "left", "speed": "slow", "background": "striped"}),
        ("to the left and downwards, fast, a plus of turquoise on grey", {
            "colour": "cyan", "shape": "cross", "direction": "down-left", "speed": "fast", "background": "gray"}),
        ("a black circle", {"shape": "circle"}),
        ("a blue triangle moves down at medium speed on a black background", {
            "colour": "blue", "shape": "triangle", "direction": "down", "speed": "medium", "background": "black"}),
        ("", {}),
        ("a dog plays chess", {}),
    ],
)
def test_parse_is_tolerant(text, expected):
    assert parse_caption(text) == {**dict.fromkeys(ATTRIBUTES), **expected}


def test_the_wording_of_the_brief():
    scene = a_scene(direction="up-right", background="striped")
    assert caption(scene) == "a red circle moves quickly up and to the right on a striped background"
    assert phrase(parse_caption(DEFAULT_PROMPT)) == DEFAULT_PROMPT


def test_flipping_changes_one_attribute_only():
    rng = np.random.default_rng(0)
    for scene in WORLD.scenes(4, 40):
        before = parse_caption(caption(scene))
        for attribute in (*ATTRIBUTES, "sign", "axis"):
            after = parse_caption(flip_attribute(scene, attribute, rng))
            key = "direction" if attribute in ("sign", "axis") else attribute
            assert [n for n in ATTRIBUTES if after[n] != before[n]] == [key]
            if attribute == "sign":
                assert after["direction"] == opposite(before["direction"])
            if attribute == "axis":
                assert (DIRECTIONS.index(after["direction"]) - DIRECTIONS.index(before["direction"])) % 4 == 2
    assert flip_attribute("a red circle moves right", "sign", rng) == "a red circle moves left"
    with pytest.raises(UserError, match="background is not stated"):
        flip_attribute("a red circle moves right", "background", rng)
    with pytest.raises(UserError, match="attribute=flavour is unknown"):
        flip_attribute("a red circle moves right", "flavour", rng)


def naive_inside(shape: str, x: float, y: float, r: float) -> bool:
    """Whether a point relative to the middle lies in a shape, written another way than the signed distances."""
    if shape == "circle":
        return math.hypot(x, y) < r
    if shape == "square":
        return abs(x) < 0.89 * r and abs(y) < 0.89 * r
    if shape == "cross":
        return (abs(x) < 1.1 * r and abs(y) < 0.4 * r) or (abs(y) < 1.1 * r and abs(x) < 0.4 * r)
    corners = ((0.0, -1.015 * r), (1.17 * r, 1.015 * r), (-1.17 * r, 1.015 * r))
    turns = [
        (bx - ax) * (y - ay) - (by - ay) * (x - ax)
        for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True)
    ]
    return all(t > 0 for t in turns)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_frame_equals_supersampling_by_points(shape):
    """Where the background is white and the subject blue, the red channel is the share of the subject in a pixel."""
    scene = a_scene(shape=shape, colour="blue", background="white", direction="up", x=47.3, y=24.6, size=9.7)
    frame = (WORLD.render([scene], 1, start_frame=7)[0, 0] + 1) / 2
    x, y = 47.3, 24.6 - 7 * 0.45
    n = 6
    for py in range(8, 22):  # above the trail
        for px in range(34, 62, 3):
            points = [
                naive_inside(shape, px + (i + 0.5) / n - x, py + (j + 0.5) / n - y, 9.7)
                for i in range(n) for j in range(n)
            ]
            cover = sum(points) / n**2
            assert abs(cover - float((0.9 - frame[0, py, px]) / (0.9 - 0.08 * 0.775))) < 0.25, (px, py)
            if cover in (0.0, 1.0):
                lower = 0.9 if cover == 0 else 0.08
                assert abs(float(frame[0, py, px]) - lower) < 0.13  # a distance is not quite a share at corners


def test_batches_windows_and_types_agree():
    scenes = WORLD.scenes(5, 6)
    whole = WORLD.render(scenes, 12)
    assert whole.shape == (6, 12, 3, 64, 96)
    assert whole.min() >= -1 and whole.max() <= 1
    assert torch.equal(WORLD.render(scenes[2:3], 12)[0], whole[2])
    assert torch.equal(WORLD.render(scenes, 5, start_frame=7), whole[:, 7:])
    assert torch.equal(WORLD.render(scenes, 12, dtype=torch.bfloat16), whole.bfloat16())
    later = [WORLD.continued(s, 7) for s in scenes]
    torch.testing.assert_close(WORLD.render(later, 5), whole[:, 7:], atol=1e-3, rtol=0)


def test_a_subject_that_leaves_comes_back_at_the_other_edge():
    scene = a_scene()
    period = (96 + 2 * 10 + 1) / 0.8
    colour = lambda t: (v := WORLD.render([scene], 1, start_frame=t)[0, 0]).amax(0) - v.amin(0)  # noqa: E731
    hidden = colour(round((96 + 10.5 - 20) / 0.8))
    assert hidden.amax() < 1.2 and (hidden > 1).sum() < 20  # the trail alone is left
    back = colour(round(period - 12))
    assert (back.amax(0) > 1.0).nonzero().min() < 5
    torch.testing.assert_close(
        WORLD.render([scene], 1, start_frame=4 * 585), WORLD.render([scene], 1), atol=2e-4, rtol=0
    )  # 585 frames at 0.8 are 4 periods of 117 pixels
    far = WORLD.render([scene], 1, start_frame=585 * 100_000)
    torch.testing.assert_close(far, WORLD.render([scene], 1), atol=1e-2, rtol=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu():
    scenes = WORLD.scenes(6, 8)
    torch.testing.assert_close(WORLD.render(scenes, 9, "cuda").cpu(), WORLD.render(scenes, 9), atol=1e-3, rtol=0)
