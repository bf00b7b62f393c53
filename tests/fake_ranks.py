"""Bytes of weights that one of many ranks holds, counted with the real sharding on the meta device in one process."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch.testing._internal.distributed.fake_pg import FakeStore

from configs.train_schema import TrainingConfig
from model.fast.fp8_teacher import quantize_network
from model.fp8 import E4M3
from model.memory import trained_bytes
from model.weights.load import stored_dtype
from model.weights.random import transformer_sizes
from trainer.parallel.apply import local, mesh_of, shard

NAMES = {"student": "student, gradients, AdamW, average", "teacher": "teacher", "critic": "critic, gradients, AdamW"}
GATHERED = "student, gathered"


@contextmanager
def fake_group(world: int) -> Iterator[None]:
    """A process group of `world` ranks whose messages are dropped; this process is rank 0."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def count_shards(training: TrainingConfig, sizes: Mapping[str, str], world: int) -> dict[str, int]:
    """Bytes on rank 0 of each network with gradients and optimizer state, under training.sharding=full, and of the
    gathered copy of the student in bfloat16."""
    counted, critic = {}, training.distill.critic_optimizer
    size_of = {"student": trained_bytes(training.optimizer.betas, True), "critic": trained_bytes(critic.betas, False)}
    cpu = torch.device("cpu")
    with fake_group(world):
        mesh = mesh_of(TrainingConfig(sharding="full"), cpu)
        for role, size in sizes.items():
            with torch.device("meta"):
                network = WanTransformer3DModel.from_config(transformer_sizes(size))
            if role == "teacher" and training.distill.teacher_fp8:
                quantize_network(network)
            shard(network, mesh)
            held = [
                (local(p).numel(), 1 if p.dtype == E4M3 else stored_dtype(network, name, torch.bfloat16).itemsize)
                for name, p in network.named_parameters()
            ]
            counted[NAMES[role]] = sum(size_of.get(role, bytes_each) * count for count, bytes_each in held)
            if role == "student" and training.sequence_student == "whole":
                counted[GATHERED] = 2 * sum(p.numel() for p in network.parameters())
    return counted
