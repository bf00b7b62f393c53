"""What can go wrong in a run of several processes, done on purpose: two ranks, everything sharded.

`bash scripts/failure_drills.sh` runs these by themselves and shows what each rank said; with --gpu on GPUs.
"""

import re
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_case import latest
from conftest import SEVERAL_RANKS
from distill_case import distill_config
from ranks_case import GPUS, Event, run_ranks

from trainer.checkpoint import save as checkpoint
from utils.logs import read_jsonl

pytestmark = [SEVERAL_RANKS, pytest.mark.slow]
STEPS = 4
# eps of the order of the gradients: Adam's first steps else only look at their signs, and those of zeros are noise
SETTINGS = (
    "training.global_batch=4", "training.micro_batch=1", f"training.steps={STEPS}", "training.checkpoint_every=2",
    "video.num_latent_frames=6", "training.optimizer.eps=1e-3", "training.distill.critic_optimizer.eps=1e-3",
    f"training.timeout_s={40 if GPUS else 300}",
)  # fmt: skip
SHARDED = (*SETTINGS, "training.sharding=full")
# of what is compared with one process: a GPU adds up in no fixed order, nor in that of another number of ranks
WEIGHTS, LOGGED = ((1e-3, 1e-4), (1e-2, 1e-5)) if GPUS else ((1e-6, 1e-6), (1e-4, 1e-6))


@pytest.fixture(scope="module")
def alone(tiny_assets, tmp_path_factory):
    """One process, nothing sharded, nothing wrong."""
    out = tmp_path_factory.mktemp("alone")
    distill_config(tiny_assets)  # makes the teacher
    (outcome,) = run_ranks(tiny_assets, out, 1, *SETTINGS)
    assert outcome.ended == "done", outcome
    return out


@pytest.fixture(scope="module")
def stopped(tiny_assets, alone, tmp_path_factory):
    """Two ranks, of which one is asked to stop in the middle of step 3, after the generator's half of it."""
    out = tmp_path_factory.mktemp("stopped")
    outcomes = run_ranks(tiny_assets, out, 2, *SHARDED, event=Event("term", step=3, rank=1))
    return out, outcomes


def state(out: Path) -> dict[str, torch.Tensor]:
    """Weights, averages and optimisers' moments by name."""
    found, manifest = latest(out, "distill")
    assert manifest["step"] == STEPS
    flat = {}
    for name in ("generator", "critic"):
        for part in ("module", "average"):
            flat |= {f"{name}.{part}.{k}": v for k, v in found[name].get(part, {}).items()}
    return flat


def rows(out: Path) -> torch.Tensor:
    found = [row for row in read_jsonl(out / "metrics.jsonl") if "critic_loss" in row]
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    names = sorted(found[0].keys() - {"seconds_per_step", "time"})
    return torch.tensor([[row[name] for name in names] for row in found])


def assert_same(out: Path, alone: Path) -> None:
    ours, theirs = state(out), state(alone)
    assert ours.keys() == theirs.keys()
    rtol, atol = WEIGHTS
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    a, b = rows(out), rows(alone)
    print(f"\nlogged values differ by {float(((a - b).abs() / b.abs().clamp_min(1e-6)).max()):.1e} at most")
    torch.testing.assert_close(a, b, rtol=LOGGED[0], atol=LOGGED[1])


def finish(assets: Path, out: Path, alone: Path, ranks: int = 2, *overrides: str) -> None:
    """The same command again."""
    outcomes = run_ranks(assets, out, ranks, *SHARDED, *overrides)
    assert [o.ended for o in outcomes] == ["done"] * ranks, outcomes
    assert_same(out, alone)


def test_sigterm_in_the_middle_of_a_step(stopped, tiny_assets, alone, tmp_path):
    out, outcomes = stopped
    assert [o.ended for o in outcomes] == ["stopped"] * 2 and all(o.exit_code == 0 for o in outcomes), outcomes
    found, manifest = latest(out, "distill")
    assert manifest["step"] == 3 and int(found["stage"]["generator_done"]) == 3
    copy = shutil.copytree(out, tmp_path / "copy")
    finish(tiny_assets, copy, alone)


def test_from_four_ranks_to_two_to_one_to_two(tiny_assets, alone, tmp_path):
    """Four ranks as two groups of two; what changes is where sums are cut, in the last digit."""
    hybrid = (*SETTINGS, "training.sharding=hybrid", "training.shard_ranks=2")
    for world, step, settings in ((4, 1, hybrid), (2, 2, SHARDED), (1, 3, SETTINGS))[GPUS == 2 :]:
        outcomes = run_ranks(tiny_assets, tmp_path, world, *settings, event=Event("term", step=step, rank=0))
        assert [o.ended for o in outcomes] == ["stopped"] * world, outcomes
        sharded = (checkpoint.folders(tmp_path)[-1] / "shards").exists()
        assert sharded == (world > 1)
    finish(tiny_assets, tmp_path, alone)


def test_a_killed_rank_ends_the_run_which_resumes(tiny_assets, alone, tmp_path):
    outcomes = run_ranks(tiny_assets, tmp_path, 2, *SHARDED, event=Event("kill", step=2, rank=1))
    assert outcomes[1].exit_code == -9
    assert outcomes[0].ended == "LostRank" and "rank 0 has lost rank 1" in outcomes[0].said, outcomes
    assert "start the same command again" in outcomes[0].said, outcomes
    assert outcomes[0].exit_code != 0
    finish(tiny_assets, tmp_path, alone)


@pytest.mark.skipif(not GPUS, reason="takes long, and CPUs notice it in the same way")
@pytest.mark.parametrize("what", ["kill", "hang"])
def test_a_rank_that_is_gone_or_silent_under_torchrun(tiny_assets, alone, tmp_path, what):
    """The rest end with a sentence, at once or in what `training.timeout_s` says, and torchrun with them."""
    quick = (*SHARDED, "training.timeout_s=20")
    (outcome,) = run_ranks(tiny_assets, tmp_path, 2, *quick, event=Event(what, step=2, rank=1), torchrun=True)
    (sentence,) = re.findall("error: rank 0 has lost rank 1 .* start the same command again.*", outcome.said)
    print(sentence, flush=True)
    assert outcome.exit_code != 0
    finish(tiny_assets, tmp_path, alone)


def test_nan_on_one_rank_stops_all_and_keeps_what_they_were_given(tiny_assets, tmp_path):
    settings = (*SHARDED, "training.log_every=100")  # nobody looks at step 3
    outcomes = run_ranks(tiny_assets, tmp_path, 2, *settings, event=Event("nan", step=2, rank=1))
    assert [o.ended for o in outcomes] == ["NonFiniteLoss"] * 2, outcomes
    assert all("critic_grad_norm not finite at step 3" in o.said for o in outcomes), outcomes
    for rank in range(2):
        kept = torch.load(tmp_path / f"not_finite_rank{rank}.pt", weights_only=True)
        assert kept["step"] == 3 and len(kept["critic"]["batches"]) == 2
    assert latest(tmp_path, "distill")[1]["step"] == 2


def test_a_full_disk_leaves_the_last_checkpoint(tiny_assets, alone, tmp_path):
    outcomes = run_ranks(tiny_assets, tmp_path, 2, *SHARDED, event=Event("full disk", step=2, rank=1))
    assert [o.ended for o in outcomes] == ["SaveFailed"] * 2, outcomes
    assert all("checkpoint_000002 is intact" in o.said and "make room" in o.said for o in outcomes), outcomes
    assert not list(tmp_path.glob(".partial-*"))
    finish(tiny_assets, tmp_path, alone)


def test_a_corrupted_newest_checkpoint_falls_back(stopped, tiny_assets, alone, tmp_path):
    out = shutil.copytree(stopped[0], tmp_path / "copy")
    newest = checkpoint.folders(out)[-1]
    shard = max((newest / "shards").glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert checkpoint.newest(out, "distill")[0] == checkpoint.folders(out)[-2]
    finish(tiny_assets, out, alone)
