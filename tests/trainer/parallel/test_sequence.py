"""Tokens shared out over two ranks: outputs and gradients are those of one, and what cannot be shared is refused."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import sequence_case
import torch
from conftest import SEVERAL_RANKS
from distill_case import CPU, distill_config, distill_stage
from ranks_case import on_ranks
from small_wan import build, sizes

from configs.distill_schema import DistillConfig
from configs.errors import UserError
from configs.train_schema import TrainingConfig
from model.memory import distill_plan
from model.sequence import SequenceGroup
from pipeline.preflight import Report, _batch
from trainer.distill.rollout_sharing import RolloutSharing, shares_rollouts
from trainer.parallel.sequence import check_tokens, data_ranks, sequence_group, share_tokens
from utils.distributed import Ranks


@SEVERAL_RANKS
def test_outputs_and_gradients_are_those_of_one_rank():
    """Teacher and critic, the student's rollout through its cache, and its whole clips under a mask."""
    outcomes = on_ranks(2, sequence_case.compare_networks)
    assert [o.ended for o in outcomes] == ["done"] * 2, outcomes


def test_one_rank_is_left_as_it_is():
    group = sequence_group(1, Ranks(), torch.device("cpu"))
    student, score = build()
    for network in (student, score):
        before = score.blocks[0].attn1.processor
        share_tokens(network, group, "network")
        assert score.blocks[0].attn1.processor is before and student.sequence is None
    x = torch.randn(1, 4, 2, 3)
    assert group.split(x) is x and group.gather(x) is x and group.to_heads(x) == (x,) and group.to_tokens(x) is x


def test_neighbours_share_samples():
    data = [data_ranks(2, Ranks(rank, 4, rank)) for rank in range(4)]
    assert [(d.rank, d.world) for d in data] == [(0, 2), (0, 2), (1, 2), (1, 2)]


def test_what_cannot_be_shared_out_is_refused():
    with pytest.raises(UserError, match=r"sequence_parallel=2 does not divide 3 ranks; start a multiple of 2"):
        data_ranks(2, Ranks(0, 3, 0))
    eight = TrainingConfig(stage="distill", sequence_parallel=8)
    with pytest.raises(UserError, match=r"=8 does not divide the 36 tokens of a clip of 6 latent.*use 1, 2, 3, 4, 6"):
        check_tokens(eight, sizes(window=3, sink=1), 6)
    check_tokens(eight, sizes(window=3, sink=1), 12)
    with pytest.raises(UserError, match=r"=8 does not divide the 12 tokens of a chunk of 2 latent.*use 1, 2, 3, 4"):
        check_tokens(replace(eight, sequence_student="shared"), sizes(window=3, sink=1), 12)
    group = SequenceGroup()
    group.size = 3
    with pytest.raises(UserError, match=r"=3 does not divide the 2 attention heads of the critic; use 1 or 2"):
        share_tokens(build()[1], group, "critic")


def test_other_stages_and_odd_numbers_of_ranks_are_refused(tiny_assets):
    with pytest.raises(UserError, match="training.sequence_parallel=2 does not divide 1 rank;"):
        distill_stage(tiny_assets, "training.sequence_parallel=2")
    with pytest.raises(UserError, match="training.sequence_parallel=2 is for stage distill"):
        distill_config(tiny_assets, "training.sequence_parallel=2", "training.stage=ode_regression")


def test_batches_count_samples_once(tiny_assets):
    report = Report()
    config = distill_config(tiny_assets, "training.sequence_parallel=2", "training.global_batch=4")
    _batch(report, config, 4)
    assert report.lines == [("batch", "4 = 2 a pass x 2 groups of 2 ranks x 1 accumulated")]
    _batch(report, config, 3)
    assert "sequence_parallel=2 does not divide 3 ranks" in report.problems[0]


def test_the_memory_plan_shares_activations_and_keys(tiny_assets):
    two = "training.sequence_parallel=2"
    cases = ((), (two,), (two, "training.sequence_student=shared"))
    plans = [distill_plan(distill_config(tiny_assets, *case), gpus=2) for case in cases]
    for alone, whole, shared in zip(*(plan.phases for plan in plans), strict=True):
        for name in {"activations", "keys of the rollout"} & alone.parts.keys():
            assert shared.parts[name] == pytest.approx(alone.parts[name] / 2)
            of_student = name == "keys of the rollout" or alone.name == "rollout"
            assert whole.parts[name] == (alone if of_student else shared).parts[name]


class Threads(SequenceGroup):
    """Rank `rank` of `size` threads."""

    def __init__(self, rank: int, size: int, slot: list[torch.Tensor], barrier: threading.Barrier):
        super().__init__()
        self.rank, self.size, self.slot, self.barrier = rank, size, slot, barrier

    def broadcast(self, x, source=0):
        if self.rank == source:
            self.slot[0] = x
        self.barrier.wait(300)
        x = self.slot[0]
        self.barrier.wait(300)
        return x


@pytest.mark.parametrize("size, micro_batches", [(2, 1), (3, 2), (4, 3), (3, 7)])
def test_turns_make_each_sample_once_and_none_of_another_student(size, micro_batches):
    """With updates of the generator before steps 1 and 6, an end at 11, and resumed at step 4."""
    settings, steps = DistillConfig(dfake_gen_update_ratio=5, critic_warmup=1), 11
    made, makers, slot, barrier = [], {}, [torch.empty(1)], threading.Barrier(size)

    def rank(number: int, first: int, last: int) -> None:
        rollout_sharing = RolloutSharing(Threads(number, size, slot, barrier), micro_batches, (1,), torch.device("cpu"))

        def make(step: int, micro: int) -> torch.Tensor:
            made.append((now, number, (step, micro)))
            return torch.tensor([100.0 * step + micro])

        for now in range(first, last):
            rollout_sharing.begin(now, *settings.same_student(now, steps))
            taken = [float(rollout_sharing.take(make)) for _ in range(micro_batches)]
            assert taken == [100.0 * now + micro for micro in range(micro_batches)]

    for first, last in ((0, 11), (4, 11)):
        made.clear()
        with ThreadPoolExecutor(size) as pool:
            list(pool.map(rank, range(size), [first] * size, [last] * size))
        assert sorted(place for *_, place in made) == [(s, i) for s in range(first, last) for i in range(micro_batches)]
        student = [settings.generator_updates(step + 1) for step in range(steps)]
        assert all(student[now] == student[step] for now, _, (step, _) in made), "made by the student of its own step"
        assert all(makers.setdefault(place, number) == number for _, number, place in made), "resumed as it was"
        shares = Counter(number for _, number, (step, _) in made if 1 <= step < 6)
        assert first or max(shares.values()) == -(-5 * micro_batches // size)


@pytest.mark.parametrize("more", [(), ("training.distill.fast_rollout=true",)], ids=["whole", "fast"])
def test_a_rank_that_makes_none_gathers_all_the_same(tiny_assets, monkeypatch, more):
    """The second of two ranks, in a step behind which the student changes: it makes no rollout, and the first one would
    wait for its part of the student for ever."""
    stage = distill_stage(tiny_assets, *more, "training.distill.dfake_gen_update_ratio=1")
    gathered, group = [], Threads(1, 2, [torch.zeros(2, 12, 16, 4, 6)], threading.Barrier(1))
    handed = []
    monkeypatch.setattr(group, "broadcast", lambda x, owner: handed.append(len(gathered)) or torch.zeros_like(x))
    monkeypatch.setattr("trainer.distill.stage.unshard", gathered.append)
    monkeypatch.setattr("trainer.distill.fast_rollout.unshard", gathered.append)
    monkeypatch.setattr(stage, "_sample", lambda *_, grad, **__: pytest.fail("it made one") if not grad else None)
    monkeypatch.setattr(stage, "_generator_step", lambda step, count: {})
    stage.rollout_sharing = RolloutSharing(group, 1, (2, 12, 16, 4, 6), CPU)
    for step in range(2):
        if stage.fast_rollout is not None:
            stage.fast_rollout.stale = True
        logs = stage.update(step)
        assert logs["critic_loss"] > 0 and gathered == [stage.student.model] * (step + 1)
    assert handed == [1, 2], "gathered before it waits for what another makes"


def test_ranks_score_what_the_first_has(tiny_assets):
    """Should their rollouts differ in rounding, teacher and critic see one; each keeps its own, which has the graph."""
    stage, other = (distill_stage(tiny_assets) for _ in range(2))
    plan, (batch,) = stage._batches("generator", 0)
    x = torch.randn(2, 12, 16, 4, 6)
    kept, theirs = x.clone(), torch.randn(2, 12, 16, 4, 6)
    stage.sequence.broadcast = lambda mine, source=0: theirs
    rest = batch["text"], batch["t"], batch["eps"]
    for ours, expected in zip(stage._scores(x, *rest), other._scores(theirs, *rest), strict=True):
        assert torch.equal(ours, expected)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(("settings", "wanted"), [
    ((), False), (("training.sequence_parallel=2",), True),
    (("training.sequence_parallel=2", "training.distill.encode_ahead=false"), False),
    (("training.sequence_parallel=2", "training.sequence_student=shared"), False),
    (("training.sequence_parallel=2", "training.sequence_student=shared", "training.distill.fast_rollout=true"), True),
])  # fmt: skip
def test_ranks_take_turns_where_none_needs_another(tiny_assets, settings, wanted):
    assert shares_rollouts(distill_config(tiny_assets, *settings).training) is wanted
