"""Snapshots of a stream between two chunks, to restore or to branch from."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from configs.geometry import Geometry
from model.causal_wan import CausalWanModel
from pipeline.switch import CachedForward, TextState


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state of a StreamSession. Its tensors are never written again, so any number of snapshots may be kept."""

    identity: str  # of weights and sizes
    chunk: int  # the next chunk
    seeds: tuple[int, ...]
    text: TextState
    cache: Any  # of the session's cache
    passes: dict[int, CachedForward]  # by slot, for recaching
    decoder: Callable[[], Any]  # gives its state; waits for what was being decoded
    conditioning: Tensor | None = None  # latents of conditioning frames that are still to come

    def check(self, identity: str) -> None:
        """Raise a UserError if the snapshot is of another model or size."""
        if identity != self.identity:
            raise UserError(
                f"snapshot={self.identity} was taken from another model or size than this session's {identity}; "
                "restore it where it was taken"
            )


def identity(model: CausalWanModel, geometry: Geometry) -> str:
    """Ten hexadecimal digits that identify a student and the size of the video. Synchronizes with the GPU, since it
    reads the first and last weights.

    Adapters that are added or removed later do not change it.
    """
    digest = hashlib.sha256(repr((geometry, model.config.num_layers, model.config.num_attention_heads)).encode())
    for weight in (model.patch_embedding.weight, model.proj_out.weight):
        digest.update(_bytes(weight))
    return digest.hexdigest()[:10]


def _bytes(x: Tensor) -> bytes:
    """Content of a tensor of any dtype."""
    return x.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
