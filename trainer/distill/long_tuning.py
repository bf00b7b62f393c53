"""Long tuning: rollouts that are longer than the loss window.

    rollout   [ chunk 0 | chunk 1 | ... | chunk n-1 ]     the cache rolls over a window and a sink, as in streaming
    window                     [ first ............ ]     the last `video.num_latent_frames`; the loss sees these
    counted                            [ .......... ]     all but the window's first chunk, if it is not the rollout's

Chunks before the window run to their last step, as in a stream, and the window's first chunk has no graph. In
Self-Forcing's code they stop at their drawn exits, and that chunk has one; no configuration of it or of diagdistill
makes such rollouts.

Teacher and critic know clips that begin with the latent of a single image, so the window's first latent is replaced by
an encoding of the last pixel frame that it decodes to (Self-Forcing, arXiv 2506.08009); its chunk then has no gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from configs.errors import UserError
from configs.geometry import Geometry
from configs.schema import Config
from model.codec import Codec
from model.schedule import Schedule
from pipeline.rollout import clipped_exits, exit_steps, last_steps
from utils.seeds import generator

DECODED = 6  # latents that are decoded for the image that the window begins with, its own the last


class Plan(NamedTuple):
    """What is drawn for a rollout before it begins, equal on all ranks; hashable."""

    exits: tuple[int, ...]  # exit step of each chunk
    first_grad: int  # first chunk with a graph
    switch: int | None  # first chunk of the second prompt
    frames: slice | None  # latent frames of the window that count in the loss; None = all
    image: bool = False  # the rollout begins with a conditioning frame

    def __hash__(self) -> int:  # slices are not hashable before Python 3.12
        return hash((self.exits, self.first_grad, self.switch, str(self.frames), self.image))


class RolloutPlanner:
    """Draws plans as functions of (seed, name, step)."""

    def __init__(self, config: Config, schedule: Schedule, geometry: Geometry):
        self.config, self.schedule = config, schedule
        self.window = geometry.num_chunks(config.video.num_latent_frames)
        self.chunk_frames = geometry.chunk_frames
        long = config.training.distill.long
        self.shortest = self._chunks("min_frames", long.min_frames, geometry)
        self.longest = max(self._chunks("max_frames", long.max_frames, geometry), self.shortest)

    def _chunks(self, name: str, frames: int, geometry: Geometry) -> int:
        chunks = geometry.num_chunks(frames) if frames else self.window
        if chunks < self.window:
            raise UserError(
                f"training.distill.long.{name}={frames} is shorter than video.num_latent_frames="
                f"{self.window * geometry.chunk_frames}, which the loss looks at; make it at least that, or 0"
            )
        return chunks

    def draw(self, name: str, step: int) -> Plan:
        """Length, exits, prompt change and start of the rollout of `name` ("generator", "critic") at a step."""
        rng = generator(self.config.seed, "plan", name, step)
        share, length, switches, where = torch.rand(4, generator=rng, dtype=torch.float64).tolist()
        chunks = self.shortest + int(length * (self.longest - self.shortest + 1))
        d = self.config.training.distill
        before = chunks - self.window
        exits = last_steps(self.schedule, chunks)[:before] + self._exits(name, step, chunks, share)[before:]
        switch = 1 + int(where * before) if before and switches < d.long.switch_share else None
        counted = slice(self.chunk_frames, self.window * self.chunk_frames) if before else None
        drawn = torch.rand(1, generator=generator(self.config.seed, "image start", name, step), dtype=torch.float64)
        image = float(drawn) < self.config.training.image_start
        return Plan(exits, before + 1 if before else 0, switch, counted, image)

    def _exits(self, name: str, step: int, chunks: int, share: float) -> tuple[int, ...]:
        """Exit step of each chunk, as set by `training.distill.exit`."""
        how = self.config.training.distill.exit
        if how == "last":
            return last_steps(self.schedule, chunks)
        if how == "release":
            rng = generator(self.config.seed, "release exits", name, step)
            drawn = torch.randint(len(self.schedule.timesteps_by_chunk[-1]), (chunks,), generator=rng)
            return clipped_exits(self.schedule, drawn.tolist())
        return exit_steps(self.schedule, chunks, share)


def loss_window(x: Tensor, frames: int, codec: Codec) -> Tensor:
    """The last `frames` latents of x [B, F, C, H, W] as a clip of its own; x itself if it is no longer.

    The first of them is an encoding of the last pixel frame that it decodes to, without a graph.
    """
    start = x.shape[1] - frames
    if start == 0:
        return x
    with torch.no_grad():
        past = x[:, max(0, start + 1 - DECODED) : start + 1].detach()
        image = codec.encode(codec.decode(past)[:, -1:]).to(x.dtype)
    return torch.cat([image, x[:, start + 1 :]], dim=1)
