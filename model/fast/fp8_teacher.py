"""A frozen bidirectional network with its large linear layers in float8, and the error of that."""

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from model.denoiser import ScoreModel
from model.fast.ops import quantize_rows
from model.fp8 import Fp8Linear, quantize_blocks

PROBE_TIMESTEPS = (250.0, 500.0, 750.0)  # timesteps of the probe
PROBE = (3, 16, 24)  # its latent frames, height and width
PROBE_TEXT_TOKENS = 32  # text tokens of the probe


class FrozenFp8Linear(Fp8Linear):
    """Fp8Linear that quantizes its inputs in one kernel, compiled or not."""

    def quantize_input(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_rows(rows, False)


def quantize_network(network: WanTransformer3DModel) -> str:
    """Quantize `network` in place, also on the meta device; returns a summary for the log."""
    return quantize_blocks(network.blocks, kind=FrozenFp8Linear)


@torch.no_grad()
def quantize_and_compare(network: WanTransformer3DModel) -> tuple[str, dict[float, float]]:
    """`quantize_network`, and its error ||v - v before|| / ||v before|| for noise under random text, by timestep."""
    before = _probe(network)
    summary = quantize_network(network)
    error = _probe(network) - before
    errors = error.flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    return summary, dict(zip(PROBE_TIMESTEPS, errors.tolist(), strict=True))


def _probe(network: WanTransformer3DModel) -> Tensor:
    rng, config = torch.Generator().manual_seed(0), network.config
    frames, height, width = PROBE
    x = torch.randn(1, frames, config.in_channels, height, width, generator=rng).to(network.device)
    text = torch.randn(1, PROBE_TEXT_TOKENS, config.text_dim, generator=rng).to(network.device)
    n = len(PROBE_TIMESTEPS)
    times = torch.tensor(PROBE_TIMESTEPS, device=network.device)
    return ScoreModel(network).v(x.expand(n, -1, -1, -1, -1), times, text.expand(n, -1, -1)).double()
