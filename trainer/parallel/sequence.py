"""Sequence parallelism of Wan transformers: tokens are split before the blocks and gathered behind them.

Ranks form a mesh (data x sequence): neighbours share samples, so that a group lies within a machine. Parameters are
sharded over both axes (trainer/parallel/apply.py) and gradients averaged over both; model/sequence.py says why.

diffusers' own context parallelism has the same plan, but its attention knows no chunk cache, its gather leaves
gradients n times too small for that mean, and it does not start on a CPU.
"""

from diffusers import WanTransformer3DModel
from torch import device
from torch.distributed.device_mesh import init_device_mesh

from configs.errors import UserError
from configs.geometry import Geometry
from configs.train_schema import TrainingConfig
from model.block_parts import split_blocks
from model.causal_wan import CausalWanModel
from model.sequence import SequenceGroup
from utils.distributed import Ranks
from utils.logs import get_logger

log = get_logger(__name__)


def sequence_group(degree: int, ranks: Ranks, place: device) -> SequenceGroup:
    """The group of `degree` neighbouring ranks that this one belongs to."""
    data = data_ranks(degree, ranks)
    if degree == 1:
        return SequenceGroup()
    log.info("%d groups of %d ranks, each of which shares its samples' tokens", data.world, degree)
    mesh = init_device_mesh(place.type, (data.world, degree), mesh_dim_names=("data", "sequence"))
    return SequenceGroup(mesh.get_group("sequence"))


def data_ranks(degree: int, ranks: Ranks) -> Ranks:
    """Position among those that see other samples: what is drawn and counted depends on nothing else."""
    if ranks.world % degree:
        raise UserError(
            f"training.sequence_parallel={degree} does not divide {ranks.world} rank{'s' * (ranks.world != 1)}; "
            f"start a multiple of {degree} with torchrun --nproc_per_node, or lower it"
        )
    return Ranks(ranks.rank // degree, ranks.world // degree, ranks.local_rank)


def check_tokens(training: TrainingConfig, geometry: Geometry, frames: int) -> None:
    """Refuse tokens that cannot be shared out evenly: those of a clip of `frames` latent frames, or those of a chunk
    where the student is shared out, too."""
    degree = training.sequence_parallel
    tokens, what = frames * geometry.tokens_per_frame, f"clip of {frames} latent frames"
    if training.sequence_student == "shared":
        tokens, what = geometry.tokens_per_chunk, f"chunk of {geometry.chunk_frames} latent frames"
    if tokens % degree:
        raise UserError(
            f"training.sequence_parallel={degree} does not divide the {tokens} tokens of a {what} of {geometry.width}x"
            f"{geometry.height} pixels; use {_divisors(tokens, 16)}"
        )


def share_tokens(network: WanTransformer3DModel, group: SequenceGroup, name: str) -> None:
    """Share the tokens of `network` out over `group`, in its own forward passes; before it is sharded."""
    if group.size == 1:
        return
    heads = network.config.num_attention_heads
    if heads % group.size:
        raise UserError(
            f"training.sequence_parallel={group.size} does not divide the {heads} attention heads of the {name}; "
            f"use {_divisors(heads, heads)}"
        )

    if isinstance(network, CausalWanModel):
        for part in (network, *network.blocks):
            part.sequence = group
        return
    network.rope.register_forward_hook(lambda module, args, out: tuple(group.split(x) for x in out))
    network.blocks[0].register_forward_pre_hook(lambda module, args: (group.split(args[0]), *args[1:]))
    network.proj_out.register_forward_hook(lambda module, args, out: group.gather(out))
    for block in split_blocks(network).blocks:
        block.sequence = group


def _divisors(n: int, limit: int) -> str:
    """ "1, 2 or 3": numbers up to `limit` that divide n."""
    *some, last = [str(i) for i in range(1, limit + 1) if n % i == 0]
    return f"{', '.join(some)} or {last}" if some else last
