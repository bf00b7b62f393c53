"""AdamW without a first moment against torch's own."""

import copy

import pytest
import torch
from distill_case import distill_stage
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from configs.optimizer_schema import OptimizerConfig
from configs.train_schema import TrainingConfig
from model.memory import trained_bytes
from model.weights.sharded_files import sharded_shapes
from trainer.checkpoint import sharded as sharded_checkpoint
from trainer.optim.adam import AdamWWithoutMomentum, adamw_class
from trainer.optim.train_state import TrainState
from trainer.parallel.apply import load_optimizer_state, optimizer_state
from trainer.parallel.control_group import ControlGroup

OPTIMIZER_SETTINGS = {"lr": 1e-2, "betas": (0.0, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))


def gradients(model: nn.Module, step: int) -> None:
    """Of a loss that only some parameters have a part in at step 1."""
    rng = torch.Generator().manual_seed(step)
    for i, p in enumerate(model.parameters()):
        p.grad = None if step == 1 and i == 2 else torch.randn(p.shape, generator=rng)


class Moments(TorchDispatchMode):
    """Counts tensors made in the shape of others."""

    tensors = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.tensors += func is torch.ops.aten.zeros_like.default
        return func(*args, **(kwargs or {}))


def run(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range) -> list[torch.Tensor]:
    for step in steps:
        gradients(model, step)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("how", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_bit_for_bit_torchs_adamw(how):
    ours, theirs = network(), network()
    steps = range(6)
    moved = run(AdamWWithoutMomentum(ours.parameters(), **how, **OPTIMIZER_SETTINGS), ours, steps)
    expected = run(torch.optim.AdamW(theirs.parameters(), **how, **OPTIMIZER_SETTINGS), theirs, steps)
    assert all(torch.equal(a, b) for a, b in zip(moved, expected, strict=True))


def test_gradients_are_left_alone_and_no_moment_is_kept():
    model = network()
    optimizer = AdamWWithoutMomentum(model.parameters(), **OPTIMIZER_SETTINGS)
    for step in range(3):
        gradients(model, step)
        before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        with Moments() as made:
            optimizer.step()
        assert made.tensors == (len(before) if step == 0 else 0), "the second moment, and no first one for a while"
        for p, grad in zip(model.parameters(), before, strict=True):
            assert (p.grad is None and grad is None) or torch.equal(p.grad, grad)
        assert all(set(state) == {"step", "exp_avg_sq"} for state in optimizer.state.values())


def test_goes_on_from_its_state_and_from_one_with_a_moment():
    model = network()
    whole = run(AdamWWithoutMomentum(model.parameters(), **OPTIMIZER_SETTINGS), model, range(6))
    for kind in (AdamWWithoutMomentum, torch.optim.AdamW):
        model = network()
        before = kind(model.parameters(), **OPTIMIZER_SETTINGS)
        run(before, model, range(3))
        state = copy.deepcopy(before.state_dict())
        after = AdamWWithoutMomentum(model.parameters(), **OPTIMIZER_SETTINGS)
        load_optimizer_state(model, after, state)
        assert all(torch.equal(a, b) for a, b in zip(run(after, model, range(3, 6)), whole, strict=True))


def test_a_moment_can_be_turned_on_later():
    """betas may change where a run goes on: the moment then begins at zero."""
    model = network()
    before = AdamWWithoutMomentum(model.parameters(), **OPTIMIZER_SETTINGS)
    run(before, model, range(2))
    after = torch.optim.AdamW(model.parameters(), **OPTIMIZER_SETTINGS | {"betas": (0.9, 0.999)})
    load_optimizer_state(model, after, optimizer_state(model, before))
    assert all(not state["exp_avg"].any() for state in after.state.values())
    run(after, model, range(2, 4))


@pytest.mark.parametrize("before, after", [(0.0, 0.0), (0.0, 0.9), (0.9, 0.0), (0.9, 0.9)])
def test_in_parts_on_the_disk(tmp_path, before, after):
    """Of a run with one beta_1, read by a run with another."""
    states = []
    for beta in (before, after):
        config = TrainingConfig(optimizer=OptimizerConfig(betas=[beta, 0.99], warmup_steps=0))
        states.append(TrainState(network(), config, steps=10))
    saved, read = states
    for step in range(3):
        gradients(saved.module, step)
        saved.step(step)
    sharded_checkpoint.write(tmp_path / "shards", {"module": saved}, {}, ControlGroup())
    names = sharded_shapes(tmp_path / "shards")
    assert any(name.endswith(".exp_avg") for name in names) is bool(before)
    sharded_checkpoint.read(tmp_path / "shards", {"module": read}, ControlGroup())
    for p, q in zip(saved.parameters, read.parameters, strict=True):
        ours, theirs = saved.optimizer.state[p], read.optimizer.state[q]
        assert torch.equal(p, q) and torch.equal(ours["exp_avg_sq"], theirs["exp_avg_sq"])
        assert ("exp_avg" in theirs) is bool(after)
        if after:
            assert torch.equal(theirs["exp_avg"], ours["exp_avg"] if before else torch.zeros_like(q))
    for train_state in states[: 2 if before == after else 0]:
        gradients(train_state.module, 3)
        train_state.step(3)
    assert all(torch.equal(p, q) for p, q in zip(saved.parameters, read.parameters, strict=True))


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_the_plan_counts_what_is_there(beta):
    """model/memory.py's bytes of a trained parameter, counted."""
    config = TrainingConfig(optimizer=OptimizerConfig(betas=[beta, 0.99]))
    for averaged in (True, False):
        train_state = TrainState(network(), config, averaged=averaged)
        gradients(train_state.module, 0)
        train_state.step(0)
        entries = [entry for p in train_state.parameters for entry in train_state.optimizer.state[p].items()]
        moments = [x for name, x in entries if name != "step"]
        average = list(train_state.average.module.parameters()) if averaged else []
        there = [*train_state.parameters, *(p.grad for p in train_state.parameters), *moments, *average]
        parameters = sum(p.numel() for p in train_state.parameters)
        assert sum(x.nbytes for x in there) == trained_bytes([beta, 0.99], averaged) * parameters


def test_train_states_take_it_where_it_is_the_same(tiny_assets):
    for betas, muon, kind in (([0.0, 0.99], 0.0, "AdamWWithoutMomentum"), ([0.9, 0.99], 0.0, "AdamW"),
                              ([0.0, 0.99], 1e-3, "MuonAdamW")):  # fmt: skip
        config = TrainingConfig(optimizer=OptimizerConfig(betas=betas, muon_lr=muon))
        assert type(TrainState(network(), config).optimizer).__name__ == kind
    assert adamw_class((0.0, 0.999)) is AdamWWithoutMomentum
    stage = distill_stage(tiny_assets)
    assert all(isinstance(train_state.optimizer, AdamWWithoutMomentum) for train_state in stage.train_states.values())
