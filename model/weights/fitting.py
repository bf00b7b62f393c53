"""Checks whether tensors are those of a network, by names and shapes only, without torch.

Used to load a network and to inspect its files (`scripts/doctor.py`).
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from configs.errors import UserError
from model.schedule import Schedule
from model.weights import names
from model.weights.files import FLAT_PART, T5_FILE, VAE_FILE, StoredTensors, read_json

# Largest value in a config.json; the largest published one is a vocabulary of 256,384. The two in MAX_SIZES determine
# the size of a table that is allocated even on the meta device.
MAX_SIZE = 1_000_000
MAX_SIZES = {"rope_max_seq_len": 16_384, "attention_head_dim": 1024}


def select_part(name: str, path: Path, parts: Mapping[str, StoredTensors], wanted: tuple[str, ...]) -> StoredTensors:
    """The first of the `wanted` parts that a training checkpoint has, or the flat file; wrappers removed from names."""
    averages = [part for part in names.STUDENT_EMA_PARTS if part in parts]
    averaged = wanted[0] in names.STUDENT_EMA_PARTS
    for part in (*wanted, *(() if averaged or averages else (FLAT_PART,))):
        if part in parts:
            return parts[part].renamed(names.unwrapped)
    if averages:
        raise UserError(f"{name}={path} holds averaged weights only; set model.use_ema=true")
    if averaged:
        raise UserError(f"{name}={path} holds no averaged weights; set model.use_ema=false")
    shapes = next(iter(parts.values())).shapes if parts else {}
    listed = f" but {', '.join(sorted(parts)[:5])}" if parts else ""
    raise UserError(
        f"{name}={path} holds no {wanted[0]}{listed}; it seems to be {names.guess(shapes)}, so choose another file"
    )


def check_shapes(name: str, path: Path, tensors: StoredTensors, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a UserError that lists the differences from the `wanted` shapes, if there are any, and guesses why."""
    have = tensors.shapes
    lost, extra = sorted(wanted.keys() - have.keys()), sorted(have.keys() - wanted.keys())
    both = sorted(wanted.keys() & have.keys())
    bent = [f"{key} {have[key]} for {wanted[key]}" for key in both if wanted[key] != have[key]]
    faults = [
        f"{len(keys)} tensors {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for keys, what in ((lost, "missing"), (extra, "unexpected"), (bent, "of another shape"))
        if keys
    ]
    odd = {key: tensors.other_dtypes[key] for key in sorted(wanted.keys() & tensors.other_dtypes.keys())}
    if odd:
        faults.append(f"{len(odd)} tensors of another type ({', '.join(f'{k} {t}' for k, t in [*odd.items()][:3])})")
    if faults:
        raise UserError(
            f"{name}={path} does not fit: {'; '.join(faults)}; it seems to be {names.guess(have)}, "
            f"so give {name} a file of the right network"
        )


def as_transformer(
    name: str, path: Path, tensors: StoredTensors, config: Mapping[str, Any]
) -> tuple[StoredTensors, dict[str, Any]]:
    """A Wan transformer's tensors with diffusers' names, and its config in diffusers' format.

    config: the config.json beside the tensors, diffusers' or original Wan's; empty if there is none.
    """
    if names.guess(tensors.shapes).startswith("an image-to-video") or config.get("model_type", "t2v") != "t2v":
        raise UserError(f"{name}={path} is an image-to-video Wan transformer; use text-to-video weights")
    if names.is_wan(tensors.shapes):
        stated, config = config, infer_sizes(name, path, names.wan_config, tensors.shapes, config)
        wrong = [key for key, value in names.stated_sizes(stated).items() if config[key] != value]
        if wrong:
            raise UserError(
                f"{name}={path} says {wrong[0]}={names.stated_sizes(stated)[wrong[0]]} in config.json but its tensors "
                f"have {config[wrong[0]]}; fetch the folder again"
            )
        tensors = tensors.renamed(names.wan_name)
    elif not names.is_diffusers_wan(tensors.shapes):
        raise UserError(
            f"{name}={path} is not a Wan transformer; it seems to be {names.guess(tensors.shapes)}, "
            f"so give {name} another file"
        )
    elif not config:
        config = read_json(name, path.parent / "config.json")
    _plausible(name, path, config, tensors)
    return tensors, dict(config)


def as_vae(
    name: str, path: Path, tensors: StoredTensors, config: Mapping[str, Any]
) -> tuple[StoredTensors, dict[str, Any]]:
    """As `as_transformer`, for the Wan 2.1 VAE."""
    guess = names.guess(tensors.shapes)
    if not (guess == "a video VAE" if config else names.is_wan_vae(tensors.shapes)):
        raise UserError(f"{name}={path} is not a Wan 2.1 VAE; it seems to be {guess}, use {VAE_FILE}")
    if not config:
        config = infer_sizes(name, path, names.vae_config, tensors.shapes)
        tensors = tensors.renamed(names.vae_names(config["num_res_blocks"]))
    _plausible(name, path, config, tensors)
    for key in ("latents_mean", "latents_std"):
        stated = config.get(key, [1.0] * config.get("z_dim", 16))  # default: those of diffusers' class, which are Wan's
        numbers = [n for n in stated if isinstance(n, int | float)] if isinstance(stated, list) else []
        if len(numbers) != config.get("z_dim", 16) or (key == "latents_std" and min(numbers) <= 0):
            text = str(stated)[:40]
            raise UserError(f"{name}={path} says {key}={text}, which cannot be statistics of latents; fetch it again")
    return tensors, dict(config)


def as_text_encoder(
    name: str, path: Path, tensors: StoredTensors, config: Mapping[str, Any]
) -> tuple[StoredTensors, dict[str, Any]]:
    """As `as_transformer`, for UMT5's encoder with the names of transformers, ComfyUI or original Wan."""
    if names.is_wan_t5(tensors.shapes):
        tensors = tensors.renamed(names.t5_name)
    elif names.is_hf_t5(tensors.shapes):
        tied = "shared.weight" in tensors.shapes
        tensors = tensors.renamed(lambda key: names.hf_t5_name(key, tied))
    else:
        raise UserError(
            f"{name}={path} is not Wan's text encoder; it seems to be {names.guess(tensors.shapes)}, use {T5_FILE}"
        )
    config = config or infer_sizes(name, path, names.t5_config, tensors.shapes)
    _plausible(name, path, config, tensors)
    return tensors, dict(config)


def as_lora(name: str, path: Path, tensors: StoredTensors) -> dict[str, names.LoraTensor]:
    """The meaning of each tensor of a LoRA. Raises UserError if one is unknown."""
    known = {tensor: names.lora_tensor(tensor) for tensor in tensors.shapes}
    odd = [tensor for tensor, parsed in known.items() if parsed is None]
    if odd or not any(parsed.part in ("A", "diff") for parsed in known.values()):
        raise UserError(
            f"{name}={path} is not a LoRA that we know (unexpected tensors: {len(odd)}, the first being "
            f"{min(odd, default='none')}); it seems to be {names.guess(tensors.shapes)}, so give {name} another file"
        )
    return known


def expected_shapes(name: str, path: Path, of: Callable[..., names.Shapes], config: Mapping[str, Any]) -> names.Shapes:
    """Names and shapes of the tensors of a network with this config. of: `names.wan_shapes` or `names.t5_shapes`."""
    try:
        return of(config)
    except (LookupError, ValueError, TypeError) as error:
        raise UserError(f"{name}={path} describes no network ({error}); fetch it again") from error


def _plausible(name: str, path: Path, config: Mapping[str, Any], tensors: StoredTensors) -> None:
    """Raise a UserError for sizes with which even a network without weights takes too much memory or time."""
    for key, value in config.items():
        values = value if isinstance(value, list) else [value]
        most = len(tensors.shapes) if re.search("layers|blocks", key) else MAX_SIZES.get(key, MAX_SIZE)
        small = key.endswith(("eps", "epsilon"))  # of a norm
        numbers = [n for n in values if isinstance(n, int | float)]
        wrong = any(not 0 < n < 1 for n in numbers) if small else any(abs(n) > most for n in numbers)
        if len(values) > 64 or wrong:
            raise UserError(
                f"{name}={path} says {key}={str(value)[:40]} in config.json, which its tensors cannot have; "
                f"fetch it again"
            )


def infer_sizes(name: str, path: Path, read: Callable[..., Any], *arguments: Any) -> Any:
    """`read(*arguments)`, the sizes of a network. Raises UserError if a tensor that they are read from is missing."""
    try:
        return read(*arguments)
    except (LookupError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{name}={path} lacks tensors that tell its sizes ({error}); fetch it again") from error


def read_card(name: str, path: Path) -> dict[str, Any]:
    """A student's card.json. Raises UserError if its schedule or size is invalid."""
    card = read_json(name, path)
    try:
        if card.get("schedule") is not None:
            Schedule.from_dict(card["schedule"])
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{name}: {path} holds a schedule that is none ({error}); remove it from the file") from error
    size = card.get("size")
    if size is not None and not (
        isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    ):
        raise UserError(f"{name}: {path} has a size that is not [height, width] in pixels; remove it from the file")
    return card
