"""A stream's state between two chunks, to go back to and branch from."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from configs.geometry import Geometry
from model.cache import CacheState
from model.causal_wan import CausalWanModel
from pipeline.switch import CachedForward, TextState


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that a StreamSession carries. Nothing in it is written to later, so any number may be kept."""

    identity: str  # of weights and sizes
    chunk: int  # the next one to be made
    seeds: tuple[int, ...]
    text: TextState
    cache: CacheState
    passes: dict[int, CachedForward]  # by slot, for recaching
    decoder: Any
    conditioning: Tensor | None = None  # what the stream began with, as long as it is not played

    def check(self, identity: str) -> None:
        """UserError where this was taken from another model, or at another size."""
        if identity != self.identity:
            raise UserError(
                f"snapshot={self.identity} was taken from another model or size than this session's {identity}; "
                "restore it where it was taken"
            )


def identity(model: CausalWanModel, geometry: Geometry) -> str:
    """Ten digits that tell a student at a size from others. Reads the first and last weights back: waits for the GPU.

    Adapters put on or taken off later do not change it.
    """
    digest = hashlib.sha256(repr((geometry, model.config.num_layers, model.config.num_attention_heads)).encode())
    for weight in (model.patch_embedding.weight, model.proj_out.weight):
        digest.update(_bytes(weight))
    return digest.hexdigest()[:10]


def _bytes(x: Tensor) -> bytes:
    """Content of a tensor of any dtype."""
    return x.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
