"""Random adapters for the small Wan transformers of weight_layouts.py."""

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from weight_layouts import SIZES, original

from model.weights.lora import save_lora

RANK, LINEARS = 4, ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k",
                    "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2")  # fmt: skip


def pairs(wan, seed: int = 0, rank: int = RANK) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B for every linear layer of every block, by original names, as LongLive trains them."""
    rng, state = torch.Generator().manual_seed(seed), original(wan)
    out = {}
    for i in range(SIZES["num_layers"]):
        for linear in LINEARS:
            rows, columns = state[f"blocks.{i}.{linear}.weight"].shape
            a, b = torch.randn(rank, columns, generator=rng), torch.randn(rows, rank, generator=rng)
            out[f"blocks.{i}.{linear}"] = (0.05 * a, 0.05 * b)
    return out


def longlive(values) -> dict[str, torch.Tensor]:
    out = {}
    for layer, (a, b) in values.items():
        out |= {f"base_model.model.{layer}.lora_A.weight": a, f"base_model.model.{layer}.lora_B.weight": b}
    return out


def output(model) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    x, t, text = torch.randn(1, 3, 16, 4, 6, generator=g), torch.tensor([700.0]), torch.randn(1, 5, 12, generator=g)
    with torch.no_grad():
        if type(model) is WanTransformer3DModel:
            return model(x.transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2)
        return model(x, t, text)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def visible_lora(model, path: Path, seed: int = 0) -> Path:
    """An adapter of every block's q that is large enough to be seen."""
    rng, values = torch.Generator().manual_seed(seed), {}
    for i, block in enumerate(model.blocks):
        rows, columns = block.attn1.to_q.weight.shape
        values[f"blocks.{i}.attn1.to_q.A"] = torch.randn(4, columns, generator=rng)
        values[f"blocks.{i}.attn1.to_q.B"] = torch.randn(rows, 4, generator=rng)
    save_lora(values, {name[:-2]: 4.0 for name in values}, path, {})
    return path
