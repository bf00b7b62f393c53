"""Student, critic and teacher of a distillation: loaded, adapted, sharded."""

import copy

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import nn

from configs.schema import Config
from model.causal_wan import CausalWanModel
from model.sequence import SequenceGroup
from trainer.networks import start_network
from trainer.optim import Player
from trainer.parallel import shard
from trainer.sequence import parallelize
from utils.device import pick_dtype
from utils.seeds import stable_hash

ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]  # every linear layer of a block


def frozen_teacher(config: Config, device: torch.device, sequence: SequenceGroup) -> WanTransformer3DModel:
    """The teacher, in the precision of activations."""
    teacher = start_network(config, "teacher", device, pick_dtype(config.training.precision, device))
    parallelize(teacher, sequence, "teacher")
    return _placed(teacher.eval().requires_grad_(False), config, device)


def student_player(config: Config, device: torch.device, sequence: SequenceGroup) -> Player:
    """The student with optimiser and average. Its steps are generator updates. The average computes by itself."""
    t = config.training
    student = start_network(config, "student", device, causal=True)
    _prepare(student, config, t.distill.lora.student_rank)
    twin = _placed(copy.deepcopy(student), config, device, streams=True)  # before sharding, which forbids copies
    parallelize(student, sequence, "student")
    ratio = t.distill.dfake_gen_update_ratio
    return Player(_placed(student, config, device), t, steps=-(-t.steps // ratio), twin=twin)


def critic_player(config: Config, device: torch.device, sequence: SequenceGroup) -> Player:
    """The critic with its optimiser; it starts from the teacher unless `training.init` names its own weights."""
    t = config.training
    critic = start_network(config, "critic" if "critic" in t.init else "teacher", device)
    _prepare(critic, config, t.distill.lora.critic_rank)
    parallelize(critic, sequence, "critic")
    return Player(_placed(critic, config, device), t, optimizer=t.distill.critic_optimizer, averaged=False)


def _prepare(network: WanTransformer3DModel, config: Config, rank: int) -> None:
    """Adapters and activation checkpointing. Evaluation mode all through: there is no dropout to turn on."""
    lora = config.training.distill.lora
    if rank:
        network.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_hash(config.seed, "lora"))
            network.add_adapter(LoraConfig(r=rank, lora_alpha=lora.alpha or rank, target_modules=ADAPTED))
    else:
        network.requires_grad_(True)
    if config.training.checkpointing:
        network.enable_gradient_checkpointing()
    network.eval()


def _placed(network: nn.Module, config: Config, device: torch.device, *, streams: bool = False) -> nn.Module:
    network = network.to(device)
    return shard(network, device, streams=streams) if config.training.sharding == "full" else network


def merged(student: CausalWanModel) -> CausalWanModel:
    """`student` itself, or a copy in which its adapters are part of the weights."""
    if not any("lora_" in name for name, _ in student.named_parameters()):
        return student
    student = copy.deepcopy(student)
    student.fuse_lora()
    student.unload_lora()
    return student
