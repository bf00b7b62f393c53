"""Every stage of the moving world's recipe does on two ranks what it does on one with the same batches."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_case import latest
from conftest import SEVERAL_RANKS
from ranks_case import group, on_ranks

from configs.load import load_config
from scripts.train_world import FILES, settings_of, shared_out, write_prompts
from trainer.checkpoint import save as checkpoint
from trainer.loop import run
from trainer.registry import build_stage
from utils.logs import read_jsonl

pytestmark = [SEVERAL_RANKS, pytest.mark.slow]
STEPS = 3
FRESH = "configs/networks/tiny_transformer.json"
SMALL = (
    *(f"model.{name}=assets/world/text_encoder" for name in ("text_encoder", "tokenizer")),
    "model.vae=assets/world/vae", "video.num_latent_frames=6", "training.bank_clips=3", "training.validation_clips=0",
    "training.precision=float32", "training.compile=false", f"training.steps={STEPS}", "training.log_every=1",
    "training.global_batch=4", "training.micro_batch=4", "training.optimizer.warmup_steps=0", "training.ema_decay=0.5",
    "training.ema_start_step=0", "training.flow.bank_cache=null", "training.flow.first_chunk_batch=4",
    "training.flow.first_chunk_share=0.5", "training.distill.critic_warmup=0",
    "training.distill.dfake_gen_update_ratio=2",
    "training.codec.clip_frames=[5]", "training.codec.stills=0.4", "training.codec.crop=32",
)  # fmt: skip
STAGES = {
    "vae": (),
    "teacher": (f"training.init.transformer={FRESH}",),
    "causal": (f"training.init.student={FRESH}", "training.image_start=0.5"),
    "diagonal": (f"training.init.student={FRESH}", f"training.init.teacher={FRESH}", "training.image_start=0.5"),
    "long": (f"training.init.student={FRESH}", f"training.init.teacher={FRESH}",
             "training.distill.long.min_frames=6", "training.distill.long.max_frames=12"),
}  # fmt: skip


def job(stage: str, out: str, settings: tuple[str, ...], until: tuple[float, ...]) -> bool:
    """One rank's part of a stage. until: when each rank stops."""
    file = f"configs/world/{FILES.get(stage, stage)}.yaml"
    with group() as ranks:
        every = [*settings_of(stage, f"{out}/networks", out), *SMALL, *STAGES[stage], *settings]
        config = load_config(file, [*every, *shared_out(file, every, ranks.world)])
        learner = build_stage(config, torch.device("cpu"), ranks)
        if stage == "vae":
            learner.export = lambda folder, step: None  # which measures latents of many clips
        return run(learner, Path(out), until=until[ranks.rank])


def trained(stage: str, out: Path, ranks: int, *settings: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The losses [steps, names] of a run, and its weights with their averages."""
    write_prompts(out / "prompts.txt", 8)
    outcomes = on_ranks(ranks, job, stage, str(out), settings, (math.inf,) * ranks)
    assert [outcome.ended for outcome in outcomes] == ["done"] * ranks, outcomes
    name = "distill" if stage in ("diagonal", "long") else f"world_{stage}"
    state, manifest = latest(out, name)
    assert manifest["step"] == STEPS
    weights = {
        f"{role} {kind} {key}": value for role in state if role != "stage" for kind in ("module", "average")
        if kind in state[role] for key, value in state[role][kind].items()
    }  # fmt: skip
    rows = [row for row in read_jsonl(out / "metrics.jsonl") if "seconds_per_step" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    names = [name for name in rows[0] if name.endswith(("loss", "norm"))]
    return torch.tensor([[row[name] for name in names] for row in rows]), weights


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_are_one_that_accumulates(stage, tmp_path):
    """And so they are after one of the checkpoints is lost."""
    one = trained(stage, tmp_path / "one", 1, "training.micro_batch=2", "training.flow.first_chunk_batch=2")
    two = trained(stage, tmp_path / "two", 2, "training.checkpoint_every=2")
    shutil.rmtree(checkpoint.folders(tmp_path / "two")[-1])
    resumed = trained(stage, tmp_path / "two", 2, "training.checkpoint_every=2")
    for losses, weights in (two, resumed):
        torch.testing.assert_close(losses, one[0], rtol=1e-4, atol=1e-6)
        assert weights.keys() == one[1].keys()
        for name, value in one[1].items():
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=2e-5, msg=name)


def test_ranks_whose_time_is_up_stop_at_one_step(tmp_path):
    """Where it is up on one of them, all save the same step, from which the run continues."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = trained("teacher", whole, 2)
    outcomes = on_ranks(2, job, "teacher", str(stopped), (), (math.inf, 0.0))
    assert [outcome.ended for outcome in outcomes] == ["stopped"] * 2, outcomes
    assert [checkpoint.step_of(folder) for folder in checkpoint.folders(stopped)] == [1]
    losses, weights = trained("teacher", stopped, 2)
    assert torch.equal(losses, expected[0]) and all(torch.equal(weights[k], v) for k, v in expected[1].items())
