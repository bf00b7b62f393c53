"""Several ranks: sharding applied to a model that knows nothing of it, gradients made equal, state gathered.

Without sharding each rank holds everything and gradients are averaged after the backward pass; with it (FSDP2) they
are averaged by it. Either way a step of N ranks is the step of one rank that has seen all their samples.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from configs.errors import UserError

GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
SCATTER = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def shard(module: nn.Module, device: torch.device, *, streams: bool = False) -> nn.Module:
    """Shard a Wan transformer over all ranks, a unit for each block and one for the rest.

    Parameters keep their dtype, in which gradients are reduced; inputs are not cast (timesteps are float32).
    streams: the student of an inference session, whose `text_kv` is called from outside. (Inside a block's forward,
    where training calls it, the weights are there already and gathering them again would drop them too soon.)
    """
    if not dist.is_initialized():
        raise UserError("training.sharding=full needs several processes; start with torchrun, or use none")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in module.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    for part in (module, *module.blocks) if streams else ():
        register_fsdp_forward_method(part, "text_kv")
    return module


def whole(x: Tensor) -> Tensor:
    """`x` on every rank in full, if it was sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """This rank's part of `x`."""
    return x.to_local() if isinstance(x, DTensor) else x


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


def sum_over_shards(x: Tensor, sharded: bool) -> Tensor:
    """The sum over ranks of a number that each computed from its own shards."""
    if sharded and dist.is_initialized():
        dist.all_reduce(x)
    return x


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scalars averaged over ranks, in one message."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    both = torch.stack([v.detach().float() for v in values.values()])
    dist.all_reduce(both)
    return dict(zip(values, (both / dist.get_world_size()).unbind(), strict=True))


class Agreement:
    """Whether any rank says yes, asked on the host so that no rank waits for its GPU."""

    def __init__(self):
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo") if several else None

    def any(self, yes: bool) -> bool:
        if self.group is None:
            return yes
        flag = torch.tensor(int(yes))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def _sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


def module_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict; of a sharded module whole tensors on the CPU, and nothing on ranks other than the first."""
    return get_model_state_dict(module, options=GATHER) if _sharded(module) else module.state_dict()


def load_module_state(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Inverse of `module_state`."""
    if _sharded(module):
        set_model_state_dict(module, state, options=SCATTER)
    else:
        module.load_state_dict(state)


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The optimiser's state dict; of a sharded module by parameter name, gathered like `module_state`."""
    if _sharded(module):
        return get_optimizer_state_dict(module, optimizer, options=GATHER)
    return optimizer.state_dict()


def load_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Inverse of `optimizer_state`."""
    if _sharded(module):
        set_optimizer_state_dict(module, optimizer, state, options=SCATTER)
    else:
        optimizer.load_state_dict(state)

