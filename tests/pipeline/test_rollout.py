"""Training rollout against inference, whom its gradient reaches, and what recomputation must not change."""

from itertools import islice

import pytest
import torch
from conftest import random_student
from distill_case import distill_stage

from configs.geometry import Geometry
from model.cache import GraphCache
from model.checkpointing import full_checkpoint
from model.codec import WanCodec
from model.denoiser import Student
from model.schedule import Schedule
from pipeline.noise import NoiseSource
from pipeline.rollout import PrecomputedNoise, clipped_exits, exit_steps, last_steps, rollout
from pipeline.stream import StreamSession
from pipeline.switch import embeddings_after_switch

ROWS = ((1000.0, 900.0, 700.0, 357.1), (1000.0, 900.0, 357.1), (1000.0, 357.1))
POLICIES = {
    "last_step": {},
    "clean": {"context": "clean"},
    "renoise": {"context": "renoise", "renoise_timestep": 200.0},
}
GEOMETRY = Geometry(height=32, width=48, window_frames=9)  # 3 chunks of window: the ring rolls at chunk 3
CHUNKS = 6


def run(student, schedule, exits, *, chunks=CHUNKS, text=None, seeds=(3, 4), **options):
    noise = NoiseSource(seeds, GEOMETRY, "cpu", torch.float32)
    cache = GraphCache(GEOMETRY, student.model.config.num_layers)
    text_of = options.pop("text_of", lambda chunk: text)
    return rollout(student, schedule, noise, text_of, cache=cache, exits=exits[:chunks], **options)


@pytest.fixture(scope="module")
def text(tiny_student):
    torch.manual_seed(5)
    return torch.randn(2, 12, tiny_student.model.config.text_dim)


@pytest.fixture
def trained():
    """A student whose parameters take gradients; float64 would hide rounding that float32 must be equal in."""
    student = random_student(layers=2, seed=0)
    student.model.requires_grad_(True)
    return student


def gradients(student, x):
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    parameters = list(student.model.parameters())
    return torch.autograd.grad((x * weight).sum(), parameters, allow_unused=True)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_exit_at_the_last_step_is_bit_identical_to_inference(
    tiny_student, tiny_vae, tiny_text_encoder, policy, grad
):
    schedule = Schedule(timesteps_by_chunk=ROWS, **POLICIES[policy])
    prompts = ["a red circle moves right", "a blue square"]
    session = StreamSession(tiny_student, WanCodec(tiny_vae), tiny_text_encoder, schedule, GEOMETRY)
    played = torch.cat([result.latents for result in session.play(prompts, [3, 4], CHUNKS)], dim=1)
    ours = run(tiny_student, schedule, last_steps(schedule, CHUNKS), text=tiny_text_encoder(prompts), grad=grad)
    assert ours.std() > 0.1 and torch.equal(ours, played)


@pytest.mark.parametrize("policy", POLICIES)
def test_later_chunks_see_what_inference_leaves_when_the_exit_came_early(tiny_student, text, policy):
    """Only the exit's x0 is another: chunk k made with early exits before it is what inference makes of it."""
    schedule = Schedule(timesteps_by_chunk=ROWS, **POLICIES[policy])
    last = last_steps(schedule, CHUNKS)
    whole = run(tiny_student, schedule, last, text=text, grad=False)
    for k in (1, 3, CHUNKS - 1):
        early = (*exit_steps(schedule, CHUNKS, 0.0)[:k], last[k])
        ours = run(tiny_student, schedule, early, text=text, grad=True)
        assert torch.equal(ours[:, GEOMETRY.chunk(k)], whole[:, GEOMETRY.chunk(k)])
        assert not torch.equal(ours[:, : 3 * k], whole[:, : 3 * k])


def test_the_releases_context_is_not_what_inference_leaves(tiny_student, text):
    schedule = Schedule(timesteps_by_chunk=ROWS)
    last = last_steps(schedule, CHUNKS)
    ours, theirs = (run(tiny_student, schedule, last, text=text, context=c) for c in ("inference", "release"))
    assert torch.equal(ours[:, :3], theirs[:, :3]) and not torch.equal(ours[:, 3:6], theirs[:, 3:6])
    renoised = Schedule(timesteps_by_chunk=ROWS, context="renoise", renoise_timestep=100.0)
    assert torch.equal(theirs, run(tiny_student, renoised, last, text=text)), "from whole rows: one pass more, at 100"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_only_the_drawn_step_has_a_graph(trained, text, share):
    schedule = Schedule(timesteps_by_chunk=ROWS, context="clean")
    calls = []

    class Spy(Student):
        def x0(self, x_t, t, *args, **kwargs):
            calls.append((torch.is_grad_enabled(), t[0].item(), x_t.requires_grad))
            return super().x0(x_t, t, *args, **kwargs)

    exits = exit_steps(schedule, 4, share)
    run(Spy(trained.model), schedule, exits, text=text, first_grad=1)
    drawn = [(t, needs) for enabled, t, needs in calls if enabled]
    assert [t for t, _ in drawn] == [pytest.approx(schedule.timesteps(k)[exits[k]]) for k in range(1, 4)]
    assert not any(needs for _, needs in drawn), "the exit's input is a constant"
    assert len(calls) == schedule.nfe(3) + exits[3] + 1, "whole rows and context passes, none after the last exit"


@pytest.mark.parametrize("share", [0.0, 0.6, 0.99])
@pytest.mark.parametrize("context", ["inference", "release"])
def test_checkpointing_changes_no_gradient(trained, text, share, context):
    """Also where the ring has rolled over what a forward read, before its backward runs."""
    schedule = Schedule(timesteps_by_chunk=ROWS)
    exits = exit_steps(schedule, 5, share)
    plain = gradients(trained, run(trained, schedule, exits, text=text, context=context))
    runs = []

    def counting(function, *args):
        def again(*args):
            runs.append(1)
            return function(*args)

        return full_checkpoint(again, *args)

    trained.model.enable_gradient_checkpointing(counting)
    x = run(trained, schedule, exits, text=text, context=context)
    forwards = len(runs)
    again = gradients(trained, x)
    assert len(runs) == 2 * forwards > 0, "recomputation took place"
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True) if a is not None)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_straight_through_keys_carry_the_exits_graph_and_the_last_steps_numbers(trained, text, share):
    schedule = Schedule(timesteps_by_chunk=ROWS)
    exits = exit_steps(schedule, 2, share)
    noise = NoiseSource((3, 4), GEOMETRY, "cpu", torch.float32)
    caches = []
    for grad in (True, False):
        cache = GraphCache(GEOMETRY, 2)
        rollout(trained, schedule, noise, lambda chunk: text, cache=cache, exits=exits, grad=grad)
        caches.append(cache)
    for (a, b), (c, d) in zip(caches[0]._slots[1].values(), caches[1]._slots[1].values(), strict=True):
        assert torch.equal(a, c) and torch.equal(b, d) and a.requires_grad and not c.requires_grad


def test_gradients_are_those_of_finite_differences(text):
    """Through keys too, along a random direction of the parameters. With one-step rows all that depends on them has a
    graph. The bound is that of float32, in which norms and rotations compute whatever the weights are."""
    student = random_student(layers=2)
    student.model.double().requires_grad_(True)
    schedule = Schedule(timesteps_by_chunk=((700.0,),))
    noise = NoiseSource((3, 4), GEOMETRY, "cpu", torch.float64)
    weight = torch.randn(2, 12, 16, 4, 6, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def value(**options):
        cache = GraphCache(GEOMETRY, 2)
        x = rollout(student, schedule, noise, lambda c: text.double(), cache=cache, exits=(0,) * 4, **options)
        return (x * weight).sum()

    parameters = [p for p in student.model.blocks.parameters()]
    g = torch.Generator().manual_seed(4)
    direction = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in parameters]
    analytic = {}
    for on in (True, False):
        found = torch.autograd.grad(value(context_grad=on), parameters)
        analytic[on] = sum((d * f).sum() for d, f in zip(direction, found, strict=True)).item()
    ends = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            for p, d in zip(parameters, direction, strict=True):
                p += step * d
            ends.append(value(grad=False).item())
    measured = (ends[0] - ends[1]) / 2e-5
    assert measured == pytest.approx(analytic[True], rel=2e-3)
    assert measured != pytest.approx(analytic[False], rel=4e-3)


def test_exit_steps_are_one_share_of_every_row():
    schedule = Schedule(timesteps_by_chunk=ROWS)
    assert exit_steps(schedule, 4, 0.0) == (0, 0, 0, 0) and exit_steps(schedule, 4, 0.7) == (2, 2, 1, 1)
    assert exit_steps(schedule, 4, 0.999) == last_steps(schedule, 4) == (3, 2, 1, 1)
    assert len({exit_steps(schedule, 4, i / 997) for i in range(997)}) == 6


def test_released_exits_never_train_the_last_steps_of_the_first_chunks(tiny_assets):
    """Every step that has a graph in 60 updates of a run as diagdistill's commit 24ef1c9 rolls out, and as here."""

    def trained_steps(*overrides):
        stage = distill_stage(tiny_assets, "schedule.preset=release", *overrides)
        exits = [stage.planner.draw("generator", step).exits for step in range(60)]
        found = {(k, stage.schedule.timesteps(k)[e]) for plan in exits for k, e in enumerate(plan)}
        return stage, exits, {k: sorted((round(t, 1) for c, t in found if c == k), reverse=True) for k in range(4)}

    stage, exits, steps = trained_steps("training.distill.exit=release", "training.distill.rollout_context=release")
    assert steps == {0: [1000, 937.5], 1: [1000, 937.5], 2: [1000, 357.1], 3: [1000, 357.1]}
    assert len({e for plan in exits for e in [plan]}) == 2**4, "one draw a chunk"
    calls = []

    class Spy(Student):
        def x0(self, x_t, t, *args, **kwargs):
            calls.append((torch.is_grad_enabled(), round(t.flatten()[0].item(), 1)))
            return super().x0(x_t, t, *args, **kwargs)

    stage.student = Spy(stage.student.model)
    step = next(s for s in range(60) if exits[s] == (1, 1, 1, 1))
    stage.generator_backward.run(*stage._batches("generator", step))
    first, second = [(False, 1000), (True, 937.5), (False, 100)], [(False, 1000), (True, 357.1), (False, 100)]
    assert calls == [*first, *first, *second, *second[:2]], "then one more pass at 100, but behind the last chunk"

    _, exits, steps = trained_steps()
    assert steps == {0: [1000, 937.5, 833.3, 357.1], 1: [1000, 937.5, 357.1], 2: [1000, 357.1], 3: [1000, 357.1]}
    assert clipped_exits(Schedule(timesteps_by_chunk=((1000.0, 500.0, 200.0, 100.0),)), [3, 0, 2]) == (3, 0, 2)


def test_drawn_noise_gives_every_use_its_own():
    schedule = Schedule(timesteps_by_chunk=ROWS)
    drawn = torch.randn(PrecomputedNoise.shape(2, 4, schedule, GEOMETRY))
    noise = PrecomputedNoise(drawn, schedule)
    uses = []
    for k in range(4):
        steps = range(1, len(schedule.timesteps(k)))
        uses += [noise.initial(k), *(noise.renoise(k, i) for i in steps), noise.context(k)]
    assert torch.equal(torch.stack(uses, 1), drawn)


@pytest.mark.parametrize(
    ("policy", "switch", "at"),  # 2: while the window fills; 5: when the ring has rolled
    [*((policy, "recache", 5) for policy in POLICIES), *(("last_step", how, 2) for how in ("recache", "blend", "cut"))],
)
def test_a_switch_of_prompt_is_bit_identical_to_what_is_said_to_a_session(
    tiny_student, tiny_vae, tiny_text_encoder, policy, switch, at
):
    """Gradients are on, and only from the switch on, as in long tuning."""
    schedule = Schedule(timesteps_by_chunk=ROWS, **POLICIES[policy])
    prompts, others = ["a red circle moves right", "a blue square"], ["a green triangle", "a red square moves up"]
    options = {"switch": switch, "switch_chunks": 2}
    session = StreamSession(tiny_student, WanCodec(tiny_vae), tiny_text_encoder, schedule, GEOMETRY, **options)
    playing = session.play(prompts, [3, 4], 8)
    played = [next(playing).latents for _ in range(at)]
    session.set_prompt(others)
    played = torch.cat([*played, *(result.latents for result in playing)], dim=1)
    a, b = tiny_text_encoder(prompts), tiny_text_encoder(others)
    texts = [*[a] * at, *islice(embeddings_after_switch(a, b, switch, 2), 8 - at)]
    rest = {"first_grad": at, "chunks": 8, "text_of": texts.__getitem__, "recache_at": None}
    ours = {}
    for recache_at in (at, None):
        ours[recache_at] = run(tiny_student, schedule, last_steps(schedule, 8), **rest | {"recache_at": recache_at})
    assert torch.equal(ours[at if switch == "recache" else None], played)
    assert not torch.equal(ours[at][:, 3 * at :], ours[None][:, 3 * at :]), "recaching makes a difference"


@pytest.mark.parametrize("switch", ["recache", "recache_window", "blend", "cut"])
def test_long_tuning_changes_the_prompt_as_inference_does(tiny_assets, monkeypatch, switch):
    """The rollout of the stage itself, on its own noise, against a session that is given that noise."""
    long = "training.distill.long={max_frames: 24, min_frames: 24, switch_share: 1.0}"
    extra = [long, "training.distill.exit=last", f"stream.switch={switch}", "stream.switch_chunks=2"]
    stage = distill_stage(tiny_assets, *extra)
    plan = stage.planner.draw("generator", 0)
    batch = stage._draw("generator", 0, 0, plan)
    ours = stage._sample(plan, batch["text"], batch["noise"], batch["text_after"], grad=True)

    monkeypatch.setattr("pipeline.stream.NoiseSource", lambda *_: _Given(batch["noise"], stage.schedule))
    texts = {"before": batch["text"], "after": batch["text_after"]}
    session = StreamSession(stage.student, stage.codec, lambda prompts: texts[prompts[0]], stage.schedule,
                            stage.geometry, switch=switch, switch_chunks=2)  # fmt: skip
    playing = session.play(["before"] * 2, 0, 8)
    played = [next(playing).latents for _ in range(plan.switch)]
    session.set_prompt("after")
    played += [result.latents for result in playing]
    assert 1 <= plan.switch <= 4 and torch.equal(ours[:, 1:], torch.cat(played, dim=1)[:, -11:])


class _Given(PrecomputedNoise):
    def prefetch(self, chunk: int) -> None:
        """Nothing to draw."""
