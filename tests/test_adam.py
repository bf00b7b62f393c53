"""AdamW without a first moment against torch's own."""

import copy

import pytest
import torch
from distill_case import distill_stage
from torch import nn

from configs.optimizer_schema import OptimizerConfig
from configs.train_schema import TrainingConfig
from trainer.adam import AdamWWithoutMomentum, kind_of
from trainer.optim import Player
from trainer.parallel import load_optimizer_state, optimizer_state

KNOBS = {"lr": 1e-2, "betas": (0.0, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))


def gradients(model: nn.Module, step: int) -> None:
    """Of a loss that only some parameters have a part in at step 1."""
    rng = torch.Generator().manual_seed(step)
    for i, p in enumerate(model.parameters()):
        p.grad = None if step == 1 and i == 2 else torch.randn(p.shape, generator=rng)


def run(optimizer: torch.optim.Optimizer, model: nn.Module, steps: range) -> list[torch.Tensor]:
    for step in steps:
        gradients(model, step)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("foreach", [False, True])
def test_bit_for_bit_torchs_adamw(foreach):
    ours, theirs = network(), network()
    steps = range(6)
    moved = run(AdamWWithoutMomentum(ours.parameters(), foreach=foreach, **KNOBS), ours, steps)
    expected = run(torch.optim.AdamW(theirs.parameters(), foreach=foreach, **KNOBS), theirs, steps)
    assert all(torch.equal(a, b) for a, b in zip(moved, expected, strict=True))


def test_gradients_are_left_alone_and_no_moment_is_kept():
    model = network()
    optimizer = AdamWWithoutMomentum(model.parameters(), **KNOBS)
    for step in range(3):
        gradients(model, step)
        before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        optimizer.step()
        for p, grad in zip(model.parameters(), before, strict=True):
            assert (p.grad is None and grad is None) or torch.equal(p.grad, grad)
        assert all(set(state) == {"step", "exp_avg_sq"} for state in optimizer.state.values())


def test_goes_on_from_its_state_and_from_one_with_a_moment():
    model = network()
    whole = run(AdamWWithoutMomentum(model.parameters(), **KNOBS), model, range(6))
    for kind in (AdamWWithoutMomentum, torch.optim.AdamW):
        model = network()
        before = kind(model.parameters(), **KNOBS)
        run(before, model, range(3))
        state = copy.deepcopy(before.state_dict())
        after = AdamWWithoutMomentum(model.parameters(), **KNOBS)
        load_optimizer_state(model, after, state)
        assert all(torch.equal(a, b) for a, b in zip(run(after, model, range(3, 6)), whole, strict=True))


def test_a_moment_can_be_turned_on_later():
    """betas may change where a run goes on: the moment then begins at zero."""
    model = network()
    before = AdamWWithoutMomentum(model.parameters(), **KNOBS)
    run(before, model, range(2))
    after = torch.optim.AdamW(model.parameters(), **KNOBS | {"betas": (0.9, 0.999)})
    load_optimizer_state(model, after, optimizer_state(model, before))
    assert all(not state["exp_avg"].any() for state in after.state.values())
    run(after, model, range(2, 4))


def test_players_take_it_where_it_is_the_same(tiny_assets):
    for betas, muon, kind in (([0.0, 0.99], 0.0, "AdamWWithoutMomentum"), ([0.9, 0.99], 0.0, "AdamW"),
                              ([0.0, 0.99], 1e-3, "MuonAdamW")):  # fmt: skip
        config = TrainingConfig(optimizer=OptimizerConfig(betas=betas, muon_lr=muon))
        assert type(Player(network(), config).optimizer).__name__ == kind
    assert kind_of((0.0, 0.999)) is AdamWWithoutMomentum
    stage = distill_stage(tiny_assets)
    assert all(isinstance(player.optimizer, AdamWWithoutMomentum) for player in stage.players.values())
