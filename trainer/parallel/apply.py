"""Parallelism applied to models from outside, averaging of gradients, and state of sharded modules.

    none     each rank holds everything; gradients are averaged after the backward pass
    full     FSDP2: each rank holds a shard of every block, of its gradients and of its optimizer state
    hybrid   FSDP2 inside groups of ranks (a machine), replicated between groups (HSDP): [replicate, shard]

In each case a step of N ranks equals the step of one rank on all their samples.
"""

import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
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
FLOAT32_PARTS = ("condition_embedder.time_embedder",)  # of a trained network: half precision would change the timestep


def mesh_of(training: TrainingConfig, device: torch.device) -> DeviceMesh | None:
    """The device mesh of `training.sharding`; None = each rank holds everything."""
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
    """How the networks of a run are placed. mesh: None = each rank holds everything."""

    training: TrainingConfig
    device: torch.device
    mesh: DeviceMesh | None = None
    sequence: SequenceGroup = field(default_factory=SequenceGroup)

    def kernel(self, dtype: torch.dtype) -> str:
        """The attention kernel of a network whose activations are `dtype`."""
        return pick_training_kernel(self.training.attention, compute_capability(self.device), dtype)


def parallelize(
    network: nn.Module,
    parallel: ParallelPlan,
    *,
    dtype: torch.dtype | None = None,
    role: str | None = None,
    streams: bool = False,
) -> nn.Module:
    """Apply parallelism and related transforms to a network, in this order. Returns it, on the device.

    1. sequence parallelism (trainer/parallel/sequence.py), of a network that a loss calls; a student's group may be one
       rank
    2. `training.attention`: the kernel, chosen by the dtype of activations: those of an EMA are float32, which cuDNN
       does not take
    3. `training.checkpointing`: blocks of a trained network are recomputed in the backward pass; self-attention over
       whole clips is not (model/checkpointing.py)
    4. `training.compile`: the parts of a block before and after self-attention, of a network that a loss calls.
       Attention stays uncompiled: a student's number of keys grows chunk by chunk
    5. FSDP2 on the mesh: one unit for each block and one for the rest; weights may still be on the meta device. A
       trained student stays unsharded from its first pass after an optimizer step to the next step (`reshard`), since
       it is called chunk by chunk, also in all updates of the critic; unless `training.sequence_student` is `shared`

    dtype: dtype in which trained weights are gathered and used, under autocast; None = their own (frozen networks).
    role: name of the network in messages; None = it takes no part in sequence parallelism.
    streams: the student of an inference session, whose `text_kv` is called from outside. (Training calls it inside a
    block's forward, where weights are unsharded already and a second unshard would free them too soon.)
    """
    training = parallel.training
    wan, causal = (isinstance(network, kind) for kind in (WanTransformer3DModel, CausalWanModel))
    trained = any(p.requires_grad for p in network.parameters())
    if role is not None:
        share_tokens(network, parallel.sequence, role)
    if wan:
        choose_attention(network, parallel, dtype or network.patch_embedding.weight.dtype)
    if training.checkpointing and wan and trained:
        network.enable_gradient_checkpointing(full_checkpoint if causal else selective_checkpoint)
    if training.compile and role is not None:
        compile_blocks(network)
    if parallel.mesh is None:
        return network.to(parallel.device)
    whole = training.sequence_student == "whole"
    shard(network, parallel.mesh, dtype, stays_gathered=causal and trained and whole)
    for part in (network, *network.blocks) if streams else ():
        register_fsdp_forward_method(part, "text_kv")
    return network


def choose_attention(network: WanTransformer3DModel, parallel: ParallelPlan, dtype: torch.dtype) -> None:
    """Set the attention kernel of `network`, whose activations are `dtype`; `auto` leaves it to torch if possible."""
    kernel = parallel.kernel(dtype)
    if parallel.training.attention != "auto" or kernel != "sdpa":
        set_attention(network, kernel)


def shard(
    network: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None = None, *, stays_gathered: bool = False
) -> None:
    """Shard with FSDP2. Gradients, weights and optimizer state are float32; inputs are not cast, since timesteps are
    float32. Units are moved to the device one by one, so that no device holds the full network.

    stays_gathered: weights stay unsharded after a pass, until `reshard`.
    """
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing changes it in place
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


def unshard(network: nn.Module) -> None:
    """Gather the weights of a sharded network for use outside its forward pass."""
    for part in filter(is_sharded, network.modules()) if is_sharded(network) else ():
        part.unshard()


def reshard(network: nn.Module) -> None:
    """Free the gathered weights of a sharded network, before its shards change. FSDP itself never frees the root unit
    after a pass without a graph."""
    for part in filter(is_sharded, network.modules()) if is_sharded(network) else ():
        part.reshard()


# --- sharded tensors --------------------------------------------------------------------------------------------------


def full_tensor(x: Tensor) -> Tensor:
    """The full tensor on every rank, if `x` is sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """This rank's shard of `x`."""
    return x.to_local() if isinstance(x, DTensor) else x


def shard_of(x: Tensor, like: Tensor) -> Tensor:
    """`x`, equal on all ranks, sharded like `like`, its shard copied; `x` itself if `like` is not sharded."""
    if not isinstance(like, DTensor) or isinstance(x, DTensor):
        return x
    part = distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
    own = part.to_local().clone()  # or it would keep all of x
    return DTensor.from_local(own, part.device_mesh, part.placements, run_check=False, shape=x.shape, stride=x.stride())


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average unsharded gradients over ranks; FSDP has averaged sharded ones."""
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
    """Sum over ranks of a number that each computed from its own shard of tensors like `like`."""
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
    """The state dict; of a sharded module full tensors on the CPU of the first rank, and nothing on other ranks."""
    return get_model_state_dict(module, options=GATHER) if is_sharded(module) else module.state_dict()


@torch.no_grad()
def load_module_state(module: nn.Module, state: dict[str, Tensor], frozen: Collection[str] = ()) -> None:
    """Load full tensors, or shards like the module's own. UserError if names or shapes differ.

    frozen: names that are left as they are.
    """
    own = {name: value for name, value in module.state_dict().items() if name not in frozen}
    state = {name: value for name, value in state.items() if name not in frozen}
    shared = own.keys() & state.keys()
    other = sorted({*(own.keys() ^ state.keys()), *(name for name in shared if own[name].shape != state[name].shape)})
    if other:
        raise other_networks(other)
    for name, value in state.items():
        local(own[name]).copy_(local(shard_of(value, own[name])))


def other_networks(names: Sequence[str]) -> UserError:
    """That a checkpoint has tensors of other names or shapes than the networks that are to be resumed."""
    return UserError(
        f"the checkpoint's networks are not those of this run: {len(names)} tensors differ, such as {names[0]}; set "
        f"back what was changed, or choose another --logdir"
    )


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state dict; of a sharded module by parameter names, gathered like `module_state`."""
    if is_sharded(module):
        reshard(module)
        return get_optimizer_state_dict(module, optimizer, options=GATHER)
    return optimizer.state_dict()


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict by parameter index or name, or {name: {entry: tensor}}; full tensors or shards.

    Hyper-parameters such as learning rates stay as configured. UserError if it is of other parameter groups.
    """
    if "param_groups" in state and _group_sizes(state) != (sizes := _group_sizes(optimizer.state_dict())):
        raise UserError(
            f"the checkpoint's optimizer has groups of {_group_sizes(state)} parameters and this run's has {sizes}: "
            f"other parameters are trained, or muon_lr was switched on or off; set it back, or choose another --logdir"
        )
    saved, entries = state["state"] if "param_groups" in state else state, {}
    for i, (name, p) in enumerate(optimized(module, optimizer)):
        state_of_p = saved.get(i) or saved.get(name)
        if state_of_p:
            kept = {key: v for key, v in state_of_p.items() if key not in dropped_state(optimizer)}
            entries[i] = {key: shard_of(v, p) if v.shape == p.shape else v for key, v in kept.items()}
            if "exp_avg_sq" in kept and not dropped_state(optimizer):
                entries[i].setdefault("exp_avg", torch.zeros_like(p))  # saved with a beta_1 of 0
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def _group_sizes(state: dict[str, Any]) -> list[int]:
    return [len(group["params"]) for group in state["param_groups"]]


def optimized(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Names and parameters, in the optimizer's order."""
    reshard(module)
    names = {p: name for name, p in module.named_parameters()}
    return ((names[p], p) for group in optimizer.param_groups for p in group["params"])
