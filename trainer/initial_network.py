"""The networks that a distillation starts from: weights on the host, or random ones made on the device."""

import torch
from diffusers import WanTransformer3DModel

from configs.schema import Config
from model.sizes import RANDOM
from model.weights.random import random_transformer
from trainer.build import causal_student, score_network
from utils.seeds import stable_hash


def initial_network(
    config: Config, name: str, device: torch.device, dtype: torch.dtype = torch.float32, *, causal: bool = False
) -> WanTransformer3DModel:
    """What `training.init.<name>` names. `random:14B` is made on `device`, for speed and memory, and needs no file."""
    source = config.training.init.get(name, "")
    if source.startswith(RANDOM):
        seed = stable_hash(config.seed, "random", name)
        return random_transformer(source.removeprefix(RANDOM), device, dtype, causal=causal, seed=seed)
    return causal_student(config, name, dtype) if causal else score_network(config, name, dtype)
