"""The trained head through which motion is compared in the regression on a frozen student (losses.py)."""

from torch import Tensor, nn

from configs.distill_schema import MotionRegressionConfig


class MotionHead(nn.Module):
    """Motion [B, N, C, H, W] -> features of the same shape, frame by frame: convolutions with SiLU between them.

    With a kernel of 1, as in diagdistill's commit 24ef1c9, an MLP on the channels of each latent pixel. The loss asks
    of it only that the student's features be like those of its own average, so it can also make them small; what keeps
    it from that is the average's lag and nothing else, there as here.
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
