"""Networks that a stage starts from: what `training.init` names, or `model.*`, loaded or fresh.

`training.init` maps a module's name to weights (a folder or file that model/weights/load.py reads) or to a
`config.json`, which gives a network of those sizes with fresh weights drawn from (seed, name).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualBlock
from torch import nn

from configs.errors import UserError
from configs.load import CHECKOUT
from configs.schema import Config
from model.causal_wan import CausalWanModel
from model.codec import WanCodec
from model.text import TextEncoder, word_tokenizer
from model.weights.load import load_score, load_student, load_text_encoder, load_vae, new_network
from utils.seeds import stable_hash

CPU = torch.device("cpu")


def _source(config: Config, name: str) -> Path:
    sources = config.training.init
    if name not in sources:
        raise UserError(
            f"training.init.{name} is not set and stage {config.training.stage} needs it; "
            f"give a folder of weights, or a config.json for a fresh network"
        )
    path = Path(sources[name])
    return path if path.is_absolute() else CHECKOUT / path


@contextmanager
def seeded(config: Config, name: str) -> Iterator[None]:
    """Weights made in the block are drawn from (seed, name), whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_hash(config.seed, "init", name))
        yield


def _fresh(config: Config, name: str, path: Path, *, causal: bool = False) -> nn.Module:
    """A network with fresh weights, of the sizes in the config.json `path`."""
    if not path.is_file():
        raise UserError(f"training.init.{name}={path} does not exist; give a config.json or a folder of weights")
    with seeded(config, name):
        return new_network(path, causal=causal)


def score_network(config: Config, name: str, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """A bidirectional network (teacher, critic) on the CPU; a fresh one is in float32 whatever `dtype` says."""
    path = _source(config, name)
    if path.suffix == ".json":
        return _fresh(config, name, path)
    return load_score(path, CPU, dtype, name=f"training.init.{name}")


def causal_student(config: Config, name: str, dtype: torch.dtype = torch.float32) -> CausalWanModel:
    """A causal network on the CPU, a fresh one in float32; any Wan transformer of its sizes can be its start."""
    path = _source(config, name)
    if path.suffix == ".json":
        return _fresh(config, name, path, causal=True)
    return load_student(path, CPU, dtype, name=f"training.init.{name}")


@torch.no_grad()
def initialise_vae(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Start a fresh VAE so that it learns from the first step on, and stills before clips.

    It begins as a codec of single frames: kernels look at the present frame alone, time is down-sampled by taking the
    newest frame and up-sampled by repeating. Residual branches begin small and the posterior sharp: torch's defaults
    shrink the signal by sqrt(3) in each convolution of the trunk, and a unit variance drowns it in noise. Biases stay
    as they are.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        elif isinstance(module, nn.Conv3d):
            present = torch.empty_like(module.weight[:, :, -1])
            nn.init.kaiming_normal_(present, nonlinearity="linear")
            module.weight.zero_()[:, :, -1] = present
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            module.conv2.weight.mul_(0.1)
        elif isinstance(module, WanResample) and module.mode in ("downsample3d", "upsample3d"):
            kernel, copies = module.time_conv.weight, module.time_conv.out_channels // module.dim
            kernel.zero_()[:, :, -1, 0, 0] = torch.eye(module.dim).repeat(copies, 1)
            module.time_conv.bias.zero_()
    vae.quant_conv.weight[vae.config.z_dim :].mul_(0.1)
    vae.quant_conv.bias[vae.config.z_dim :].fill_(-6.0)  # log variance
    return vae


def vae(config: Config) -> AutoencoderKLWan:
    """The VAE to train, in float32 on the CPU."""
    path = _source(config, "vae")
    if path.suffix == ".json":
        fresh = _fresh(config, "vae", path)
        with seeded(config, "vae weights"):
            return initialise_vae(fresh)
    return load_vae(path, CPU, torch.float32)


def trained_text_encoder(config: Config, vocabulary: Sequence[str]) -> TextEncoder:
    """The small text encoder to train, with the words of its world."""
    path = _source(config, "text_encoder")
    encoder = _fresh(config, "text_encoder", path)
    return TextEncoder(encoder, word_tokenizer(vocabulary), config.model.text_tokens)


def frozen_text_encoder(config: Config, device: torch.device) -> TextEncoder:
    """The text encoder that conditions, float32, without gradients."""
    m = config.model
    text = load_text_encoder(m.text_encoder, m.tokenizer, m.text_tokens, device, torch.float32)
    text.encoder.eval().requires_grad_(False)
    return text


def frozen_codec(config: Config, device: torch.device) -> WanCodec:
    """The VAE that makes latents, float32, without gradients."""
    return WanCodec(load_vae(config.model.vae, device, torch.float32).eval().requires_grad_(False))
