"""Prompts for training that needs no data, as embeddings."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from configs.errors import UserError
from configs.schema import Config
from model.encoded_text import EncodedText
from model.text import TextEncoder
from model.weights.files import resolve_path
from trainer.build import frozen_text_encoder
from trainer.pairs import open_pairs
from trainer.parallel.apply import ParallelPlan
from trainer.parallel.sharded_weights import sharded_text_encoder
from trainer.tiny.world import TinyWorld, training_caption
from utils.prompts import read_prompts
from utils.seeds import stable_hash


def training_prompts(config: Config) -> list[str]:
    """Lines of `training.distill.prompts`, or `training.bank_clips` captions of the tiny world."""
    t = config.training
    if t.distill.prompts is not None:
        return read_prompts(resolve_path(Path(t.distill.prompts)), "training.distill.prompts")
    world = TinyWorld(config.video.height, config.video.width)
    scenes = world.scenes(stable_hash(config.seed, "prompts"), t.bank_clips)
    return [training_caption(scene, open_share=t.open_captions) for scene in scenes]


def validation_prompts(config: Config, prompts: Sequence[str]) -> list[str]:
    """Prompts of validation clips: the first training prompts, or unseen captions of the tiny world."""
    count = config.training.validation_clips
    if config.training.distill.prompts is not None:
        return list(prompts[:count])
    return TinyWorld(config.video.height, config.video.width).prompts(config.seed + 1, count)


def prompt_groups(config: Config) -> list[list[str]]:
    """All prompts that a run encodes: for training, trajectories, guidance (two negative ones) and validation."""
    d, prompts = config.training.distill, training_prompts(config)
    pairs = [] if d.pairs is None else open_pairs("training.distill.pairs", d.pairs).prompts
    return [prompts, pairs, [d.negative_prompt], [""], validation_prompts(config, prompts)]


def text_source(config: Config, parallel: ParallelPlan) -> TextEncoder | EncodedText:
    """The frozen text encoder, sharded if the run is; or the embeddings in `training.distill.encoded_prompts`."""
    path = config.training.distill.encoded_prompts
    if path is None:
        sharded = parallel.mesh is not None
        return sharded_text_encoder(config, parallel) if sharded else frozen_text_encoder(config, parallel.device)
    encoded = EncodedText(path, config.model, parallel.device)
    encoded.require(prompt for group in prompt_groups(config) for prompt in group)
    return encoded


def check_text_dim(text: TextEncoder | EncodedText, wanted: int) -> None:
    """Refuse embeddings whose width does not fit the networks."""
    if text.dim != wanted:
        raise UserError(
            f"model.text_encoder gives embeddings of width {text.dim} and training.init.student takes {wanted}; "
            f"name the text encoder (or the training.distill.encoded_prompts) that belongs to it"
        )


class PromptBank:
    """Embeddings [B, L, D] of prompts by index. ahead: encode all at once, and keep them on the encoder's device."""

    def __init__(self, prompts: Sequence[str], encoder: TextEncoder | EncodedText, *, ahead: bool):
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
