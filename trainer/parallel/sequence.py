"""Sequence parallelism of Wan transformers: tokens are split before the blocks and gathered after them.

Ranks form a mesh (data x sequence): neighbours share samples, so that a group lies within a machine. Parameters are
sharded over both axes (trainer/parallel/apply.py) and gradients averaged over both; model/sequence.py says why.

diffusers' own context parallelism has the same plan, but its attention knows no chunk cache, its gather leaves
gradients n times too small for that mean, and it does not start on a CPU.
"""

from diffusers import WanTransformer3DModel
from torch import device
from torch.distributed.device_mesh import init_device_mesh

from configs.geometry import Geometry
from configs.train_schema import TrainingConfig
from configs.validate import check_shares
from model.block_parts import split_blocks
from model.causal_wan import CausalWanModel
from model.sequence import SequenceGroup
from utils.distributed import Ranks
from utils.logs import get_logger

log = get_logger(__name__)
SETTING = "training.sequence_parallel"


def sequence_group(degree: int, ranks: Ranks, place: device) -> SequenceGroup:
    """The group of `degree` neighbouring ranks that this one belongs to."""
    data = data_ranks(degree, ranks)
    if degree == 1:
        return SequenceGroup()
    log.info("%d groups of %d ranks, each of which shares its samples' tokens", data.world, degree)
    mesh = init_device_mesh(place.type, (data.world, degree), mesh_dim_names=("data", "sequence"))
    return SequenceGroup(mesh.get_group("sequence"))


def data_ranks(degree: int, ranks: Ranks) -> Ranks:
    """Rank and world size of data parallelism, which random draws and sample counts depend on."""
    return ranks.groups(degree, SETTING)


def check_tokens(training: TrainingConfig, geometry: Geometry, frames: int) -> None:
    """Refuse a number of tokens that the group size does not divide: those of a clip of `frames` latent frames, or of a
    chunk if the student is split, too."""
    degree = training.sequence_parallel
    if training.sequence_student == "shared":
        return geometry.check_shares(SETTING, degree)
    what = f"tokens of a clip of {frames} latent frames of {geometry.width}x{geometry.height} pixels"
    check_shares(SETTING, degree, frames * geometry.tokens_per_frame, what)


def share_tokens(network: WanTransformer3DModel, group: SequenceGroup, name: str) -> None:
    """Split the tokens of `network` over `group` in its forward passes. Call it before FSDP."""
    if group.size == 1:
        return
    check_shares(SETTING, group.size, network.config.num_attention_heads, f"attention heads of the {name}")
    if isinstance(network, CausalWanModel):
        network.share_tokens(group)
        return
    network.rope.register_forward_hook(lambda module, args, out: tuple(group.split(x) for x in out))
    network.blocks[0].register_forward_pre_hook(lambda module, args: (group.split(args[0]), *args[1:]))
    network.proj_out.register_forward_hook(lambda module, args, out: group.gather(out))
    for block in split_blocks(network).blocks:
        block.sequence = group
