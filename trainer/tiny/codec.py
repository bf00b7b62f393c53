"""Stage `codec`: train the tiny VAE on clips of the tiny world."""

import torch
from torch import Tensor

from trainer.clips import draw
from trainer.codec import CodecStage
from trainer.tiny.data import PixelBank
from trainer.tiny.world import TinyWorld
from utils.seeds import generator, stable_hash


class TinyCodec(CodecStage):
    """Clips of several lengths, whole or cut out around the subject."""

    name = "codec"

    def _render_bank(self) -> None:
        c = self.config
        self.world = TinyWorld(c.video.height, c.video.width)
        frames = max(c.training.codec.clip_frames)
        self.bank = PixelBank(self.world, c.training.bank_clips, frames, c.seed, self.device)

    def plan(self, step: int) -> int:
        """Length of the step's clips in frames."""
        rng = generator(self.config.seed, "clips", step * self.micro_batches * self.ranks.world, 0)
        lengths = self.config.training.codec.clip_frames
        return lengths[int(torch.randint(len(lengths), (), generator=rng))]

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        """`micro_batch` clips of the shortest length, or as many longer ones as have no more frames."""
        codec, frames = self.config.training.codec, self.plan(step)
        part = self.part(step, micro)
        rng = generator(self.config.seed, "clips", part, 0)
        torch.randint(1, (), generator=rng)  # the length's place
        size = max(1, self.config.training.micro_batch * min(codec.clip_frames) // frames)
        index = draw(len(self.bank.pixels), size, self.config.seed, part, self.device)
        pixels = self.bank.batch(index, frames, codec.crop, rng)
        return {"pixels": pixels, "eps": self._noise(part, pixels)}

    def _whole_clips(self, count: int) -> Tensor:
        scenes = self.world.scenes(stable_hash(self.config.seed, "validation"), count)
        return self.world.render(scenes, 81, device=self.device)
