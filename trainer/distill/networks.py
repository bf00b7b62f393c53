"""Student, critic and teacher of a distillation: loaded, adapted, sharded."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor

from configs.schema import Config
from model.causal_wan import CausalWanModel
from model.fast.fp8_teacher import quantize_and_compare, quantize_network
from model.sequence import SequenceGroup
from model.sizes import RANDOM
from model.weights.plans import WeightPlan
from model.weights.random import random_transformer
from trainer.build import causal_student, score_network
from trainer.distill.motion_head import MotionHead
from trainer.optim.train_state import EMA, TrainState
from trainer.parallel.apply import ParallelPlan, parallelize
from trainer.parallel.sharded_weights import copy_parts, empty, fill_parts, init_plan
from utils.device import pick_dtype
from utils.logs import get_logger
from utils.seeds import generator, stable_hash

log = get_logger(__name__)

FLOAT = torch.float32  # dtype of trained weights and their EMA
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


def frozen_teacher(config: Config, parallel: ParallelPlan) -> tuple[WanTransformer3DModel, dict[float, float]]:
    """The teacher, in the precision of activations; with `training.distill.teacher_fp8` its large linears in float8.

    Also returns the relative error of its v by timestep, unless it is loaded in shards.
    """
    dtype = pick_dtype(config.training.precision, parallel.device)
    plan = init_plan(config, "teacher", parallel, dtype)
    teacher = initial_network(config, "teacher", parallel.device, dtype) if plan is None else empty(plan, dtype)
    errors: dict[float, float] = {}
    if config.training.distill.teacher_fp8 and plan is not None:
        log.info("teacher in %s", quantize_network(teacher))
    elif config.training.distill.teacher_fp8:
        said, errors = quantize_and_compare(teacher.to(parallel.device))
        log.info("teacher in %s; v off by %s", said, ", ".join(f"{e:.1%} at t={t:.0f}" for t, e in errors.items()))
    teacher = parallelize(teacher.eval().requires_grad_(False), parallel, role="teacher")
    return (teacher if plan is None else fill_parts(teacher, plan, parallel.device, dtype)), errors


def student_state(config: Config, parallel: ParallelPlan) -> TrainState:
    """The student with optimizer and EMA. Its steps are generator updates."""
    t, rank = config.training, config.training.distill.lora.student_rank
    if t.sequence_student == "whole":
        parallel = replace(parallel, sequence=SequenceGroup())
    plan = init_plan(config, "student", parallel, causal=True)
    student = initial_network(config, "student", parallel.device, causal=True) if plan is None else empty(plan, FLOAT)
    _prepare(student, config, rank)
    replica = copy.deepcopy(student).requires_grad_(False)  # before sharding, which forbids copies
    replica = parallelize(replica, parallel, streams=True)
    student = _trained(student, "student", config, parallel, plan)
    if plan is not None:
        copy_parts(replica, student, parallel.device)
    return TrainState(student, t, steps=t.distill.generator_updates(t.steps), replica=replica)


def critic_state(config: Config, parallel: ParallelPlan) -> TrainState:
    """The critic with its optimizer; it starts from the teacher unless `training.init` names its own weights."""
    t = config.training
    name = "critic" if "critic" in t.init else "teacher"
    plan = init_plan(config, name, parallel)
    critic = initial_network(config, name, parallel.device) if plan is None else empty(plan, FLOAT)
    _prepare(critic, config, t.distill.lora.critic_rank)
    critic = _trained(critic, "critic", config, parallel, plan)
    return TrainState(critic, t, optimizer=t.distill.critic_optimizer, averaged=False)


def frozen_initial_student(config: Config, parallel: ParallelPlan) -> CausalWanModel:
    """The initial student, frozen, in the precision of activations; a resumed run loads it again."""
    if config.training.sequence_student == "whole":
        parallel = replace(parallel, sequence=SequenceGroup())
    dtype, device = pick_dtype(config.training.precision, parallel.device), parallel.device
    plan = init_plan(config, "student", parallel, dtype, causal=True)
    start = initial_network(config, "student", device, dtype, causal=True) if plan is None else empty(plan, dtype)
    start = parallelize(start.eval().requires_grad_(False), parallel, role="student")
    return start if plan is None else fill_parts(start, plan, device, dtype)


def motion_head_state(config: Config, channels: int, device: torch.device) -> TrainState:
    """The head of the motion regression with its optimizer; its EMA is the target's head."""
    t, r = config.training, config.training.distill.motion_regression
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_hash(config.seed, "motion head"))
        head = MotionHead(r, channels).to(device)
    optimizer_config = replace(t.distill.critic_optimizer, lr=r.lr, betas=[0.9, 0.999], muon_lr=0.0)
    train_state = TrainState(head, t, optimizer=optimizer_config, averaged=False)
    train_state.average = EMA(head, r.decay, start_step=0)
    return train_state


def _prepare(network: WanTransformer3DModel, config: Config, rank: int) -> None:
    """Add LoRA adapters, if any, and set what is trained. The network stays in eval mode: it has no dropout."""
    lora = config.training.distill.lora
    if rank:
        network.requires_grad_(False)
        network.add_adapter(LoraConfig(r=rank, lora_alpha=lora.alpha or rank, target_modules=LORA_TARGETS))
        draw = _adapter(config)
        with torch.no_grad():
            for name, p in network.named_parameters():
                if "lora_" in name and not p.is_meta:
                    p.copy_(draw(name, p))
    else:
        network.requires_grad_(True)
    network.eval()


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
    network: WanTransformer3DModel, role: str, config: Config, parallel: ParallelPlan, plan: WeightPlan | None
) -> WanTransformer3DModel:
    network = parallelize(network, parallel, dtype=pick_dtype(config.training.precision, parallel.device), role=role)
    return network if plan is None else fill_parts(network, plan, parallel.device, FLOAT, rest=_adapter(config))


def merged(student: CausalWanModel, state: dict[str, Tensor] | None = None) -> CausalWanModel:
    """`student`, or a copy with its adapters merged. state: the gathered state dict of a sharded student."""
    if not any("lora_" in name for name, _ in student.named_parameters()):
        return student
    if state is None:
        student = copy.deepcopy(student)
    else:  # FSDP forbids copies
        adapters = student.peft_config["default"]
        with init_empty_weights():
            student = CausalWanModel.from_config(student.config)
            student.add_adapter(adapters)
        student.load_state_dict(state, assign=True)
    student.fuse_lora()
    student.unload_lora()
    return student
