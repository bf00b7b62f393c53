"""Student, critic and teacher of a distillation: loaded, adapted, sharded.

Frozen weights (the teacher's, and those under LoRA adapters) are in the precision of activations, and in memory once
for all networks that start from the same: student and EMA, critic and teacher, and all of these if the student starts
from the teacher's files. `Bases` holds them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from configs.schema import Config
from model.causal_wan import CausalWanModel
from model.fast.fp8_teacher import quantize_and_compare, quantize_network
from model.memory import start_of, weight_origin
from model.sequence import SequenceGroup
from model.sizes import RANDOM
from model.weights.random import random_transformer
from trainer.build import causal_student, score_network
from trainer.distill.motion_head import MotionHead
from trainer.optim.train_state import EMA, TrainState, replica_of
from trainer.parallel.apply import ParallelPlan, full_tensor, parallelize, reshard
from trainer.parallel.sharded_weights import copy_parts, empty, fill_parts, init_plan, share_parts
from utils.device import pick_dtype
from utils.logs import get_logger
from utils.seeds import generator, stable_hash

log = get_logger(__name__)

FLOAT = torch.float32  # dtype of trained weights and their EMA
Bases = dict[str, WanTransformer3DModel]  # by what its frozen weights were read from (weight_origin): a network
Fill = Callable[[WanTransformer3DModel], WanTransformer3DModel]
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]  # every linear layer of a block


def initial_network(
    config: Config, name: str, device: torch.device, dtype: torch.dtype = torch.float32, *, causal: bool = False
) -> WanTransformer3DModel:
    """The network of `training.init.<name>`. `random:14B` has random weights, made on `device`, and needs no file."""
    source = config.training.init.get(name, "")
    if source.startswith(RANDOM):
        seed = stable_hash(config.seed, "random", name)
        return random_transformer(source.removeprefix(RANDOM), device, dtype, causal=causal, seed=seed)
    return causal_student(config, name, dtype) if causal else score_network(config, name, dtype)


def frozen_teacher(
    config: Config, parallel: ParallelPlan, bases: Bases | None = None
) -> tuple[WanTransformer3DModel, dict[float, float]]:
    """The teacher, in the precision of activations; with `training.distill.teacher_fp8` its large linears in float8.

    Also returns the relative error of its v by timestep, unless it is loaded in shards.
    """
    fp8, errors = config.training.distill.teacher_fp8, {}
    teacher, fill = _begin(config, "teacher", parallel, pick_dtype(config.training.precision, parallel.device), {})
    if fp8 and fill is not None:
        log.info("teacher in %s", quantize_network(teacher))
    elif fp8:
        said, errors = quantize_and_compare(teacher.to(parallel.device))
        log.info("teacher in %s; v off by %s", said, ", ".join(f"{e:.1%} at t={t:.0f}" for t, e in errors.items()))
    teacher = _place(teacher.requires_grad_(False), fill, parallel, role="teacher")
    if bases is not None and not fp8:
        bases[weight_origin(config.training, "teacher")] = teacher
    return teacher, errors


def student_state(config: Config, parallel: ParallelPlan, bases: Bases | None = None) -> TrainState:
    """The student with optimizer and EMA. Its steps are generator updates."""
    t, rank = config.training, config.training.distill.lora.student_rank
    if t.sequence_student == "whole":
        parallel = replace(parallel, sequence=SequenceGroup())
    student, fill = _trainable(config, "student", rank, parallel, bases, causal=True)
    replica = parallelize(replica_of(student), parallel, streams=True)  # before sharding, which forbids copies
    student = _trained(student, fill, "student", config, parallel, bases)
    if parallel.mesh is not None:
        copy_parts(replica, student, parallel.device)
    return TrainState(student, t, steps=t.distill.generator_updates(t.steps), replica=replica)


def critic_state(config: Config, parallel: ParallelPlan, bases: Bases | None = None) -> TrainState:
    """The critic with its optimizer; it starts from the teacher's weights unless `training.init` names its own."""
    t = config.training
    critic, fill = _trainable(config, "critic", t.distill.lora.critic_rank, parallel, bases)
    critic = _trained(critic, fill, "critic", config, parallel, bases)
    return TrainState(critic, t, optimizer=t.distill.critic_optimizer, averaged=False)


def frozen_initial_student(config: Config, parallel: ParallelPlan, bases: Bases | None = None) -> CausalWanModel:
    """The initial student, frozen, in the precision of activations; a resumed run loads it again."""
    if config.training.sequence_student == "whole":
        parallel = replace(parallel, sequence=SequenceGroup())
    dtype = pick_dtype(config.training.precision, parallel.device)
    start, fill = _begin(config, "student", parallel, dtype, bases or {}, causal=True)
    return _place(start.requires_grad_(False), fill, parallel, role="student")


def motion_head_state(config: Config, channels: int, device: torch.device) -> TrainState:
    """The head of the motion regression with its optimizer; its EMA is the target's head."""
    t, r = config.training, config.training.distill.motion_regression
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_hash(config.seed, "motion head"))
        head = MotionHead(channels).to(device)
    optimizer_config = replace(t.distill.critic_optimizer, lr=r.lr, betas=[0.9, 0.999], muon_lr=0.0)
    steps = t.distill.generator_updates(t.steps)
    train_state = TrainState(head, t, optimizer=optimizer_config, steps=steps, averaged=False)
    train_state.average = EMA(head, r.decay, start_step=0)
    return train_state


def _begin(
    config: Config, role: str, parallel: ParallelPlan, dtype: torch.dtype, bases: Bases, *, causal: bool = False
) -> tuple[WanTransformer3DModel, Fill | None]:
    """The network that `role` starts from, in eval mode; and, if it has no weights yet, what gives them to it once it
    is placed: those of a network in `bases` that starts from the same, or parts of a file."""
    name = start_of(config.training, role)
    base = bases.get(weight_origin(config.training, role))
    if base is not None:
        kind = CausalWanModel if causal else WanTransformer3DModel
        fill = partial(share_parts, source=base, device=parallel.device, rest=_adapter(config))
        return empty(lambda: kind.from_config(base.config), dtype), fill
    plan = init_plan(config, name, parallel, dtype, causal=causal)
    if plan is None:
        return initial_network(config, name, parallel.device, dtype, causal=causal).eval(), None
    fill = partial(fill_parts, plan=plan, device=parallel.device, dtype=dtype, rest=_adapter(config))
    return empty(plan.build, dtype), fill


def _place(network: WanTransformer3DModel, fill: Fill | None, parallel: ParallelPlan, **how) -> WanTransformer3DModel:
    """`parallelize` a network and give it its weights: a sharded one afterwards, its own parts."""
    if fill is not None and parallel.mesh is None:
        network = fill(network)
    network = parallelize(network, parallel, **how)
    return network if fill is None or parallel.mesh is None else fill(network)


def _trainable(
    config: Config, role: str, rank: int, parallel: ParallelPlan, bases: Bases | None, *, causal: bool = False
) -> tuple[WanTransformer3DModel, Fill | None]:
    """`_begin`, with what is trained in float32: all weights, or adapters of `rank`. There is no dropout, so that it
    stays in eval mode."""
    if not rank:
        network, fill = _begin(config, role, parallel, FLOAT, {}, causal=causal)
        return network.requires_grad_(True), fill
    dtype, lora = pick_dtype(config.training.precision, parallel.device), config.training.distill.lora
    network, fill = _begin(config, role, parallel, dtype, bases or {}, causal=causal)
    network.requires_grad_(False)
    network.add_adapter(LoraConfig(r=rank, lora_alpha=lora.alpha or rank, target_modules=LORA_TARGETS))
    draw = _adapter(config)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_" in name:
                p.data = p.data.to(FLOAT)
                if not p.is_meta:
                    p.copy_(draw(name, p))
    if fill is not None and parallel.mesh is None:  # before the EMA's replica is copied
        network, fill = fill(network), None
    return network.eval(), fill


def _adapter(config: Config) -> Callable[[str, Tensor], Tensor]:
    """Initial values of adapters as in peft, drawn from (seed, name), so that they do not depend on sharding."""

    def draw(name: str, p: Tensor) -> Tensor:
        assert "lora_" in name, f"there are no weights for {name}"
        if "lora_B" in name:
            return torch.zeros(p.shape)
        bound = 1 / math.sqrt(p.shape[1])
        return torch.empty(p.shape).uniform_(-bound, bound, generator=generator(config.seed, "lora", name))

    return draw


def _trained(
    network: WanTransformer3DModel, fill: Fill | None, role: str, config: Config, parallel: ParallelPlan,
    bases: Bases | None,
) -> WanTransformer3DModel:  # fmt: skip
    """`_place` a network that is trained; its base can be that of networks to come."""
    adapted = adapters(network)
    for layer in adapted.values():
        layer.cast_input_dtype_enabled = False  # autocast casts the adapters; their inputs need no float32 copies
    network = _place(network, fill, parallel, dtype=pick_dtype(config.training.precision, parallel.device), role=role)
    if bases is not None and adapted:
        bases.setdefault(weight_origin(config.training, role), network)
    return network


def adapters(network: WanTransformer3DModel) -> dict[str, BaseTunerLayer]:
    """Layers with a LoRA adapter, by their names in the plain network."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)}


@torch.no_grad()
def merged_weights(network: WanTransformer3DModel) -> Iterator[tuple[str, Tensor]]:
    """Weights by their names in the plain network, one by one, with adapters merged in float32; a collective if the
    network is sharded, in which no rank holds more than one layer of it."""
    reshard(network)
    adapted = adapters(network)
    for name, p in network.named_parameters():
        if "lora_" in name:
            continue
        value, layer = full_tensor(p.detach()), name.removesuffix(".base_layer.weight")
        if layer != name:
            halves = (adapted[layer].lora_A, adapted[layer].lora_B)
            down, up = (full_tensor(half["default"].weight.detach()) for half in halves)
            value = value.to(FLOAT) + adapted[layer].scaling["default"] * (up @ down)
        yield name.replace(".base_layer.", "."), value


@torch.no_grad()
def adapter_weights(network: WanTransformer3DModel) -> tuple[dict[str, Tensor], dict[str, float]]:
    """`<layer>.A` and `<layer>.B` of all adapters on the CPU, and their alphas, for `save_lora`; a collective, too."""
    reshard(network)
    values, alphas = {}, {}
    for name, layer in adapters(network).items():
        for part, halves in (("A", layer.lora_A), ("B", layer.lora_B)):
            values[f"{name}.{part}"] = full_tensor(halves["default"].weight.detach()).cpu().contiguous()
        alphas[name] = float(layer.lora_alpha["default"])
    return values, alphas
