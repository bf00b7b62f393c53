"""The trained head of the motion regression (losses.py)."""

from torch import Tensor, nn

HIDDEN = 64  # channels


class MotionHead(nn.Module):
    """Motion [B, N, C, H, W] -> features of the same shape: an MLP on the channels of each latent pixel.

    Its sizes are those of diagdistill's commit 24ef1c9. The loss can also be lowered by shrinking the features; only
    the lag of the EMA prevents that, as it does in that commit.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(channels, HIDDEN, 1), nn.SiLU(), nn.Conv2d(HIDDEN, channels, 1))

    def forward(self, motion: Tensor) -> Tensor:
        return self.net(motion.flatten(0, 1).to(self.net[0].weight.dtype)).unflatten(0, motion.shape[:2])
