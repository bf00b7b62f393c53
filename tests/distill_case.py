"""A distillation of random tiny networks that takes a second: shared by the tests of the stage."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from warnings import catch_warnings, simplefilter

import torch
from conftest import TEXT_TOKENS, network_config
from diffusers import WanTransformer3DModel

from configs.load import load_config
from configs.schema import Config
from trainer.distill.stage import Distill
from trainer.registry import build_stage
from utils.distributed import Ranks

CPU = torch.device("cpu")
BASE = "configs/train_tiny_distill.yaml"


def distill_settings(assets: Path) -> list[str]:
    """32x48 pixels, 4 chunks, 2-layer networks; the teacher is another network than the student."""
    teacher = assets / "teacher"
    if not teacher.exists():
        torch.manual_seed(11)
        sizes = network_config("tiny_transformer") | {"num_layers": 2, "ffn_dim": 128}
        sizes = {k: v for k, v in sizes.items() if not k.startswith("_")}
        WanTransformer3DModel(**sizes).save_pretrained(teacher)
    values = {
        "device": "cpu",
        "video": "{height: 32, width: 48, num_latent_frames: 12}",
        "stream": "{window_frames: 9}",
        "model": {
            "student": str(assets / "student"), "vae": str(assets / "vae"), "text_tokens": TEXT_TOKENS,
            "text_encoder": str(assets / "text_encoder"), "tokenizer": str(assets / "text_encoder"),
        },
        "training.init": {"student": str(assets / "student"), "teacher": str(teacher)},
        "training": {
            "steps": 6, "global_batch": 2, "micro_batch": 2, "bank_clips": 8, "validation_clips": 0, "log_every": 1,
            "checkpoint_every": 0, "validate_every": 0, "cuda_graphs": False, "ema_start_step": 1,
        },
        "training.optimizer": {"lr": 1e-3, "warmup_steps": 0},
        "training.image_start": 0.0,
        "training.distill.critic_warmup": 0,
        "training.distill.dfake_gen_update_ratio": 3,
        "training.distill.guidance": 3.0,
        "training.open_captions": 0.0,
    }  # fmt: skip
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def distill_config(assets: Path, *overrides: str) -> Config:
    return load_config(BASE, [*distill_settings(assets), *overrides])


def distill_stage(assets: Path, *overrides: str, ranks: Ranks | None = None, device: torch.device = CPU) -> Distill:
    return build_stage(distill_config(assets, *overrides), device, ranks or Ranks())


@contextmanager
def without_warnings() -> Iterator[None]:
    """Nothing may warn in it, also of what torch says once in a process."""
    torch.set_warn_always(True)
    try:
        with catch_warnings(record=True) as given:
            simplefilter("always")
            yield
    finally:
        torch.set_warn_always(False)
    assert not given, [str(warning.message) for warning in given]
