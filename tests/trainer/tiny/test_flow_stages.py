"""Pre-training and teacher forcing: steps on whole clips, on first chunks, and on squares around the subject."""

import json
from dataclasses import replace

import pytest
import torch
from distill_case import CPU, distill_config, without_warnings
from torch.nn import functional as F

from configs.load import load_config
from model.causal_wan import CausalWanModel, chunk_causal_mask
from model.flow import euler_v, integrate, shift_time
from trainer.flow import FIRST, WHOLE
from trainer.tiny.few_steps import FewSteps
from trainer.tiny.flow import CROPPED, Pretrain, TeacherForcing
from utils.distributed import Ranks
from utils.seeds import generator


def flow_config(assets, stage: str, **flow):
    small = {"first_chunk_share": 0.0, "first_chunk_batch": 5, "first_chunk_clips": 0}
    crops = {"crop_share": 0.0, "crop_batch": 7, "crop": 2}
    flow = small | crops | {"context_timesteps": [0.0, 357.142857]} | flow
    distill_config(assets)  # writes the teacher
    return load_config(
        f"configs/train_tiny_{stage}.yaml",
        [
            "device=cpu", "video={height: 32, width: 48, num_latent_frames: 12}", "stream={window_frames: 9}",
            f"model={{vae: {assets / 'vae'}, text_tokens: 12, text_encoder: {assets / 'text_encoder'}, "
            f"tokenizer: {assets / 'text_encoder'}}}",
            f"training.init={{student: {assets / 'student'}, transformer: {assets / 'teacher'}, "
            f"teacher: {assets / 'student'}}}",
            "training={steps: 4, global_batch: 2, micro_batch: 2, bank_clips: 6, image_start: 0}",
            "training={compile: false, precision: float32}",
            f"training.flow={json.dumps(flow | {'bank_cache': None})}",
        ],
    )  # fmt: skip



@pytest.mark.parametrize("kind,stage", [(Pretrain, "pretrain"), (TeacherForcing, "teacher_forcing")])
def test_all_kinds_of_steps_come_up_and_learn(tiny_assets, kind, stage):
    flow = {"first_chunk_share": 0.6, "crop_share": 0.5, "first_chunk_clips": 9}
    config = flow_config(tiny_assets, stage, **flow)
    made = kind(config, CPU, Ranks())
    assert len(made.bank.latents) == 6 and len(made.first_chunks.latents) == 9
    opened = kind(replace(config, training=replace(config.training, open_captions=1.0)), CPU, Ranks())
    for bank, other in ((made.bank, opened.bank), (made.first_chunks, opened.first_chunks)):
        assert torch.equal(bank.latents, other.latents) and not torch.equal(bank.text, other.text)
    plans = [made.plan(step) for step in range(300)]
    assert 90 < plans.count(WHOLE) < 150 and 60 < plans.count(FIRST) < 120 and 60 < plans.count(CROPPED) < 120
    first, whole, cropped = (plans.index(name) for name in (FIRST, WHOLE, CROPPED))
    shown = "x_t" if stage == "teacher_forcing" else "x0"
    assert made.batch(whole, 0)[shown].shape == (2, 12, 16, 4, 6)
    assert made.batch(first, 0)[shown].shape == (5, 3, 16, 4, 6)
    assert made.batch(cropped, 0)[shown].shape == (7, 3, 16, 2, 2)
    for step in (first, whole, cropped):
        logs = made.update(step)
        assert logs["loss"] > 0 and logs["gradient_norm"] > 0


def test_a_step_in_bfloat16_gives_no_warning(tiny_assets):
    """As in stage `distill`: norms stay float32 under autocast, which torch remarks on."""
    config = flow_config(tiny_assets, "teacher_forcing")
    config = replace(config, training=replace(config.training, precision="bfloat16"))
    with without_warnings():
        TeacherForcing(config, CPU, Ranks()).update(0)


def test_a_first_chunk_alone_is_what_it_is_in_a_clip(tiny_assets):
    made = TeacherForcing(flow_config(tiny_assets, "teacher_forcing"), CPU, Ranks())
    batch = made.batch(0, 0)
    keep = {name: batch[name] for name in ("context", "context_t", "x_t", "t", "text")}
    with torch.no_grad():
        whole = made._velocities(made.module, **keep)[1][:, :3]
        alone = {name: value[:, :3] if name in ("x_t", "t") else value[:, :0] for name, value in keep.items()}
        first = made._velocities(made.module, **(alone | {"text": keep["text"]}))[1]
    torch.testing.assert_close(first, whole, atol=1e-5, rtol=0)


def test_noisy_context_is_in_the_loss_and_clean_context_is_not(tiny_assets):
    """Independent: the loss put together from the network's output, clip by clip."""
    made = TeacherForcing(flow_config(tiny_assets, "teacher_forcing"), CPU, Ranks())
    batch = made.batch(0, 0)
    batch["context_t"] = torch.tensor([0.0, 357.0])[:, None].expand(-1, 12).contiguous()
    batch["loss_mask"] = torch.ones_like(batch["t"])
    with torch.no_grad():
        logs = made.loss(**batch)
        sequence = torch.cat([batch["context"], batch["x_t"]], 1), torch.cat([batch["context_t"], batch["t"]], 1)
        v = CausalWanModel.forward(made.module, *sequence, batch["text"], mask=made.mask, frame_ids=made.frame_ids)
    torch.testing.assert_close(logs["past_loss"], F.mse_loss(v[1, :12], batch["context_target"][1]))
    torch.testing.assert_close(logs["loss"], F.mse_loss(v[:, 12:], batch["target"]) + 0.5 * logs["past_loss"])


def test_a_given_first_frame_is_shown_as_the_context_shows_it_and_not_graded(tiny_assets):
    made = TeacherForcing(flow_config(tiny_assets, "teacher_forcing", context_timesteps=[0.0]), CPU, Ranks())
    x0, text = made._clips(0, 0, made._rng(0, 0))
    for share in (0.0, 1.0):
        object.__setattr__(made.config.training, "image_start", share)
        batch = made.batch(0, 0)
        assert torch.equal(batch["x_t"][:, 0], x0[:, 0]) == (share == 1)
        assert (batch["t"][:, 0] == 0).all() == (share == 1) and (batch["t"][:, 1:] > 0).all()
        assert (batch["loss_mask"][:, 0] == 1 - share).all() and (batch["loss_mask"][:, 1:] == 1).all()
        before = made.loss(**batch)["chunk_loss"]
        batch["target"] = batch["target"].clone()
        batch["target"][:, 0] += 1
        assert torch.equal(made.loss(**batch)["chunk_loss"], before) == (share == 1)


def few_steps(tiny_assets, **flow) -> FewSteps:
    flow = {"context_timesteps": [357.142857], "self_rollout_ratio": 0.0} | flow
    return FewSteps(flow_config(tiny_assets, "few_steps", **flow), CPU, Ranks())


def test_timesteps_of_the_schedule(tiny_assets):
    made = few_steps(tiny_assets, self_rollout_ratio=0.5)
    batches = [made.batch(step, 0) for step in range(40)]
    t, before = (torch.cat([batch[name] for batch in batches]).view(-1, 4, 3) for name in ("t", "previous_t"))
    assert (t == t[:, :, :1]).all()
    for chunk in range(4):
        row = made.schedule.timesteps(chunk)
        assert sorted(set(t[:, chunk, 0].tolist()), reverse=True) == pytest.approx(row)
        allowed = {(row[max(i - back, 0)], row[i]) for i in range(len(row)) for back in (0, 1 if chunk else 0)}
        seen = set(zip(before[:, chunk, 0].tolist(), t[:, chunk, 0].tolist(), strict=True))
        assert {tuple(round(x) for x in pair) for pair in seen} == {tuple(round(x) for x in pair) for pair in allowed}


def test_after_a_change_of_prompt_the_loss_begins(tiny_assets):
    """Chunks before the change are real and do not count, in either loss; those of other clips all do."""
    made = few_steps(tiny_assets, self_rollout_ratio=1.0, switched_share=0.5, switched_clips=5)
    assert set(made.switched.switch.tolist()) <= {3, 6, 9}
    seen = set()
    for step in range(20):
        batch = made.batch(step, 0)
        for clip in range(2):
            from_bank = [i for i in range(5) if torch.equal(batch["x0"][clip], made.switched.latents[i].float())]
            at = int(made.switched.switch[from_bank[0]]) if from_bank else 0
            seen.add(bool(from_bank))
            if from_bank:
                assert torch.equal(batch["text"][clip], made.switched.text[from_bank[0]])
            late = [float(frame >= at) for frame in range(12)]
            assert batch["loss_mask"][clip].tolist() == batch["context_mask"][clip].tolist() == late
            assert batch["self_rollout"][clip].tolist() == [frame >= max(at, 3) for frame in range(12)]
        ready = made._roll_out(**batch)
        before = made.loss(**batch)
        for name in ("target", "context_target"):
            wrong = torch.where(batch["loss_mask"][:, :, None, None, None] > 0, ready[name], torch.inf)
            ready[name] = wrong.nan_to_num(posinf=1e3)
        after = super(FewSteps, made).loss(**ready)
        assert torch.equal(before["loss"], after["loss"])
    assert seen == {True, False}


def test_self_rollout_predicts_chunks_from_the_step_before(tiny_assets):
    """Independent: chunk after chunk through the bidirectional network, which a chunk with its past alone is."""
    made = few_steps(tiny_assets, self_rollout_ratio=1.0)
    batch = next(b for b in map(lambda step: made.batch(step, 0), range(50)) if (b["t"][:, 6] < 900).all())
    own = made._roll_out(**batch)
    for name, given in (("context", "context"), ("x_t", "x_previous")):
        assert torch.equal(own[name][:, :3], batch[given][:, :3])
    seen = torch.cat([batch["context"][:, :6], batch["x_previous"][:, 6:9]], 1)
    times = torch.cat([batch["context_t"][:, :6], batch["previous_t"][:, 6:9]], 1)
    mask = chunk_causal_mask(made.geometry, 9, CPU)
    with torch.no_grad():
        v = CausalWanModel.forward(made.module, seen, times, batch["text"], mask=mask)[:, 6:]
    x0 = batch["x_previous"][:, 6:9] - v * (batch["previous_t"][:, 6:9] / 1000)[:, :, None, None, None]
    level = (batch["t"][:, 6:9] / 1000)[:, :, None, None, None]
    expected = (1 - level) * x0 + level * batch["eps"][:, 6:9]
    torch.testing.assert_close(own["x_t"][:, 6:9], expected, atol=1e-4, rtol=0)
    shown = (1 - 0.357142857) * x0 + 0.357142857 * batch["context_eps"][:, 6:9]
    torch.testing.assert_close(own["context"][:, 6:9], shown, atol=1e-4, rtol=0)
    for state, target, t in (("x_t", "target", "t"), ("context", "context_target", "context_t")):
        real = own[state] - own[target] * (own[t] / 1000)[:, :, None, None, None]
        torch.testing.assert_close(real, batch["x0"], atol=1e-4, rtol=0)


def test_without_self_rollout_it_is_flow_matching(tiny_assets):
    made = few_steps(tiny_assets)
    batch = made.batch(0, 0)
    same = ("context", "context_t", "context_mask", "t", "loss_mask", "text")
    plain = {name: batch[name] for name in same} | {"x_t": batch["x_previous"]}
    noise = (batch["x_previous"] - batch["x0"]) / (batch["t"] / 1000)[:, :, None, None, None] + batch["x0"]
    context_noise = (batch["context"] - batch["x0"]) / 0.357142857 + batch["x0"]
    with torch.no_grad():
        ours = made.loss(**batch)
        theirs = TeacherForcing.loss(
            made, **plain, target=noise - batch["x0"], context_target=context_noise - batch["x0"]
        )
    torch.testing.assert_close(ours["loss"], theirs["loss"])


def test_first_chunks_from_trajectories(tiny_assets):
    """Independent: Euler steps written out, and timesteps at which they must pass."""
    flow = {"first_chunk_trajectories": 5, "first_chunk_clips": 9, "ode_interval": 250.0, "guidance": 0.5}
    made = few_steps(tiny_assets, **flow, first_chunk_share=0.7)
    row = made.schedule.timesteps(0)
    x = made._noise(made.states[:, 0].float(), generator(made.config.seed, "first chunk trajectories", 0))
    assert made.states.shape == (5, 5, 3, 16, 4, 6) and torch.equal(made.states[:, 0], x.half())
    times = sorted({*row, *shift_time(torch.tensor([1000.0, 750, 500, 250]), 5.0).tolist()}, reverse=True)
    text = made.first_chunks.text[:5]
    for t, t_next in zip(times, [*times[1:], 0.0], strict=True):
        with torch.no_grad():
            none = made.bank.null.expand(5, -1, -1)
            given, null = (made.module(x, torch.full((5, 3), t), said) for said in (text, none))
        x = x + (1.5 * given - 0.5 * null) * (t_next - t) / 1000
    torch.testing.assert_close(made.states[:, -1].float(), x, atol=5e-3, rtol=0)
    plans = [made.plan(step) for step in range(20)]
    first, whole = made.batch(plans.index(FIRST), 0), made.batch(plans.index(WHOLE), 0)
    end = first["x_t"] - first["target"] * (first["t"] / 1000)[:, :, None, None, None]
    assert all(any(torch.allclose(e, s.float(), atol=1e-4) for s in made.states[:, -1]) for e in end)
    assert not whole["loss_mask"][:, :3].any() and whole["loss_mask"][:, 3:].all()
    for kind in (FIRST, WHOLE):
        assert made.update(plans.index(kind))["gradient_norm"] > 0


def test_trajectories_are_integrated_under_autocast():
    """dx/dsigma = x from sigma 1 to 0 in two steps: x (1 - 1/2)^2."""
    grid, kept = [1000.0, 500.0, 0.0], [1000.0, 0.0]
    with torch.autocast("cpu", torch.bfloat16):
        states = integrate(lambda x, t, t_next: euler_v(x, x, t, t_next), torch.full((2, 3), 4.0), grid, kept)
    assert states[:, :, 0].tolist() == [[4.0, 1.0]] * 2
