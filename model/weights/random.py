"""Networks of the published sizes with random weights, drawn on the device, to measure speed and memory without files.

The weights are scaled so that activations are of order one; the same seed gives the same weights.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from configs.errors import UserError
from configs.schema import Config
from model.causal_wan import CausalWanModel
from model.codec import Codec, WanCodec
from model.sizes import TRANSFORMER_SIZES, UMT5_XXL
from model.tiny_decoder import TinyDecoder, TinyDecoderCodec, cast_to_best_dtype
from model.weights.files import StoredTensors, read_json, resolve_path
from model.weights.load import materialize
from model.weights.plans import WeightPlan, unique_state_dict

TINY = "configs/networks/tiny_{}.json"


def random_plan(
    build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype, seed: int | None = 0
) -> WeightPlan:
    """A plan without files: tensors are drawn on `device`, one by one, as they are read. seed: None = zeros."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in unique_state_dict(build()).items()}
    g = None if seed is None else torch.Generator(device).manual_seed(seed)

    def draw(name: str) -> Tensor:
        shape = shapes[name]
        if g is None:
            return torch.zeros(shape, device=device, dtype=dtype)
        if "norm" in name and name.endswith(("weight", "gamma")):
            return torch.ones(shape, device=device, dtype=dtype)
        spread = max(1, torch.Size(shape[1:]).numel()) ** -0.5 if len(shape) > 1 else 0.02
        return torch.randn(shape, generator=g, device=device, dtype=dtype).mul_(spread)

    return WeightPlan(path=Path("random"), kind="random", build=build, tensors=StoredTensors((), shapes, draw))


def random_network(
    build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype, seed: int | None = 0
) -> nn.Module:
    """The network of `build` with weights drawn on `device`; its library's float32 parts are float32."""
    return materialize(random_plan(build, device, dtype, seed), device, dtype)


def random_transformer(
    size: str, device: torch.device, dtype: torch.dtype, *, causal: bool, seed: int | None = 0
) -> WanTransformer3DModel:
    """A student (causal) or a score network of `size`; `14B/2` is two layers of full width."""
    return materialize(transformer_plan(size, device, dtype, causal=causal, seed=seed), device, dtype)


def transformer_plan(
    size: str, device: torch.device, dtype: torch.dtype, *, causal: bool, seed: int | None = 0
) -> WeightPlan:
    """The plan of such a network, whose weights are not drawn yet."""
    sizes = transformer_sizes(size)
    kind = CausalWanModel if causal else WanTransformer3DModel
    return random_plan(lambda: kind.from_config(sizes), device, dtype, seed)


def transformer_sizes(size: str) -> dict[str, Any]:
    """The config.json of tiny, 1.3B, 14B, or of fewer layers of one of them."""
    name, _, layers = size.partition("/")
    if name not in ("tiny", *TRANSFORMER_SIZES) or not (layers.isdecimal() or layers == ""):
        raise UserError(
            f"network size {size} is unknown; use tiny, {', '.join(TRANSFORMER_SIZES)}, or 14B/2 for two layers"
        )
    if name == "tiny":
        sizes = dict(read_json("network", resolve_path(TINY.format("transformer"))))
    else:
        sizes = TRANSFORMER_SIZES[name].config
    return sizes | ({"num_layers": int(layers)} if layers else {})


def random_codec(config: Config, size: str, device: torch.device, dtype: torch.dtype) -> Codec:
    """The codec that `model.codec` names."""
    if config.model.codec == "taehv":
        return TinyDecoderCodec(cast_to_best_dtype(random_network(TinyDecoder, device, torch.float32), dtype))
    sizes = read_json("network", resolve_path(TINY.format("vae"))) if size == "tiny" else {}
    return WanCodec(random_network(lambda: AutoencoderKLWan.from_config(sizes), device, dtype))


def random_umt5(size: str, device: torch.device, dtype: torch.dtype, seed: int | None = 0) -> UMT5EncoderModel:
    """The text encoder; XXL unless the size is tiny."""
    sizes = read_json("network", resolve_path(TINY.format("text_encoder"))) if size == "tiny" else UMT5_XXL
    return random_network(lambda: UMT5EncoderModel(UMT5Config.from_dict(dict(sizes))), device, dtype, seed)


class RandomTextEncoder:
    """Replaces a text encoder: random embeddings that depend on the length of the prompt."""

    known_words: tuple[str, ...] = ()

    def __init__(self, tokens: int, dim: int, device: torch.device):
        self.text_tokens, self.dim, self.device = tokens, dim, device

    def to(self, *args: Any) -> "RandomTextEncoder":
        return self

    def count_tokens(self, prompt: str) -> int:
        return len(prompt.split())

    def unknown_words(self, prompt: str) -> list[str]:
        return []

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """[B, text_tokens, dim] on the device, zeros after as many rows as the prompt has words."""
        rows = torch.zeros(len(prompts), self.text_tokens, self.dim)
        for row, prompt in zip(rows, prompts, strict=True):
            words = min(self.text_tokens, self.count_tokens(prompt))
            row[:words] = torch.randn(words, self.dim, generator=torch.Generator().manual_seed(len(prompt)))
        return rows.to(self.device)
