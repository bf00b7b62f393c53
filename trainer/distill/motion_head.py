"""The trained head of the motion regression (losses.py)."""

from torch import Tensor, nn

from configs.distill_schema import MotionRegressionConfig


class MotionHead(nn.Module):
    """Motion [B, N, C, H, W] -> features of the same shape, frame by frame: convolutions with SiLU between them.

    A kernel of 1, as in diagdistill's commit 24ef1c9, makes it an MLP on the channels of each latent pixel. The loss
    can also be lowered by shrinking the features; only the lag of the EMA prevents that, as it does in that commit.
    """

    def __init__(self, config: MotionRegressionConfig, channels: int):
        super().__init__()
        widths = [channels, *[config.hidden] * (config.layers - 1), channels]
        parts: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            parts += [nn.Conv2d(before, after, config.kernel, padding=config.kernel // 2), nn.SiLU()]
        self.net = nn.Sequential(*parts[:-1])

    def forward(self, motion: Tensor) -> Tensor:
        return self.net(motion.flatten(0, 1).to(self.net[0].weight.dtype)).unflatten(0, motion.shape[:2])
