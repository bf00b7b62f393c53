"""What the flow loss compares: heads on the motion [B, N, C, H, W] between neighbouring latent frames.

    difference   the motion itself
    conv         a fixed bank of filters at several scales: where motion is coherent, smooth and edge responses are
                 large; where it is noise they average out
    learned      the motion plus what a small network adds, which is trained beside the student to predict the
                 teacher's motion from the critic's; the loss uses its moving average, frozen
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.distill_schema import FlowLossConfig


class Difference(nn.Module):
    """The identity."""

    def forward(self, motion: Tensor) -> Tensor:
        return motion


class FilterBank(nn.Module):
    """[B, N, C, H, W] -> [B, N, C x 7, H, W]: each channel as it is, smoothed and differentiated at dilations 1 and 2.

    3x3 binomial and Sobel filters of unit L1 norm, edges replicated. No parameters.
    """

    dilations = (1, 2)

    def __init__(self):
        super().__init__()
        smooth, slope = torch.tensor([1.0, 2.0, 1.0]) / 4, torch.tensor([-1.0, 0.0, 1.0]) / 2
        filters = [torch.outer(a, b) for a, b in ((smooth, smooth), (smooth, slope), (slope, smooth))]
        self.register_buffer("filters", torch.stack(filters)[:, None], persistent=False)  # [3, 1, 3, 3]

    def forward(self, motion: Tensor) -> Tensor:
        b, n, c, h, w = motion.shape
        x = motion.reshape(b * n * c, 1, h, w)
        parts = [x]
        for d in self.dilations:
            padded = F.pad(x, (d, d, d, d), mode="replicate")
            parts.append(F.conv2d(padded, self.filters.to(x.dtype), dilation=d))
        return torch.cat(parts, dim=1).reshape(b, n, -1, h, w)


class LearnedHead(nn.Module):
    """motion + net(motion), frame by frame: two 3x3 convolutions and a pointwise MLP, the last layer zero at first."""

    def __init__(self, channels: int, width: int = 64):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 1),
            nn.SiLU(),
            nn.Conv2d(width, channels, 1),
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, motion: Tensor) -> Tensor:
        x = motion.flatten(0, 1)
        weight = self.net[0].weight.dtype
        return motion + self.net(x.to(weight)).to(x.dtype).unflatten(0, motion.shape[:2])

    def loss(self, fake_motion: Tensor, real_motion: Tensor) -> Tensor:
        """mean (P(f) - r)^2: learn what the teacher makes of the motion that the critic sees. For its own optimiser."""
        return F.mse_loss(self(fake_motion.detach()).float(), real_motion.detach().float())


def build_head(config: FlowLossConfig, channels: int) -> nn.Module:
    """The head that `config.head` names, for latents of `channels` channels."""
    return {"difference": Difference, "conv": FilterBank, "learned": lambda: LearnedHead(channels)}[config.head]()
