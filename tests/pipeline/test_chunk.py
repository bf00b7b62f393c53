"""The denoising loop against a naive twin that has no cache and recomputes every chunk from its inputs."""

import pytest
import torch
from small_wan import stream_cache
from test_rollout import POLICIES, ROWS

from model.denoiser import Student
from model.schedule import Schedule
from pipeline.chunk import denoise_chunk, update_cache
from pipeline.noise import NoiseSource

CHUNKS = 6  # the window holds 4: the ring rolls


@pytest.fixture(scope="module")
def text(tiny_student):
    torch.manual_seed(5)
    return torch.randn(2, 12, tiny_student.model.config.text_dim)


@torch.no_grad()
def generate(student, schedule, geometry, text, seeds=(3, 4)):
    """What inference does, latents of all chunks [B, F, C, H, W]."""
    noise = NoiseSource(seeds, geometry, "cpu", torch.float32)
    cache = stream_cache(student.model, geometry, len(seeds))
    chunks = []
    for k in range(CHUNKS):
        place = {"cache": cache, "chunk": k, "text": text}
        x0 = denoise_chunk(
            student, noise.initial(k), schedule.timesteps(k), renoise=lambda i, k=k: noise.renoise(k, i), **place
        )
        update_cache(
            student, x0, context_timestep=schedule.context_timestep, eps=lambda k=k: noise.context(k), **place
        )
        chunks.append(x0)
    return torch.cat(chunks, dim=1)


@torch.no_grad()
def naive(student, schedule, geometry, text, seeds=(3, 4)):
    """Without a cache and without our loop: each evaluation sees the past chunks' inputs themselves, at the level at
    which they were left, in one forward over the whole visible sequence.

    The past's activations depend on what *it* saw, so a block-causal mask over everything so far is needed, with the
    window of each chunk; a chunk's keys do not depend on later ones.
    """
    noise = NoiseSource(seeds, geometry, "cpu", torch.float32)
    past, levels, out = [], [], []
    for k in range(CHUNKS):
        x = noise.initial(k)
        row = schedule.timesteps(k)
        for i, t in enumerate(row):
            x0 = evaluate(student, geometry, text, [*past, x], [*levels, t], k)
            seen = x, t
            if i + 1 < len(row):
                s = row[i + 1] / 1000
                x = (1 - s) * x0 + s * noise.renoise(k, i + 1)
        if schedule.context == "clean":
            seen = x0, 0.0
        elif schedule.context == "renoise":
            s = schedule.renoise_timestep / 1000
            seen = (1 - s) * x0 + s * noise.context(k), schedule.renoise_timestep
        past.append(seen[0])
        levels.append(seen[1])
        out.append(x0)
    return torch.cat(out, dim=1)


def evaluate(student, geometry, text, inputs, levels, k):
    """x0 of the newest of `inputs`."""
    f, n = geometry.chunk_frames, geometry.tokens_per_chunk
    mask = torch.zeros(len(inputs) * n, len(inputs) * n, dtype=torch.bool)
    for q in range(len(inputs)):
        newest = max(0, q - 2)  # a window of 4 chunks: the sink, and the newest 3 with itself
        for key in {0, *range(newest, q + 1)}:
            mask[q * n : (q + 1) * n, key * n : (key + 1) * n] = True
    t = torch.tensor(levels).repeat_interleave(f).expand(inputs[0].shape[0], -1)
    v = student.model(torch.cat(inputs, dim=1), t, text, mask=mask)
    return inputs[-1] - levels[-1] / 1000 * v[:, -f:]


@pytest.mark.parametrize("policy", POLICIES)
def test_matches_the_naive_twin(tiny_student, tiny_geometry, text, policy):
    schedule = Schedule(timesteps_by_chunk=ROWS, **POLICIES[policy])
    ours = generate(tiny_student, schedule, tiny_geometry, text)
    theirs = naive(tiny_student, schedule, tiny_geometry, text)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class Recorder(Student):
    """Counts evaluations and notes their levels and whether they record a graph."""

    def __init__(self, student):
        super().__init__(student.model)
        self.calls = []

    def x0(self, x_t, t, *args):
        self.calls.append((round(float(t[0]), 1), torch.is_grad_enabled()))
        return super().x0(x_t, t, *args)


def test_last_step_makes_no_pass_and_clean_draws_no_noise(tiny_student, tiny_geometry, text):
    student = Recorder(tiny_student)

    def eps():
        raise AssertionError("noise drawn for a pass that needs none")

    cache = stream_cache(student.model, tiny_geometry)
    x0 = torch.zeros(tiny_geometry.latent_shape(2, 3))
    update_cache(student, x0, context_timestep=None, cache=cache, chunk=0, text=text, eps=eps)
    assert student.calls == []
    with torch.no_grad():
        update_cache(student, x0, context_timestep=0.0, cache=cache, chunk=0, text=text, eps=eps)
    assert student.calls == [(0.0, False)]


def test_noise_depends_on_its_seed_name_chunk_and_step_alone(tiny_geometry):
    one = NoiseSource((7,), tiny_geometry, "cpu", torch.float32)
    batch = NoiseSource((5, 7), tiny_geometry, "cpu", torch.float32)
    batch.initial(0)
    assert torch.equal(one.renoise(2, 1), batch.renoise(2, 1)[1:])
    assert one.initial(0).shape == tiny_geometry.latent_shape(1, 3)
    draws = [one.initial(0), one.initial(1), one.renoise(0, 1), one.renoise(1, 1), one.renoise(0, 2), one.context(0)]
    assert len({draw.sum().item() for draw in draws}) == len(draws)
    assert abs(torch.cat(draws).mean()) < 0.1 and abs(torch.cat(draws).std() - 1) < 0.1
