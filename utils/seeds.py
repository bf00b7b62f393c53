"""Random numbers as functions of (seed, names): what is drawn never depends on what was drawn before."""

import hashlib
import json

import torch


def stable_hash(seed: int, *names: str | int) -> int:
    """A 63-bit integer from `seed` and `names`, the same on every machine and in every Python."""
    key = json.dumps([int(seed), *names]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by (seed, names), e.g. `generator(0, "noise", chunk)`.

    The same seed gives other numbers on another device: draw on the CPU what has to be the same everywhere.
    """
    return torch.Generator(device=device).manual_seed(stable_hash(seed, *names))


def sample_seed(seed: int, sample: int) -> int:
    """Seed of sample `sample` of a prompt: `seed` itself for sample 0; each works as `--seed` to make it alone."""
    return seed if sample == 0 else stable_hash(seed, "sample", sample) % 2**31
