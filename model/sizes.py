"""Sizes of the published networks: Wan2.1's transformers and UMT5-XXL's encoder. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TransformerSize:
    """Sizes of a Wan transformer, and the numbers of parameters and bytes that follow from them."""

    dim: int
    ffn: int
    layers: int
    text_dim: int = 4096
    freq_dim: int = 256
    channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TransformerSize":
        """From a config.json in diffusers' format."""
        return cls(
            dim=config["num_attention_heads"] * config["attention_head_dim"],
            ffn=config["ffn_dim"],
            layers=config["num_layers"],
            text_dim=config["text_dim"],
            freq_dim=config["freq_dim"],
            channels=config["in_channels"],
            patch=tuple(config["patch_size"]),
        )

    @property
    def config(self) -> dict[str, int]:
        """Sizes as diffusers' Wan transformer takes them, with heads of HEAD_DIM."""
        heads = {"num_attention_heads": self.dim // HEAD_DIM, "attention_head_dim": HEAD_DIM}
        sizes = {"num_layers": self.layers, "ffn_dim": self.ffn, "text_dim": self.text_dim, "freq_dim": self.freq_dim}
        return heads | sizes

    @property
    def block_parameters(self) -> int:
        """Parameters of a block: 8 square matrices, 4 of their norms, feed-forward, affine norm, modulation."""
        d, f = self.dim, self.ffn
        return 8 * (d * d + d) + 4 * d + 2 * d * f + f + d + 2 * d + 6 * d

    @property
    def parameters(self) -> int:
        d, cell = self.dim, self.channels * self.patch[0] * self.patch[1] * self.patch[2]
        embeddings = (cell * d + d) + (self.text_dim * d + d) + (d * d + d)
        time = (self.freq_dim * d + d) + (d * d + d) + (6 * d * d + 6 * d)
        return self.layers * self.block_parameters + embeddings + time + 2 * d + (d * cell + cell)

    @property
    def fp32_parameters(self) -> int:
        """Parameters that diffusers keeps in float32: norms, modulation and the time embedding."""
        d = self.dim
        return self.layers * (2 * d + 6 * d) + 2 * d + (self.freq_dim * d + d) + (d * d + d)

    @property
    def inference_bytes(self) -> int:
        """Bytes of the weights in bfloat16, with `fp32_parameters` in float32."""
        return 2 * self.parameters + 2 * self.fp32_parameters

    @property
    def fp8_bytes(self) -> int:
        """`inference_bytes` with the linear layers of model/fp8.py in float8, in all blocks but the first and last."""
        return self.inference_bytes - (self.layers - 2) * (6 * self.dim**2 + 2 * self.dim * self.ffn)

    @property
    def offloaded_bytes(self) -> int:
        """`inference_bytes` on the GPU when blocks are offloaded to the host, two at a time (model/fast/offload.py)."""
        return self.inference_bytes - (self.layers - 2) * (2 * self.block_parameters + 2 * 8 * self.dim)


WAN_1_3B = TransformerSize(dim=1536, ffn=8960, layers=30)
WAN_14B = TransformerSize(dim=5120, ffn=13824, layers=40)
RANDOM = "random:"  # training.init.student=random:1.3B: random weights of that size, without a file
TRANSFORMER_SIZES = {"1.3B": WAN_1_3B, "14B": WAN_14B}  # by the names that command lines take
HEAD_DIM = 128  # width of an attention head in both
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
UMT5_XXL |= {"feed_forward_proj": "gated-gelu", "is_encoder_decoder": False}


def size_in_name(path: str) -> TransformerSize:
    """The published size that a file's name tells, as in `krea-realtime-video-14b.safetensors`; else that of 1.3B."""
    return next((size for name, size in TRANSFORMER_SIZES.items() if name.lower() in path.lower()), WAN_1_3B)
