"""Stage `ode_regression`: a causal student learns the teacher's ODE trajectories (CausVid, arXiv 2412.07772; the
initialisation of Self-Forcing).

    L = mean | x0(x_t, t) - x_0 |^2      a state x_t of the trajectory drawn for each chunk, x_0 its end

One forward pass over the clip, in which a chunk is conditioned on earlier chunks at their own timesteps. With causal
trajectories (scripts/generate_ode_pairs.py --causal) it is conditioned on their clean ends instead, noised to one of
`training.flow.context_timesteps` as in diagonal forcing, and trained at the timesteps of its schedule.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.errors import UserError
from configs.geometry import Geometry
from configs.schema import Config
from model.causal_wan import chunk_causal_mask
from model.flow import add_noise, x0_from_v
from model.schedule import Schedule
from model.weights.load import save_network
from trainer.build import causal_student, frozen_codec, frozen_text_encoder
from trainer.pairs import open_pairs
from trainer.prompt_bank import PromptBank
from trainer.stage import Supervised
from trainer.tiny.world import TinyWorld
from trainer.validation import causal_clips, evaluate_clips
from utils.distributed import Ranks
from utils.seeds import generator


class ODERegression(Supervised):
    """Trajectories come from `training.distill.pairs`."""

    name = "ode_regression"

    def __init__(self, config: Config, device: torch.device, ranks: Ranks):
        d = config.training.distill
        if d.pairs is None:
            raise UserError("training.distill.pairs is not set; stage ode_regression learns from them: name a folder")
        super().__init__(config, device, ranks, causal_student(config, "student"))
        self.geometry = Geometry.from_config(config).for_network(self.module.config)
        self.schedule = Schedule.from_config(config.schedule, config.stream)
        self.codec, self.encoder = frozen_codec(config, device), frozen_text_encoder(config, device)
        self.pairs = open_pairs("training.distill.pairs", d.pairs)
        self.prompts = PromptBank(self.pairs.prompts, self.encoder, ahead=d.encode_ahead)
        self.frames = config.video.num_latent_frames
        self.causal = self.pairs.causal
        kind = "flex" if device.type == "cuda" else "dense"
        self.mask = chunk_causal_mask(self.geometry, self.frames, device, teacher_forcing=self.causal, kind=kind)
        self.frame_ids = torch.arange(self.frames, device=device).repeat(2 if self.causal else 1)
        self.noisy = torch.tensor([t for t in self.pairs.timesteps if t > 0], device=device)
        self.rows = [self._row(chunk) for chunk in range(self.geometry.num_chunks(self.frames))]

    def _row(self, chunk: int) -> Tensor:
        """Indices into `noisy` of the states that a chunk is trained on."""
        if not self.causal:
            return torch.arange(len(self.noisy))
        row = self.schedule.timesteps(chunk)
        gaps = (self.noisy.cpu() - torch.tensor(row)[:, None]).abs().min(dim=1)
        if gaps.values.max() > 0.01:
            raise UserError(
                f"training.distill.pairs={self.config.training.distill.pairs} lacks states at timesteps {row} of chunk "
                f"{chunk}; make them with this schedule"
            )
        return gaps.indices

    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        size = self.config.training.micro_batch
        part = (micro * self.ranks.world) + self.ranks.rank
        host = generator(self.config.seed, self.name, step, part)
        index = torch.randint(len(self.pairs), (size,), generator=host)
        drawn = [row[torch.randint(len(row), (size,), generator=host)] for row in self.rows]
        state = torch.stack(drawn, dim=1).to(self.device).repeat_interleave(self.geometry.chunk_frames, dim=1)  # [B, F]
        states = self.pairs.read(index.tolist()).to(self.device).float()
        rows, frames = torch.arange(size, device=self.device)[:, None], torch.arange(self.frames, device=self.device)
        x_t, text = states[rows, state, frames], self.prompts.batch(index)
        batch = {"x_t": x_t, "t": self.noisy[state], "target": states[:, -1], "text": text}
        return batch | self._noised_context(batch["target"], host) if self.causal else batch

    def _noised_context(self, ends: Tensor, host: torch.Generator) -> dict[str, Tensor]:
        """The noised clean ends [B, F, C, H, W] that later chunks are conditioned on, and their timesteps [B, F]."""
        levels = torch.tensor(self.config.training.flow.context_timesteps)
        t = levels[torch.randint(len(levels), (len(ends), 1), generator=host)].expand(-1, self.frames).to(self.device)
        eps = torch.randn(ends.shape, generator=host).to(self.device)
        return {"context": add_noise(ends, eps, t), "context_t": t}

    def loss(
        self, x_t: Tensor, t: Tensor, target: Tensor, text: Tensor, context: Tensor | None = None,
        context_t: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        x, times = x_t, t
        if context is not None:
            x, times = torch.cat([context, x_t], dim=1), torch.cat([context_t, t], dim=1)
        v = self.module(x, times, text, mask=self.mask, frame_ids=self.frame_ids)[:, -self.frames :]
        return {"loss": F.mse_loss(x0_from_v(x_t, v.float(), t), target)}

    @torch.no_grad()
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Score clips generated as in inference."""
        world = TinyWorld(self.config.video.height, self.config.video.width)
        prompts = world.prompts(self.config.seed + 1, self.config.training.validation_clips)
        frames = causal_clips(self.averaged, self.codec, self.encoder, prompts, self.schedule, self.config)
        return evaluate_clips(prompts, frames, folder / f"{self.name}_{step:06d}.png")

    def export(self, folder: Path, step: int) -> None:
        card = {"stage": self.name, "step": step, "schedule": self.schedule.to_dict()}
        save_network(self.averaged, folder, card=card)
