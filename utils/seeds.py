"""Random numbers as functions of (seed, names), independent of what was drawn before."""

import hashlib
import json
import os
import secrets

import torch

from configs.errors import UserError
from utils.distributed import Ranks

RANDOM_SEED = -1  # in place of a seed: draw one
LARGEST_DRAWN = 2**31


def stable_hash(seed: int, *names: str | int) -> int:
    """A 63-bit integer from `seed` and `names`, the same on every machine and in every Python."""
    key = json.dumps([int(seed), *names]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by (seed, names), e.g. `generator(0, "noise", chunk)`.

    The same seed gives different numbers on different devices: draw on the CPU if they have to be the same.
    """
    return torch.Generator(device=device).manual_seed(stable_hash(seed, *names))


def resolve_seed(seed: int, ranks: Ranks) -> int:
    """`seed`, or for RANDOM_SEED a random one, which is the same in all processes of a run.

    Raises UserError if there are several processes without a common run id.
    """
    if seed != RANDOM_SEED:
        return seed
    if ranks.world == 1:
        return secrets.randbelow(LARGEST_DRAWN)
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # torchrun --standalone gives each run its own
    if run == "none":
        raise UserError(
            f"seed={RANDOM_SEED} asks {ranks.world} processes for one seed; give it, or use torchrun --standalone"
        )
    return stable_hash(0, "run", run) % LARGEST_DRAWN


def sample_seed(seed: int, sample: int) -> int:
    """Seed of sample `sample` of a prompt; `seed` itself for sample 0. As `--seed` it gives the same video."""
    return seed if sample == 0 else stable_hash(seed, "sample", sample) % LARGEST_DRAWN
