"""Tokens shared out over two ranks: outputs and gradients are those of one, and what cannot be shared is refused."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SEVERAL_RANKS
from distill_case import distill_config, distill_stage
from small_wan import build, sizes

from configs.errors import UserError
from model.memory import distill_plan
from model.sequence import SequenceGroup
from pipeline.preflight import Report, _batch
from trainer.sequence import check_tokens, data_ranks, parallelize, sequence_group
from utils.distributed import Ranks


@SEVERAL_RANKS
def test_outputs_and_gradients_are_those_of_one_rank():
    """Teacher and critic, the student's rollout through its cache, and its whole clips under a mask."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    case = str(ROOT / "tests" / "sequence_case.py")
    done = subprocess.run([sys.executable, *launch, case], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


def test_one_rank_is_left_as_it_is():
    group = sequence_group(1, Ranks(), torch.device("cpu"))
    student, score = build()
    for network in (student, score):
        before = score.blocks[0].attn1.processor
        parallelize(network, group, "network")
        assert score.blocks[0].attn1.processor is before and student.sequence is None
    x = torch.randn(1, 4, 2, 3)
    assert group.split(x) is x and group.gather(x) is x and group.to_heads(x) == (x,) and group.to_tokens(x) is x


def test_neighbours_share_samples():
    data = [data_ranks(2, Ranks(rank, 4, rank)) for rank in range(4)]
    assert [(d.rank, d.world) for d in data] == [(0, 2), (0, 2), (1, 2), (1, 2)]


def test_what_cannot_be_shared_out_is_refused():
    with pytest.raises(UserError, match=r"sequence_parallel=2 does not divide 3 ranks; start a multiple of 2"):
        data_ranks(2, Ranks(0, 3, 0))
    with pytest.raises(UserError, match=r"=8 does not divide the 12 tokens of a chunk of 48x32.*use 1, 2, 3, 4, 6 or"):
        check_tokens(8, sizes(window=3, sink=1))
    group = SequenceGroup()
    group.size = 3
    with pytest.raises(UserError, match=r"=3 does not divide the 2 attention heads of the critic; use 1 or 2"):
        parallelize(build()[1], group, "critic")


def test_other_stages_and_odd_numbers_of_ranks_are_refused(tiny_assets):
    with pytest.raises(UserError, match="training.sequence_parallel=2 does not divide 1 rank;"):
        distill_stage(tiny_assets, "training.sequence_parallel=2")
    with pytest.raises(UserError, match="training.sequence_parallel=2 is for stage distill"):
        distill_config(tiny_assets, "training.sequence_parallel=2", "training.stage=ode_regression")


def test_batches_count_samples_once(tiny_assets):
    report = Report()
    config = distill_config(tiny_assets, "training.sequence_parallel=2", "training.global_batch=4")
    _batch(report, config, 4)
    assert report.lines == [("batch", "4 = 2 a pass x 2 groups of 2 processes x 1 accumulated")]
    _batch(report, config, 3)
    assert "sequence_parallel=2 does not divide 3 processes" in report.problems[0]


def test_the_memory_plan_shares_activations_and_keys(tiny_assets):
    plans = [distill_plan(distill_config(tiny_assets, f"training.sequence_parallel={n}"), gpus=2) for n in (1, 2)]
    for whole, shared in zip(*(plan.phases for plan in plans), strict=True):
        for name in ("activations", "keys of the rollout"):
            if name in whole.parts:
                assert shared.parts[name] == pytest.approx(whole.parts[name] / 2)
