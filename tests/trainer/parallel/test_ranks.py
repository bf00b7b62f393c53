"""Ranks over gloo do what one rank does with the same global batch: data parallel, sharded, sequence parallel."""

from pathlib import Path

import pytest
import torch
from checkpoint_case import latest
from conftest import SEVERAL_RANKS
from distill_case import distill_config
from ranks_case import run_ranks

from utils.logs import read_jsonl

pytestmark = [SEVERAL_RANKS, pytest.mark.slow]
STEPS = 4  # the generator is updated before the first and the last
FAST = "training.distill.fast_rollout=true"
BATCH = ["training.global_batch=4", "training.micro_batch=2", f"training.steps={STEPS}"]
BATCH += ["video.num_latent_frames=9", "stream.window_frames=6"]  # the third chunk does not see the second


def start(assets: Path, out: Path, ranks: int, *overrides: str) -> None:
    outcomes = run_ranks(assets, out, ranks, *BATCH, *overrides)
    assert [o.ended for o in outcomes] == ["done"] * ranks, outcomes


def weights(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    state, manifest = latest(out, "distill")
    assert manifest["step"] == STEPS
    return {name: state[name]["module"] for name in ("generator", "critic")} | {"ema": state["generator"]["average"]}


def losses(out: Path) -> list[list[float]]:
    rows = [row for row in read_jsonl(out / "metrics.jsonl") if "critic_loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [[row[name] for name in ("generator_loss", "critic_loss", "generator_grad_norm")] for row in rows]


@pytest.fixture(scope="module")
def alone(tiny_assets, tmp_path_factory):
    """One process that accumulates two micro-batches."""
    out = tmp_path_factory.mktemp("alone")
    distill_config(tiny_assets)  # makes the teacher
    start(tiny_assets, out, 1)
    return out


def assert_same(alone: Path, out: Path) -> None:
    torch.testing.assert_close(torch.tensor(losses(out)), torch.tensor(losses(alone)), rtol=1e-4, atol=1e-6)
    ours, theirs = weights(out), weights(alone)
    for role in theirs:
        assert ours[role].keys() == theirs[role].keys()
        for name, value in theirs[role].items():
            torch.testing.assert_close(ours[role][name], value, rtol=1e-3, atol=2e-5, msg=f"{role} {name}")


@pytest.mark.parametrize("sharding, more", [("none", ()), ("full", ()), ("full", (FAST,))])
def test_two_ranks_are_one_with_twice_the_batches(tiny_assets, alone, tmp_path, sharding, more):
    """And where the sharded student is gathered for its fast copy."""
    start(tiny_assets, tmp_path, 2, f"training.sharding={sharding}", *more)
    assert_same(alone, tmp_path)


LOOKS = ("training.validation_clips=2", "training.distill.video_clips=1")


SHARED = "training.sequence_student=shared"


@pytest.mark.parametrize("ranks, sharding, looks", [
    (2, "none", LOOKS), (2, "full", (SHARED,)), (4, "full", ()), (4, "full", (SHARED, FAST)),
])  # fmt: skip
def test_ranks_that_share_samples_are_one(tiny_assets, alone, tmp_path, ranks, sharding, looks):
    """Two share each sample's tokens; of four, the others see other samples. The first one also validates. Where each
    has the student whole, or its fast copy, they make the critic's rollouts in turns: of two the micro-batches of a
    step, of four the steps."""
    more = ["training.sequence_parallel=2", f"training.sharding={sharding}", "training.checkpointing=true", *looks]
    start(tiny_assets, tmp_path, ranks, *more)
    assert_same(alone, tmp_path)
    assert (tmp_path / "export" / "config.json").exists()


def test_ranks_that_share_samples_begin_with_images_too(tiny_assets, tmp_path):
    """Which the whole student makes, and with the student changed before each update of the critic, so that the first
    rank makes all of its rollouts and the other one gathers alone; also beside the fast copy."""
    image = ("training.image_start=1", "training.global_batch=2", "training.distill.dfake_gen_update_ratio=1")
    start(tiny_assets, tmp_path / "one", 1, *image)
    for name, more in (("two", ()), ("fast", (FAST,))):
        shared = ("training.sequence_parallel=2", "training.sharding=full", *more)
        start(tiny_assets, tmp_path / name, 2, *image, *shared)
        assert_same(tmp_path / "one", tmp_path / name)


def test_ranks_that_share_samples_encode_together(tiny_assets, alone, tmp_path):
    """Prompts in each update, by a text encoder that is sharded: rollouts are not made in turns."""
    more = ("training.sequence_parallel=2", "training.sharding=full", "training.distill.encode_ahead=false")
    start(tiny_assets, tmp_path, 2, *more)
    assert_same(alone, tmp_path)
