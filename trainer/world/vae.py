"""Stage `world_vae`: train the small VAE on the moving world, on single frames first and then on clips.

Temporal context is learnt only once single frames are (trainer/build.py:initialise_vae starts it as a codec of those):
the first `training.codec.stills` of the steps see nothing else. Two steps in three see squares around the subject, the
others whole frames.
"""

from pathlib import Path

import torch
from torch import Tensor

from model.codec import WanCodec
from trainer.clips import draw
from trainer.codec import CodecStage
from trainer.world.data import Pixels, validation_clips
from trainer.world.measures import measure, score_measured
from trainer.world.scene import CLIP_FRAMES, World, caption, poses
from utils.seeds import generator, stable_hash

WHOLE_SHARE = 1 / 3  # of the steps that see whole frames
BOX = 1.5  # half side of a subject's box, in sizes


class WorldVAE(CodecStage):
    """Squares around the subject, and whole frames."""

    name = "world_vae"

    def _render_bank(self) -> None:
        c = self.config
        self.world = World(c.video.height, c.video.width)
        frames = max(c.training.codec.clip_frames)
        self.bank = Pixels(self.world, c.training.bank_clips, frames, c.seed, self.device)

    def plan(self, step: int) -> tuple[int, int]:
        """Frames of the step's clips, and the side of its squares (0 = whole frames)."""
        knobs = self.config.training.codec
        rng = generator(self.config.seed, "clips", step, 0)
        lengths = [1] if step < knobs.stills * self.config.training.steps else knobs.clip_frames
        frames = lengths[int(torch.randint(len(lengths), (), generator=rng))]
        return frames, 0 if float(torch.rand((), generator=rng)) < WHOLE_SHARE else knobs.crop

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        """`micro_batch` squares of the shortest clips, or as many longer or larger ones as have no more pixels."""
        knobs, t, (frames, crop) = self.config.training.codec, self.config.training, self.plan(step)
        area = (crop or self.world.height) * (crop or self.world.width)
        size = max(1, t.micro_batch * min(knobs.clip_frames) * max(crop, knobs.crop) ** 2 // (frames * area))
        part = self.part(step, micro)
        index = draw(len(self.bank.pixels), size, self.config.seed, part, torch.device("cpu"))
        cut = generator(self.config.seed, "cut", part, 0)
        pixels = self.bank.batch(index, frames, crop, cut)
        return {"pixels": pixels, "eps": self._noise(part, pixels)}

    def _whole_clips(self, count: int) -> Tensor:
        return validation_clips(self.world, count, self.config.seed, self.device)

    @torch.no_grad()
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """PSNR in dB of unseen clips, over frames and within the subject's box; how well they are still read, the
        tremble of outlines and the seams, each over that of the rendered clips."""
        figures = super().validate(step, folder)
        count = self.config.training.validation_clips
        scenes = self.world.scenes(stable_hash(self.config.seed, "validation"), count)
        codec, captions = WanCodec(self.averaged), [caption(scene) for scene in scenes]
        clips = self._whole_clips(count)
        through = torch.cat([codec.decode(codec.encode(part)) for part in clips.split(8)])
        inside = subject_boxes(self.world, scenes, CLIP_FRAMES).to(self.device)[:, :, None]
        error = ((clips - through).square() * inside).flatten(1).sum(1) / (3 * inside.flatten(1).sum(1))
        figures["psnr_box"] = (10 * torch.log10(4.0 / error)).mean().item()
        before, after = ({k: v.cpu() for k, v in measure(x).items()} for x in (clips, through))
        read = score_measured(captions, after).columns
        figures |= {f"read_{name}": read[name].value for name in ("shape", "motion", "all")}
        figures["jitter_ratio"] = float(after["jitter"].nanmean() / before["jitter"].nanmean())
        return figures


def subject_boxes(world: World, scenes: list, frames: int) -> Tensor:
    """float [B, T, H, W]: 1 within BOX sizes of the subject's middle, both ways."""
    pose = poses(scenes, range(frames))
    x, y, half = (torch.from_numpy(v).float()[..., None, None] for v in (pose.x, pose.y, BOX * pose.size))
    columns, rows = torch.arange(world.width) + 0.5, (torch.arange(world.height) + 0.5)[:, None]
    return (((columns - x).abs() < half) & ((rows - y).abs() < half)).float()
