"""Prompts with random embeddings, for runs with random networks."""

from collections.abc import Sequence
from pathlib import Path

import torch

from configs.load import load_config
from model.encoded_text import EncodingJob
from trainer.prompt_bank import prompt_groups

WORDS = 120  # tokens of a prompt


def random_prompts(config_path: str | Path, settings: Sequence[str], folder: Path, dim: int) -> list[str]:
    """Write a file with 16 prompts to `folder`, and random embeddings of width `dim` for all prompts of a run with
    `settings`, in the format of scripts/encode_prompts.py. Returns the settings that select them."""
    file, encoded = folder / "prompts.txt", folder / "encoded"
    file.write_text("\n".join(f"prompt {i}" for i in range(16)) + "\n")
    named = [f"training.distill.prompts={file}", "model.text_encoder=none"]
    config = load_config(config_path, [*settings, *named])
    encoded.mkdir()
    about = {"encoder": "random", "encoder_path": "none", "prompts_file": None, "prompts_file_sha256": None}
    tokens = config.model.text_tokens
    job = EncodingJob(encoded, prompt_groups(config), text_tokens=tokens, dim=dim, dtype="bfloat16", about=about)
    g = torch.Generator().manual_seed(0)
    for index in job.pending():
        job.write(index, lambda prompts: [
            torch.randn(min(WORDS, tokens), dim, generator=g).bfloat16() for _ in prompts
        ])  # fmt: skip
    job.finish()
    return [*named, f"training.distill.encoded_prompts={encoded}"]
