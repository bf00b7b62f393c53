"""Sharded loading: networks are built on the meta device, sharded, then filled one tensor at a time.

A rank needs memory for its own shards and for the tensor that is being read, whatever the size of the network.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import UMT5EncoderModel

from configs.schema import Config
from model.causal_wan import CausalWanModel
from model.fp8 import E4M3, quantize
from model.sizes import RANDOM
from model.text import TextEncoder
from model.weights.load import iter_tensors, load_tokenizer, stored_dtype
from model.weights.plans import WeightPlan, plan_text_encoder, plan_transformer
from model.weights.random import transformer_plan
from trainer.parallel.apply import ParallelPlan, local, parallelize, shard_of
from utils.device import pick_dtype
from utils.seeds import stable_hash


def init_plan(
    config: Config, name: str, parallel: ParallelPlan, dtype: torch.dtype = torch.float32, *, causal: bool = False
) -> WeightPlan | None:
    """What `training.init.<name>` names, if it can be read in parts and is to be.

    None if nothing is sharded, if `name` is not set, and for a config.json, which gives fresh weights.
    """
    source = config.training.init.get(name)
    if parallel.mesh is None or source is None or Path(source).suffix == ".json":
        return None
    if source.startswith(RANDOM):
        seed = stable_hash(config.seed, "random", name)
        return transformer_plan(source.removeprefix(RANDOM), parallel.device, dtype, causal=causal, seed=seed)
    cls = CausalWanModel if causal else WanTransformer3DModel
    return plan_transformer(f"training.init.{name}", source, cls, "critic" if name == "critic" else "student")


def empty(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """The network that `build` makes, in `dtype`, without weights, in evaluation mode."""
    with init_empty_weights(include_buffers=False):
        network = build()
    for name, p in network.named_parameters():
        p.data = p.data.to(stored_dtype(network, name, dtype))
    return network.eval()


def _nothing(name: str, like: Tensor) -> Tensor:
    raise ValueError(f"there are no weights for {name}")


@torch.no_grad()
def fill_parts(
    network: nn.Module, plan: WeightPlan, device: torch.device, dtype: torch.dtype,
    rest: Callable[[str, Tensor], Tensor] = _nothing,
) -> nn.Module:  # fmt: skip
    """Give a sharded network without weights its parts of what `plan` holds; to other names what `rest` makes for them.

    What the network has in float8 is rounded, by rows, before it is cut into parts.

    rest: (name, parameter) -> whole tensor, the same on all ranks. For adapters, which no plan has.
    """
    own = network.state_dict()
    adapted = {name.replace(".base_layer.", "."): name for name in own}
    state = {}
    for key, value in iter_tensors(plan, network, device, dtype):
        name = adapted[key]
        if own[name].dtype == E4M3:
            value, scale = quantize(value)
            scales = f"{name.removesuffix('weight')}scale"
            state[scales] = _parameter(scale, own[scales])
        state[name] = _parameter(value.to(own[name].dtype), own[name])
    for name in own.keys() - state.keys():
        tied = isinstance(network, UMT5EncoderModel) and name == "encoder.embed_tokens.weight"
        state[name] = state["shared.weight"] if tied else _parameter(rest(name, own[name]), own[name])
    network.load_state_dict(state, assign=True)
    return network.to(device)  # buffers, which have never been without values


@torch.no_grad()
def copy_parts(network: nn.Module, source: nn.Module, device: torch.device) -> nn.Module:
    """Give a frozen sharded network the parts of `source`, its like: copies of trained ones, frozen ones themselves."""
    state = {name: p.detach().clone() if p.requires_grad else p.detach() for name, p in source.named_parameters()}
    network.load_state_dict({name: nn.Parameter(p, requires_grad=False) for name, p in state.items()}, assign=True)
    return network.to(device)


@torch.no_grad()
def share_parts(
    network: nn.Module, source: nn.Module, device: torch.device, rest: Callable[[str, Tensor], Tensor] = _nothing
) -> nn.Module:
    """Give a network without weights those of `source`, which is sharded like it: the same tensors, and no copies.

    rest: as in `fill_parts`, for names that `source` lacks or has as adapters of its own.
    """
    theirs = {name.replace(".base_layer.", "."): p for name, p in source.named_parameters() if "lora_" not in name}
    state = {}
    for name, own in network.named_parameters():
        value = theirs.get(name.replace(".base_layer.", "."))
        if value is None:
            value = shard_of(rest(name, own).to(device), own)
        state[name] = nn.Parameter(value.detach(), requires_grad=own.requires_grad)
    network.load_state_dict(state, assign=True)
    return network.to(device)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    part = shard_of(value, like)
    assert isinstance(part, DTensor) and part.shape == like.shape and local(part).shape == local(like).shape
    return nn.Parameter(part, requires_grad=like.requires_grad)


def sharded_text_encoder(config: Config, parallel: ParallelPlan) -> TextEncoder:
    """The text encoder that conditions, in the precision of activations, without gradients."""
    m, dtype = config.model, pick_dtype(config.training.precision, parallel.device)
    plan = plan_text_encoder(m.text_encoder)
    encoder = parallelize(empty(plan.build, dtype).requires_grad_(False), parallel)
    fill_parts(encoder, plan, parallel.device, dtype)
    return TextEncoder(encoder, load_tokenizer(m.tokenizer, encoder.config.vocab_size), m.text_tokens)
