"""Pre-training and teacher forcing: steps on whole clips and on first chunks."""

import json

import pytest
import torch
from distill_case import CPU, distill_config
from torch.nn import functional as F

from configs.load import load_config
from model.causal_wan import CausalWanModel
from trainer.causal_ode import CausalODE
from trainer.flow_stages import FIRST, WHOLE, Pretrain, TeacherForcing
from utils.distributed import Ranks


def flow_config(assets, stage: str, **flow):
    flow = {"first_chunk_share": 0.0, "first_chunk_batch": 5, "context_timesteps": [0.0, 357.142857]} | flow
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
def test_both_kinds_of_steps_come_up_and_learn(tiny_assets, kind, stage):
    made = kind(flow_config(tiny_assets, stage, first_chunk_share=0.5), CPU, Ranks())
    plans = [made.plan(step) for step in range(200)]
    assert 80 < plans.count(FIRST) < 120 and set(plans) == {FIRST, WHOLE}
    first, whole = plans.index(FIRST), plans.index(WHOLE)
    shown = "x_t" if stage == "teacher_forcing" else "x0"
    assert made.batch(first, 0)[shown].shape[:2] == (5, 3) and made.batch(whole, 0)[shown].shape[:2] == (2, 12)
    for step in (first, whole):
        logs = made.update(step)
        assert logs["loss"] > 0 and logs["gradient_norm"] > 0


def test_a_first_chunk_alone_is_what_it_is_in_a_clip(tiny_assets):
    made = TeacherForcing(flow_config(tiny_assets, "teacher_forcing"), CPU, Ranks())
    batch = made.batch(0, 0)
    keep = {name: batch[name] for name in ("past", "past_t", "x_t", "t", "text")}
    with torch.no_grad():
        whole = made._both(made.module, **keep)[1][:, :3]
        alone = {name: value[:, :3] if name in ("x_t", "t") else value[:, :0] for name, value in keep.items()}
        first = made._both(made.module, **(alone | {"text": keep["text"]}))[1]
    torch.testing.assert_close(first, whole, atol=1e-5, rtol=0)


def test_a_noisy_past_is_graded_and_a_clean_one_is_not(tiny_assets):
    """Independent: the loss put together from the network's output, clip by clip."""
    made = TeacherForcing(flow_config(tiny_assets, "teacher_forcing", past_weight=2.0), CPU, Ranks())
    batch = made.batch(0, 0)
    batch["past_t"] = torch.tensor([0.0, 357.0])[:, None].expand(-1, 12).contiguous()
    batch["counts"] = torch.ones_like(batch["t"])
    with torch.no_grad():
        logs = made.loss(**batch)
        sequence = torch.cat([batch["past"], batch["x_t"]], 1), torch.cat([batch["past_t"], batch["t"]], 1)
        v = CausalWanModel.forward(made.module, *sequence, batch["text"], mask=made.mask, frame_ids=made.frame_ids)
    torch.testing.assert_close(logs["past_loss"], F.mse_loss(v[1, :12], batch["past_target"][1]))
    torch.testing.assert_close(logs["loss"], F.mse_loss(v[:, 12:], batch["target"]) + 2 * logs["past_loss"])


def test_a_given_first_frame_is_shown_as_the_context_shows_it_and_not_graded(tiny_assets):
    made = TeacherForcing(flow_config(tiny_assets, "teacher_forcing", context_timesteps=[0.0]), CPU, Ranks())
    x0, text = made._clips(0, 0)
    for share in (0.0, 1.0):
        object.__setattr__(made.config.training, "image_start", share)
        batch = made.batch(0, 0)
        assert torch.equal(batch["x_t"][:, 0], x0[:, 0]) == (share == 1)
        assert (batch["t"][:, 0] == 0).all() == (share == 1) and (batch["t"][:, 1:] > 0).all()
        assert (batch["counts"][:, 0] == 1 - share).all() and (batch["counts"][:, 1:] == 1).all()
        before = made.loss(**batch)["chunk_loss"]
        batch["target"] = batch["target"].clone()
        batch["target"][:, 0] += 1
        assert torch.equal(made.loss(**batch)["chunk_loss"], before) == (share == 1)


def test_timesteps_of_the_schedule(tiny_assets):
    made = TeacherForcing(flow_config(tiny_assets, "teacher_forcing", at_schedule=True), CPU, Ranks())
    t = torch.cat([made.batch(step, 0)["t"] for step in range(40)]).view(-1, 4, 3)
    assert (t == t[:, :, :1]).all()
    for chunk in range(4):
        assert sorted(set(t[:, chunk, 0].tolist()), reverse=True) == pytest.approx(made.schedule.row(chunk))


def test_causal_ode_still_learns_from_whole_trajectories(tiny_assets):
    config = flow_config(tiny_assets, "causal_ode", ode_clips=4, ode_interval=500.0)
    made = CausalODE(config, CPU, Ranks())
    assert made.plan(0) == WHOLE and made.update(0)["loss"] > 0
