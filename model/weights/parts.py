"""Locates the network that a setting names: file, part of the file, format and sizes, from headers and without torch.

Loading (plans.py) and inspection (inspection.py) both start here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import UserError
from model.weights import names, run_folders
from model.weights.files import (
    DIFFUSERS_STEM,
    EMA_STEM,
    FLAT_PART,
    HF_STEM,
    T5_FILE,
    VAE_FILE,
    StoredTensors,
    missing_weights,
    open_file,
    open_safetensors,
    read_headers,
    read_json,
    resolve_path,
    safetensors_headers,
    shard_files,
    subfolder,
)
from model.weights.fitting import as_lora, as_text_encoder, as_transformer, as_vae, read_card, select_part
from utils.files import CARD

TRANSFORMERS = ("student", "teacher", "critic")
FILE_IN = {"vae": VAE_FILE, "text_encoder": T5_FILE}  # of an original Wan folder
PEFT_FILE = "adapter_model.safetensors"
LORA_FILES = (PEFT_FILE, "pytorch_lora_weights.safetensors", "adapter_model.bin", "lora.pt", "model.pt")  # in a folder


@dataclass(frozen=True, kw_only=True)
class Part:
    """A network on disk, of a known kind."""

    path: Path
    kind: str  # format, in words
    tensors: StoredTensors
    config: Mapping[str, Any] = field(default_factory=dict)  # sizes, as diffusers or transformers states them
    card: Mapping[str, Any] = field(default_factory=dict)


def find_part(role: str, path: str | Path, name: str, *, use_ema: bool = False, values: bool = True) -> Part:
    """The network for `role`: student, teacher, critic, vae, text_encoder or tiny_decoder.

    name: the config field that holds `path`. values: whether tensors can be read afterwards, for which torch is needed.

    Raises:
        UserError: it is missing, damaged, or of another kind.
    """
    path = resolve_path(path)
    if not path.exists():
        raise missing_weights(name, path, "does not exist")
    transformer = role in TRANSFORMERS
    if transformer and (path / "transformer_2").is_dir():
        raise UserError(
            f"{name}={path} has two networks, for high and for low noise (Wan 2.2), which are not combined here; "
            f"give a folder of Wan 2.1"
        )
    if transformer:
        path = run_folders.find_weights(path, skip_export=use_ema or role == "critic")
    path = subfolder(path, "transformer" if transformer else role)
    if path.is_dir() and role in FILE_IN and (path / FILE_IN[role]).exists():
        path = path / FILE_IN[role]
    config, card, kind = {}, {}, "original Wan"
    if transformer and path.name in (run_folders.STATE, run_folders.SHARDS):
        tensors, config, card = run_folders.open_state(name, path, role == "critic", use_ema, values)
        kind = "training checkpoint"
    elif path.is_dir():
        config = read_json(name, path / "config.json")
        stem = EMA_STEM if use_ema else HF_STEM if role == "text_encoder" else DIFFUSERS_STEM
        if use_ema and not (path / f"{stem}.safetensors").exists():
            raise UserError(f"{name}={path} holds no averaged weights; set model.use_ema=false")
        files = shard_files(name, path, stem)
        tensors = open_safetensors(name, *files) if values else safetensors_headers(name, *files).dequantized()
        if (path / CARD).exists():
            kind, card = "our own", read_card(name, path / CARD)
        elif "dim" not in config:
            kind = "transformers" if role == "text_encoder" else "Diffusers"
    else:
        parts = (open_file if values else read_headers)(name, path)
        tensors = select_part(name, path, parts, _parts_of(role, use_ema))
        if path.suffix == ".safetensors":
            kind = "safetensors"
        elif transformer and set(parts) != {FLAT_PART}:
            kind = "training checkpoint"
    tensors, config = _as(role, name, path, tensors, config)
    return Part(path=path, kind=kind, tensors=tensors, config=config, card=card)


def _parts_of(role: str, use_ema: bool) -> tuple[str, ...]:
    """Parts of foreign training checkpoints that can be `role`, best first."""
    if role not in TRANSFORMERS:
        return names.NETWORK_PARTS
    return names.STUDENT_EMA_PARTS if use_ema else names.SCORE_PARTS if role == "critic" else names.STUDENT_PARTS


def _as(role: str, name: str, path: Path, tensors: StoredTensors, config: Mapping[str, Any]):
    """Tensors with our names, and sizes. Raises UserError for another network than that of the role."""
    if role in TRANSFORMERS:
        return as_transformer(name, path, tensors, config)
    if role == "vae":
        return as_vae(name, path, tensors, config)
    if role == "text_encoder":
        return as_text_encoder(name, path, tensors, config)
    if not names.is_taehv(tensors.shapes):
        raise UserError(
            f"{name}={path} is not a tiny decoder; it seems to be {names.guess(tensors.shapes)}, use taew2_1.pth"
        )
    return tensors, config


def find_lora(
    path: str | Path, name: str, part: str = "", *, values: bool = True
) -> tuple[Path, StoredTensors, dict[str, names.LoraTensor]]:
    """The file of an adapter, its tensors, and their meaning. Otherwise as `find_part`.

    part: of a training checkpoint, such as critic_lora; by default that of the generator.
    """
    path = resolve_path(path)
    if not path.exists():
        raise missing_weights(name, path, "does not exist")
    if path.is_dir():
        path = next((path / file for file in LORA_FILES if (path / file).is_file()), path)
    if path.is_dir():
        raise missing_weights(name, path, f"has no {' or '.join(LORA_FILES)}")
    parts = (open_file if values else read_headers)(name, path)
    wanted = (part,) if part else (*names.LORA_PARTS, FLAT_PART)
    tensors = next((parts[key] for key in wanted if key in parts), None)
    if tensors is None:
        seems = names.guess(next(iter(parts.values())).shapes if parts else {})
        raise UserError(f"{name}={path} holds no {wanted[0]}; it seems to be {seems}, so give {name} another file")
    return path, tensors, as_lora(name, path, tensors)
