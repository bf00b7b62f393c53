"""The optimiser that moves hidden matrices by Muon and the rest by AdamW."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLWan
from small_wan import build
from torch import nn

from configs.errors import UserError
from configs.optimizer_schema import OptimizerConfig
from configs.train_schema import TrainingConfig
from trainer.optim.muon import MuonAdamW, hidden_matrices, parameter_groups
from trainer.optim.train_state import TrainState

OPTIMIZER = OptimizerConfig(lr=1e-2, muon_lr=3e-2, weight_decay=0.1)


def optimiser(module: nn.Module) -> MuonAdamW:
    o = OPTIMIZER
    made = MuonAdamW(parameter_groups(module, o), lr=o.lr, betas=(0.9, 0.99), weight_decay=o.weight_decay)
    for group in made.param_groups:
        group["lr"] = OPTIMIZER.lr * group.get("lr_share", 1.0)
    return made


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 4, (3, 3, 3)), nn.Flatten(), nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6))


def step(module: nn.Module, *optimisers: torch.optim.Optimizer) -> None:
    module.zero_grad()
    module(torch.linspace(-1, 1, 3 * 54).view(3, 2, 3, 3, 3).sin()).square().sum().backward()
    for each in optimisers:
        each.step()


def test_equals_torch_on_matrices_and_adamw_elsewhere():
    """Independent: torch.optim.Muon on a matrix of its own, torch.optim.AdamW on the biases."""
    ours, theirs = small(), small()
    kernel = nn.Parameter(theirs[0].weight.detach().reshape(4, -1))
    linears = range(2, 5)  # two of them of one shape
    matrices, biases = [kernel, *(theirs[i].weight for i in linears)], [theirs[i].bias for i in (0, *linears)]
    muon = torch.optim.Muon(matrices, lr=3e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(biases, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    mine = optimiser(ours)
    for _ in range(4):
        step(ours, mine)
        theirs.zero_grad()
        theirs[0].weight.data.copy_(kernel.detach().view_as(theirs[0].weight))
        theirs(torch.linspace(-1, 1, 3 * 54).view(3, 2, 3, 3, 3).sin()).square().sum().backward()
        kernel.grad = theirs[0].weight.grad.flatten(1)
        muon.step()
        adamw.step()
    torch.testing.assert_close(ours[0].weight.flatten(1), kernel)
    for i in linears:
        torch.testing.assert_close(ours[i].weight, theirs[i].weight)
        torch.testing.assert_close(ours[i].bias, theirs[i].bias)


def test_state_is_kept():
    whole, first = small(), small()
    optimiser_of_whole, optimiser_of_first = optimiser(whole), optimiser(first)
    for _ in range(4):
        step(whole, optimiser_of_whole)
    for _ in range(2):
        step(first, optimiser_of_first)
    again = copy.deepcopy(first)
    resumed = optimiser(again)
    resumed.load_state_dict(optimiser_of_first.state_dict())
    for _ in range(2):
        step(again, resumed)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def names_of(module: nn.Module) -> set[str]:
    hidden = {id(p) for p in hidden_matrices(module)}
    return {name for name, p in module.named_parameters() if id(p) in hidden}


def test_first_and_last_layers_stay_with_adamw():
    chosen = names_of(build()[0])
    assert "blocks.0.attn1.to_q.weight" in chosen and "blocks.0.ffn.net.2.weight" in chosen
    assert all(name.startswith("blocks.") and name.endswith("weight") for name in chosen)
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True])
    chosen = names_of(vae)
    assert "decoder.mid_block.resnets.0.conv1.weight" in chosen and "quant_conv.weight" in chosen
    assert not any("conv_in" in name or "conv_out" in name or "gamma" in name for name in chosen)


def test_sharded_matrices_are_refused():
    with pytest.raises(UserError, match="training.sharding=full.*muon_lr"):
        TrainingConfig(stage="distill", sharding="full", optimizer=OPTIMIZER)


@pytest.mark.parametrize("before, after", [(0.0, 0.02), (0.02, 0.0)])
def test_states_with_and_without_muon_are_not_taken_for_each_other(before, after):
    """Moments are stored by the index of their parameter, and Muon puts parameters in another order."""
    torch.manual_seed(0)
    states = [
        TrainState(build()[0], TrainingConfig(optimizer=OptimizerConfig(lr=1e-3, muon_lr=muon_lr)), averaged=False)
        for muon_lr in (before, after, before and 0.5 * before)
    ]
    for parameter in states[0].parameters:
        parameter.grad = torch.ones_like(parameter)
    states[0].step(0)
    with pytest.raises(UserError, match="muon_lr was switched on or off"):
        states[1].load_state_dict(states[0].state_dict())
    states[2].load_state_dict(states[0].state_dict())  # another rate is no other order
