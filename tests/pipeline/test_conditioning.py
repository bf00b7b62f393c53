"""Streams that begin with an image or a clip: what is shown of it, what is decoded, and training's twin of it."""

import threading

import pytest
import torch
from small_wan import stream_cache
from test_rollout import GEOMETRY, POLICIES, ROWS
from test_session import OTHER, PROMPT, Counting, make, same  # noqa: F401  (fixture)

from model.cache import GraphCache
from model.codec import WanCodec
from model.fast.student import FastPlan, optimize_student
from model.schedule import Schedule
from pipeline.noise import NoiseSource
from pipeline.rollout import last_steps, rollout
from pipeline.stream import StreamSession

CONTEXTS = ("last_step", "clean", "renoise")


def latents(geometry, frames: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(geometry.latent_shape(batch, frames), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("context", CONTEXTS)
def test_the_video_begins_with_what_is_given(make, tiny_geometry, tiny_vae, context, frames):  # noqa: F811
    """Latents as they are, pixels as a decoder gives them that was never interrupted; then something is made."""
    given = latents(tiny_geometry, frames)
    made = list(make(context=context, context_timestep=200.0).play(PROMPT, 1, 4, given))
    whole = torch.cat([result.latents for result in made], 1)
    assert torch.equal(whole[:, :frames], given) and whole.shape[1] == 12
    pixels = WanCodec(tiny_vae).decode(whole).add(1).mul(127.5).round().to(torch.uint8).movedim(2, -1)
    shown = torch.cat([result.frames for result in made], 1)
    assert shown.shape[1] == 45 and (shown.int() - pixels.int()).abs().max() <= 1
    plain = torch.cat([result.latents for result in make().play(PROMPT, 1, 4)], 1)
    assert not torch.equal(whole[:, frames:], plain[:, frames:])


@torch.no_grad()
@pytest.mark.parametrize("context", CONTEXTS)
def test_an_image_is_shown_at_the_level_of_the_context_in_every_step(make, tiny_geometry, context):  # noqa: F811
    """Chunk 0 by hand, from the formulas."""
    session, image = make(context=context, context_timestep=200.0), latents(tiny_geometry, 1)
    ours = next(session.play(PROMPT, 5, 2, image)).latents
    model, text = session.student.model, session.text_encoder([PROMPT])
    noise = NoiseSource([5], tiny_geometry, "cpu", torch.float32)
    row = session.schedule.timesteps(0)
    level = {"last_step": row[-1], "clean": 0.0, "renoise": 200.0}[context]
    shown = (1 - level / 1000) * image + level / 1000 * noise.context(0)[:, :1]
    x, cache = noise.initial(0), stream_cache(model, tiny_geometry, 1)
    for i, t in enumerate(row):
        x = torch.cat([shown, x[:, 1:]], 1)
        times = torch.tensor([[level, t, t]])
        v = model(x, times, text, view=cache.begin(0))
        x0 = x - times[..., None, None, None] / 1000 * v
        x0[:, :1] = image
        if i + 1 < len(row):
            sigma = row[i + 1] / 1000
            x = (1 - sigma) * x0 + sigma * noise.renoise(0, i + 1)
    torch.testing.assert_close(ours, x0, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_clip_leaves_the_keys_that_the_policy_says(make, tiny_geometry, context):  # noqa: F811
    session, clip = make(context=context, context_timestep=200.0), latents(tiny_geometry, 6)
    list(session.play(PROMPT, 5, 2, clip))
    model, text = session.student.model, session.text_encoder([PROMPT])
    noise, cache = NoiseSource([5], tiny_geometry, "cpu", torch.float32), stream_cache(model, tiny_geometry, 1)
    for k in range(2):
        level = {"last_step": session.schedule.timesteps(k)[-1], "clean": 0.0, "renoise": 200.0}[context]
        x = (1 - level / 1000) * clip[:, 3 * k : 3 * k + 3] + level / 1000 * noise.context(k)
        model(x, torch.tensor([level]), text, view=cache.begin(k), start_frame=3 * k)
    end = 2 * tiny_geometry.tokens_per_chunk
    for a, b in zip(session._cache._keys + session._cache._values, cache._keys + cache._values, strict=True):
        torch.testing.assert_close(a[:, :end], b[:, :end], atol=2e-5, rtol=0)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_training_rollout_with_an_image_is_bit_identical_to_inference(
    tiny_student, tiny_vae, tiny_text_encoder, policy
):
    schedule, image = Schedule(timesteps_by_chunk=ROWS, **POLICIES[policy]), latents(GEOMETRY, 1, batch=2)
    session = StreamSession(tiny_student, WanCodec(tiny_vae), tiny_text_encoder, schedule, GEOMETRY)
    played = torch.cat([r.latents for r in session.play([PROMPT, OTHER], [3, 4], 5, image)], dim=1)
    text, noise = tiny_text_encoder([PROMPT, OTHER]), NoiseSource([3, 4], GEOMETRY, "cpu", torch.float32)
    cache = GraphCache(GEOMETRY, tiny_student.model.config.num_layers)
    ours = rollout(
        tiny_student,
        schedule,
        noise,
        lambda chunk: text,
        cache=cache,
        exits=last_steps(schedule, 5),
        conditioning=image,
    )
    assert torch.equal(ours, played)
    early = rollout(
        tiny_student, schedule, noise, lambda chunk: text,
        cache=GraphCache(GEOMETRY, tiny_student.model.config.num_layers),
        exits=(0, *last_steps(schedule, 5)[1:]), conditioning=image,
    )  # fmt: skip
    assert torch.equal(early[:, 3:], played[:, 3:]) and torch.equal(early[:, :1], image)


def test_one_start_serves_a_batch_and_each_is_as_alone(make, tiny_geometry):  # noqa: F811
    given = latents(tiny_geometry, 4)
    both = torch.cat([r.latents for r in make().play([PROMPT, OTHER], [1, 2], 4, given)], 1)
    for i, prompt in enumerate([PROMPT, OTHER]):
        alone = torch.cat([r.latents for r in make().play(prompt, i + 1, 4, given)], 1)
        torch.testing.assert_close(alone[0], both[i], atol=1e-4, rtol=0)


def test_a_snapshot_within_the_start_keeps_the_rest_of_it(make, tiny_geometry):  # noqa: F811
    session, given = make(), latents(tiny_geometry, 7)
    playing = session.play(PROMPT, 1, 5, given)
    next(playing)
    here = session.snapshot()
    rest = list(playing)
    session.restore(here)
    assert same(rest, session.resume(4))
    session.set_prompt(OTHER)
    assert len(list(session.resume(2))) == 2, "recaching makes given chunks' keys again, too"


def test_a_start_that_was_cancelled_is_made_again(make, tiny_geometry, tiny_student):  # noqa: F811
    given = latents(tiny_geometry, 4)
    plain = list(make().play(PROMPT, 0, 3, given))
    for at in (1, 2):
        student = Counting(tiny_student, at)
        session = student.session = make(student=student)
        made = list(session.play(PROMPT, 0, 3, given))
        assert same(made + list(session.resume(3 - len(made))), plain)
    assert threading.active_count() < 50


def test_recaching_under_the_same_text_changes_nothing(make, tiny_geometry):  # noqa: F811
    session = make()
    list(session.play(PROMPT, 0, 4, latents(tiny_geometry, 4)))
    before = session.snapshot().cache
    session._recache_state.recache(session.student, session._cache, session._prompt_track.state.kv)
    after = session.snapshot().cache
    assert all(torch.equal(a, b) for a, b in zip(before.keys + before.values, after.keys + after.values, strict=True))


class Recorder:
    """Replays by running again."""

    def __call__(self, work):
        return work


def test_the_fast_student_starts_from_an_image_and_records_as_ever(make, tiny_geometry):  # noqa: F811
    from conftest import random_student
    from test_fast_wan import SDPA

    fast = optimize_student(random_student(), FastPlan(kernels=SDPA))
    fast.recorder = Recorder
    image = latents(tiny_geometry, 1)
    ours, plain = (torch.cat([r.latents for r in s.play(PROMPT, 1, 9, image)], 1) for s in (make(student=fast), make()))
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=0)
    assert fast.graphs
    list(make(student=fast).play(PROMPT, 1, 2, image))
    assert fast.graphs
