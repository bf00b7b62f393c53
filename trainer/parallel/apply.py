"""Several ranks: models changed from outside, gradients made equal, state told and taken in parts.

    none     each rank holds everything; gradients are averaged after the backward pass
    full     FSDP2: each rank holds a part of every block, of its gradients and of its optimiser's state
    hybrid   the same inside groups of ranks (a machine), with a copy in each group (HSDP): [replicate, shard]

In each case a step of N ranks is the step of one rank that has seen all their samples.
"""

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import UMT5EncoderModel

from configs.errors import UserError
from configs.train_schema import TrainingConfig
from model.attention import compute_capability, pick_training_kernel, set_attention
from model.block_parts import compile_blocks
from model.causal_wan import CausalWanModel
from model.checkpointing import full_checkpoint, selective_checkpoint
from model.sequence import SequenceGroup
from trainer.optim.adam import dropped_state
from trainer.parallel.sequence import share_tokens

GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
FLOAT32_PARTS = ("condition_embedder.time_embedder",)  # of a trained network; half a digit there is another timestep


def mesh_of(training: TrainingConfig, device: torch.device) -> DeviceMesh | None:
    """The ranks as `training.sharding` arranges them; None = each holds everything."""
    if training.sharding == "none":
        return None
    if not dist.is_initialized():
        raise UserError(
            f"training.sharding={training.sharding} needs several processes; start with torchrun, or use none"
        )
    world = dist.get_world_size()
    if training.sharding == "full":
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    inside = training.shard_ranks or int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if world % inside:
        raise UserError(
            f"training.shard_ranks={inside} does not divide the {world} ranks of training.sharding=hybrid; "
            f"use a divisor of {world}"
        )
    return init_device_mesh(device.type, (world // inside, inside), mesh_dim_names=("replicate", "shard"))


@dataclass(frozen=True)
class ParallelPlan:
    """Where the networks of a run go. mesh: None = each rank holds everything."""

    training: TrainingConfig
    device: torch.device
    mesh: DeviceMesh | None = None
    sequence: SequenceGroup = field(default_factory=SequenceGroup)

    def kernel(self, dtype: torch.dtype) -> str:
        """The attention kernel of a network whose activations are `dtype`."""
        return pick_training_kernel(self.training.attention, compute_capability(self.device), dtype)


def parallelize(
    network: nn.Module,
    where: ParallelPlan,
    *,
    dtype: torch.dtype | None = None,
    role: str | None = None,
    streams: bool = False,
) -> nn.Module:
    """Apply to a network, in this order, what its own code does not know of. Returns it, on the device.

    1. the group that shares tokens (trainer/parallel/sequence.py), in the network that a loss calls; a student's may be
       one rank
    2. `training.attention`: the kernel, by what its activations are: those of an average are float32, cuDNN's never
    3. `training.checkpointing`: the backward pass of a trained network computes each block again; where a block sees
       whole clips, self-attention not (model/checkpointing.py)
    4. `training.compile`: of a network that a loss calls, what comes before self-attention in a block and what comes
       behind. Attention stays as it is: a student's sees more keys chunk by chunk, checkpointing keeps what it returns
    5. the mesh: it is sharded, a unit for each block and one for the rest; weights may be on the meta device still. A
       trained student stays gathered from its first pass after a step to its next step (`drop_gathered`): it is called
       chunk by chunk, in all updates of the critic too, and changes only then

    dtype: that trained weights are gathered and used in, under autocast; None = their own, for a frozen network.
    role: what a sentence about the network calls it; None = it never shares tokens.
    streams: the student of an inference session, whose `text_kv` is called from outside. (Inside a block's forward,
    where training calls it, the weights are there already and gathering them again would drop them too soon.)
    """
    training, wan, causal = where.training, *(isinstance(network, x) for x in (WanTransformer3DModel, CausalWanModel))
    trained = any(p.requires_grad for p in network.parameters())
    if role is not None:
        share_tokens(network, where.sequence, role)
    if wan:
        choose_attention(network, where, dtype or network.patch_embedding.weight.dtype)
    if training.checkpointing and wan and trained:
        network.enable_gradient_checkpointing(full_checkpoint if causal else selective_checkpoint)
    if training.compile and role is not None:
        compile_blocks(network)
    if where.mesh is None:
        return network.to(where.device)
    shard(network, where.mesh, dtype, stays_gathered=causal and trained)
    for part in (network, *network.blocks) if streams else ():
        register_fsdp_forward_method(part, "text_kv")
    return network


def choose_attention(network: WanTransformer3DModel, where: ParallelPlan, dtype: torch.dtype) -> None:
    """Have `network`, whose activations are `dtype`, use the kernel of the run; `auto` leaves to torch what it can."""
    kernel = where.kernel(dtype)
    if where.training.attention != "auto" or kernel != "sdpa":
        set_attention(network, kernel)


def shard(
    network: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None = None, *, stays_gathered: bool = False
) -> None:
    """Gradients are reduced and kept in float32, as are weights and optimiser; inputs are not cast, for timesteps are
    float32. FSDP moves what is not on the meta device unit by unit, so that no device holds a network whole.

    stays_gathered: what a pass has gathered is there for all later ones, until `drop_gathered`.
    """
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # changed in place by nobody
    half = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = network.encoder.block if isinstance(network, UMT5EncoderModel) else network.blocks
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    for name in FLOAT32_PARTS if half else ():
        fully_shard(network.get_submodule(name), mesh=mesh, mp_policy=exact)
    fully_shard(network, mesh=mesh, mp_policy=policy)
    if stays_gathered:
        network.set_reshard_after_forward(False)
        network.set_reshard_after_backward(False)


def gather(network: nn.Module) -> None:
    """Have the weights of a sharded network, one that stays gathered, at hand for what is no pass of it."""
    for part in filter(is_sharded, network.modules()) if is_sharded(network) else ():
        part.unshard()


def drop_gathered(network: nn.Module) -> None:
    """Free what passes have gathered of a sharded network: its parameters are its parts, which may change, and the next
    pass gathers them. FSDP itself never frees the root unit of a network after a pass without a graph."""
    for part in filter(is_sharded, network.modules()) if is_sharded(network) else ():
        part.reshard()


# --- tensors in parts -------------------------------------------------------------------------------------------------


def whole(x: Tensor) -> Tensor:
    """`x` on every rank in full, if it was sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """This rank's part of `x`."""
    return x.to_local() if isinstance(x, DTensor) else x


def part_of(x: Tensor, like: Tensor) -> Tensor:
    """`x`, the same on all ranks, sharded as `like` is, and this rank's part copied; `x` itself if `like` is whole."""
    if not isinstance(like, DTensor) or isinstance(x, DTensor):
        return x
    part = distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
    own = part.to_local().clone()  # or it would keep all of x
    return DTensor.from_local(own, part.device_mesh, part.placements, run_check=False, shape=x.shape, stride=x.stride())


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """The mean over ranks of gradients that each rank holds whole; sharded ones are averaged already."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    if not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])  # one message
    dist.all_reduce(flat)
    parts = (flat / dist.get_world_size()).split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])


def sum_over_shards(x: Tensor, like: Tensor) -> Tensor:
    """The sum of a number that each rank computed from its own part of what is sharded as `like` is."""
    if isinstance(like, DTensor):
        for dim, placement in enumerate(like.placements):
            if placement.is_shard():
                dist.all_reduce(x, group=like.device_mesh.get_group(dim))
    return x


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars averaged over ranks, in one message."""
    if not values or not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    both = torch.stack([v.detach().float() for v in values.values()])
    dist.all_reduce(both)
    return dict(zip(values, (both / dist.get_world_size()).unbind(), strict=True))


# --- state ------------------------------------------------------------------------------------------------------------


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict; of a sharded module whole tensors on the CPU, and nothing on ranks other than the first."""
    return get_model_state_dict(module, options=GATHER) if is_sharded(module) else module.state_dict()


@torch.no_grad()
def load_module_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Take in whole tensors or parts like the module's own."""
    if not is_sharded(module):
        module.load_state_dict(state)
        return
    own = module.state_dict()
    if own.keys() != state.keys():
        raise ValueError(f"{sorted(own.keys() ^ state.keys())[:3]} are not in both the module and its state")
    for name, target in own.items():
        local(target).copy_(local(part_of(state[name], target)))


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state dict; of a sharded module by parameter's name, gathered like `module_state`."""
    if is_sharded(module):
        drop_gathered(module)
        return get_optimizer_state_dict(module, optimizer, options=GATHER)
    return optimizer.state_dict()


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take in a state dict, by index or by parameter's name, or {name: {entry: tensor}}; whole tensors or parts.

    Learning rates and the like stay the optimiser's: they are the configuration's.
    """
    held, entries = state["state"] if "param_groups" in state else state, {}
    for i, (name, p) in enumerate(optimized(module, optimizer)):
        found = held.get(i) or held.get(name)
        if found:
            kept = {key: v for key, v in found.items() if key not in dropped_state(optimizer)}
            entries[i] = {key: part_of(v, p) if v.shape == p.shape else v for key, v in kept.items()}
            if "exp_avg_sq" in kept and not dropped_state(optimizer):
                entries[i].setdefault("exp_avg", torch.zeros_like(p))  # saved with a beta_1 of 0
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def optimized(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Name and parameter, in the optimiser's order."""
    drop_gathered(module)
    names = {p: name for name, p in module.named_parameters()}
    return ((names[p], p) for group in optimizer.param_groups for p in group["params"])
