"""Prompts for training that needs no data, as embeddings."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from configs.schema import Config
from model.text import TextEncoder
from model.weight_files import resolve
from utils.prompts import read_prompts
from utils.seeds import stable_hash
from utils.tiny_world import TinyWorld, training_caption


def training_prompts(config: Config) -> list[str]:
    """Lines of `training.distill.prompts`, or `training.bank_clips` captions of the tiny world."""
    path = config.training.distill.prompts
    if path is not None:
        return read_prompts(resolve(Path(path)), "training.distill.prompts")
    world = TinyWorld(config.video.height, config.video.width)
    scenes = world.scenes(stable_hash(config.seed, "prompts"), config.training.bank_clips)
    return [training_caption(scene) for scene in scenes]


class PromptBank:
    """Embeddings [B, L, D] of prompts by index. `ahead`: made once and kept on the encoder's device."""

    def __init__(self, prompts: Sequence[str], encoder: TextEncoder, *, ahead: bool):
        self.prompts, self.encoder = list(prompts), encoder
        self.text = self._encode_all() if ahead else None

    def __len__(self) -> int:
        return len(self.prompts)

    def _encode_all(self) -> Tensor:
        parts = range(0, len(self.prompts), 64)
        bar = tqdm(parts, desc="encoding prompts", leave=False, disable=None)
        return torch.cat([self.encoder(self.prompts[i : i + 64]) for i in bar])

    def batch(self, index: Tensor) -> Tensor:
        """index: [B] integers on the CPU."""
        if self.text is None:
            return self.encoder([self.prompts[i] for i in index.tolist()])
        return self.text[index.to(self.text.device, non_blocking=True)]
