"""What stages that train a VAE have in common: the loss, validation, the export."""

from abc import abstractmethod
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor

from configs.schema import Config
from configs.train_schema import CodecLossConfig
from model.codec import WanCodec
from model.weights.load import save_network
from trainer.build import vae
from trainer.stage import Supervised
from utils.distributed import Ranks
from utils.files import atomic_path
from utils.seeds import generator
from utils.video import contact_sheet


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each clip [B, ...], for values in [-1, 1]."""
    return 10 * torch.log10(4.0 / (a - b).square().flatten(1).mean(1))


def codec_loss(x: Tensor, y: Tensor, kl: Tensor, weights: CodecLossConfig) -> dict[str, Tensor]:
    """L = |d| + mse d^2 + chroma (d - mean of d over RGB)^2 + gradient |rows and columns of d, differenced|
    + temporal |frames of d, differenced| + kl KL.

    d = x - y of pixels and reconstruction [B, T, 3, H, W], each term a mean; kl: [B] nats a latent value.
    """
    d = x - y
    terms = {
        "l1": d.abs().mean(),
        "mse": d.square().mean(),
        "chroma": (d - d.mean(2, keepdim=True)).square().mean(),
        "gradient": (d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()) / 2,
        "temporal": d.diff(dim=1).abs().sum() / max(1, d[:, 1:].numel()),  # of a single frame, none
        "kl": kl.mean(),
    }
    loss = terms["l1"] + sum(vars(weights)[name] * term for name, term in terms.items() if name != "l1")
    return {"loss": loss} | terms


class CodecStage(Supervised):
    """Reconstruction through a sampled posterior. Latent statistics are measured and stored at export. A subclass gives
    the clips."""

    def __init__(self, config: Config, device: torch.device, ranks: Ranks):
        module = vae(config)
        if config.training.codec.decoder_only:
            module.encoder.requires_grad_(False)
            module.quant_conv.requires_grad_(False)
        super().__init__(config, device, ranks, module)
        self.codec = WanCodec(self.module)
        self._render_bank()

    @abstractmethod
    def _render_bank(self) -> None:
        """Make the clips that batches are drawn from."""

    @abstractmethod
    def _whole_clips(self, count: int) -> Tensor:
        """Unseen clips [count, 81, 3, H, W] in [-1, 1]."""

    def _noise(self, part: int, pixels: Tensor) -> Tensor:
        """Noise [B, F, C, h, w] for the posterior of clips [B, T, 3, H, W] of a micro-batch."""
        batch, frames, _, height, width = pixels.shape
        rng = generator(self.config.seed, "posterior", part, 0, device=self.device)
        shape = (batch, 1 + (frames - 1) // 4, self.codec.latent_channels, height // 8, width // 8)
        return torch.randn(shape, generator=rng, device=self.device)

    def loss(self, pixels: Tensor, eps: Tensor) -> dict[str, Tensor]:
        posterior = self.codec.posterior(pixels)
        z = posterior.mean + torch.exp(0.5 * posterior.logvar) * eps
        out = self.codec.decode_latents(z)
        kl = posterior.kl() / eps[0].numel()
        return codec_loss(pixels, out.float(), kl.float(), self.config.training.codec)

    @torch.no_grad()
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """PSNR in dB of unseen 81-frame clips."""
        codec, scores = WanCodec(self.averaged), []
        clips = self._whole_clips(self.config.training.validation_clips)
        for pixels in clips.split(8):
            out = codec.decode(codec.encode(pixels))
            scores.append(psnr(pixels, out))
        both = torch.cat([pixels[0], out[0]], dim=-1)[:: max(1, len(out[0]) // 18)]
        frames = ((both.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().cpu().numpy()
        folder.mkdir(parents=True, exist_ok=True)
        sheet: Image.Image = contact_sheet(frames, columns=6)
        with atomic_path(folder / f"codec_{step:06d}.png") as aside:
            sheet.save(aside)
        scores = torch.cat(scores)
        return {"psnr": scores.mean().item(), "psnr_worst": scores.min().item()}

    @torch.no_grad()
    def export(self, folder: Path, step: int) -> None:
        """Write the VAE with the mean and standard deviation of each latent channel, over 32 whole clips.

        Under an encoder that stays they stay, too.
        """
        module: AutoencoderKLWan = self.averaged
        card = {"stage": self.name, "step": step}
        if self.config.training.codec.decoder_only:
            save_network(module, folder, card=card)
            return
        codec = WanCodec(module)
        clips = self._whole_clips(32)
        z = torch.cat([codec.posterior(pixels).mean for pixels in clips.split(8)])
        channels = z.transpose(1, 2).transpose(0, 1).flatten(1).double()
        module.register_to_config(
            latents_mean=[round(v, 5) for v in channels.mean(1).tolist()],
            latents_std=[round(v, 5) for v in channels.std(1).tolist()],
        )
        save_network(module, folder, card=card)
