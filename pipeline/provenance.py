"""Provenance of a video: hashes of the weights, versions, and the settings that its pixels depend on."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from configs.load import CHECKOUT, to_dict
from configs.schema import Config
from model.schedule import Schedule
from model.weights.load import WeightCheck
from utils.files import sampled_hash, sha256_of

LIBRARIES = ("torch", "diffusers", "transformers", "av", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that pixels depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


@lru_cache(maxsize=1)
def commit() -> str | None:
    """The git commit of this code, with `-dirty` if files were changed; None outside of a git checkout."""
    if not (CHECKOUT / ".git").exists():
        return None
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        described = subprocess.run(
            command, capture_output=True, text=True, timeout=10, env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
        )
    except (OSError, subprocess.TimeoutExpired):  # git is not installed, or its disk does not answer
        return None
    return described.stdout.strip() or None


def fingerprint(config: Config, weights: Sequence[WeightCheck]) -> str:
    """Everything that a video's pixels depend on except prompt and seed, as text. Reads only samples of the weights."""
    values = to_dict(config)
    precision = config.inference.precision.replace("fp8_linears", "fp8")  # as it was stored before it had a name
    parts = {
        "video": values["video"],
        "stream": values["stream"],
        "schedule": Schedule.from_config(config.schedule, config.stream).to_dict(),
        "codec": config.model.codec,
        "use_ema": config.model.use_ema,
        "lora_scales": config.model.lora_scales,
        "text_tokens": config.model.text_tokens,
        "precision": precision,
        "text_int8": config.inference.text_int8,
        "attention": config.inference.attention,
        "weights": {check.role: _combined(check, sampled_hash) for check in weights},
    }
    if config.inference.precision == "fp8_linears":
        parts["fp8"] = {"fp8_scaling": "row", "fp8_attention": False}
    start = config.inference.image or config.inference.video
    if start:
        parts["start"] = [sha256_of(Path(start).expanduser()), config.inference.video_frames]
    return json.dumps(parts, sort_keys=True)


@lru_cache(maxsize=1)
def weight_hashes(weights: tuple[WeightCheck, ...]) -> dict[str, str]:
    """SHA-256 of the weights by role; for several files the hash of their hexadecimal hashes, sorted by name."""
    return {check.role: _combined(check, sha256_of) for check in weights}


def _combined(check: WeightCheck, hash_file: Callable[[Path], str]) -> str:
    hashes = [hash_file(path) for path in check.files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
