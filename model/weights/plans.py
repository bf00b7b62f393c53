"""Which file holds which network: found, opened and compared with the network, before anything is read.

A plan costs the headers of the files. It is refused, in one sentence, if the tensors are not exactly the network's.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from configs.errors import UserError
from model.schedule import Schedule
from model.tiny_decoder import TinyDecoder, TinyDecoderConfig
from model.weights import names, run_folders
from model.weights.files import (
    BARE,
    DIFFUSERS_STEM,
    EMA_STEM,
    HF_STEM,
    T5_FILE,
    VAE_FILE,
    Tensors,
    missing,
    open_file,
    open_safetensors,
    read_json,
    resolve,
    shards,
    subfolder,
)
from utils.files import CARD

# Of any one number in a config.json. The largest published one is a vocabulary of 256,384; the two that have a limit of
# their own size a table that exists before there are weights.
MAX_SIZE = 1_000_000
MAX_SIZES = {"rope_max_seq_len": 16_384, "attention_head_dim": 1024}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A network and the tensors that fit it, of which none has been read."""

    path: Path
    kind: str  # format, in words
    make: Callable[[], nn.Module]
    tensors: Tensors
    card: Mapping[str, Any] = field(default_factory=dict)


def _fitting(name: str, plan: Plan) -> Plan:
    """`plan`, if its tensors are exactly the network's; else a UserError that lists what differs and guesses why."""
    try:
        with init_empty_weights(include_buffers=False):
            wanted = {key: tuple(value.shape) for key, value in stored(plan.make()).items()}
    except UserError:
        raise
    except Exception as error:  # sizes that no network can have
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(f"{name}={plan.path} describes no network ({reason}); fetch it again") from error
    have = plan.tensors.shapes
    lost, extra = sorted(wanted.keys() - have.keys()), sorted(have.keys() - wanted.keys())
    bent = [
        f"{key} {have[key]} for {wanted[key]}"
        for key in sorted(wanted.keys() & have.keys())
        if wanted[key] != have[key]
    ]
    faults = [
        f"{len(keys)} tensors {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for keys, what in ((lost, "missing"), (extra, "unexpected"), (bent, "of another shape"))
        if keys
    ]
    odd = {key: plan.tensors.odd[key] for key in sorted(wanted.keys() & plan.tensors.odd.keys())}
    if odd:
        faults.append(f"{len(odd)} tensors of another type ({', '.join(f'{k} {t}' for k, t in [*odd.items()][:3])})")
    if faults:
        raise UserError(
            f"{name}={plan.path} does not fit: {'; '.join(faults)}; it seems to be {names.guess(have)}, "
            f"so give {name} a file of the right network"
        )
    return plan


def _plausible(name: str, path: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
    """Refuse sizes from which building the network, even without weights, would take all memory or for ever."""
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


def _sizes(name: str, path: Path, read: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `read` says of a file's sizes; refuses one that lacks the tensors that tell."""
    try:
        return read(*arguments)
    except (LookupError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{name}={path} lacks tensors that tell its sizes ({error}); fetch it again") from error


def _read_card(name: str, path: Path) -> dict[str, Any]:
    """A student's card, its schedule being one."""
    card = read_json(name, path)
    try:
        if card.get("schedule") is not None:
            Schedule.from_dict(card["schedule"])
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{name}: {path} holds a schedule that is none ({error}); remove it from the file") from error
    return card


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, tied weights once."""
    state = model.state_dict()
    if isinstance(model, UMT5EncoderModel):
        state = {key: value for key, value in state.items() if names.hf_t5_name(key)}
    return state


def _part(name: str, path: Path, parts: Mapping[str, Tensors], wanted: tuple[str, ...]) -> Tensors:
    """The first of the `wanted` parts of a training checkpoint that is there, or the bare file; names unwrapped."""
    for part in wanted:
        if part in parts:
            return parts[part].renamed(names.unwrapped)
    if BARE in parts and wanted != names.STUDENT_EMA_PARTS:
        return parts[BARE].renamed(names.unwrapped)
    if names.STUDENT_EMA_PARTS[0] in parts:
        raise UserError(f"{name}={path} holds averaged weights only; set model.use_ema=true")
    if wanted == names.STUDENT_EMA_PARTS:
        raise UserError(f"{name}={path} holds no averaged weights; set model.use_ema=false")
    found = next(iter(parts.values())).shapes if parts else {}
    raise UserError(f"{name}={path} holds no {wanted[0]}; it seems to be {names.guess(found)}, so choose another file")


def _transformer_tensors(
    name: str, path: Path, wanted: tuple[str, ...]
) -> tuple[Path, Tensors, dict[str, Any], dict[str, Any], str]:
    """Where in `path` the network is; its tensors, config.json, card and format."""
    ema = wanted == names.STUDENT_EMA_PARTS
    path = run_folders.find(path, averaged=ema)
    if path.name in (run_folders.STATE, run_folders.SHARDS):
        critic = wanted == names.SCORE_PARTS
        return path, *run_folders.open_state(name, path, critic, averaged=ema), "training checkpoint"
    if not path.is_dir():
        parts = open_file(name, path)
        kind = "safetensors" if set(parts) == {BARE} and path.suffix == ".safetensors" else "training checkpoint"
        return path, _part(name, path, parts, wanted), {}, {}, kind
    path = subfolder(path, "transformer")
    config = read_json(name, path / "config.json")
    stem = EMA_STEM if ema else DIFFUSERS_STEM
    if ema and not (path / f"{stem}.safetensors").exists():
        raise UserError(f"{name}={path} holds no averaged weights; set model.use_ema=false")
    tensors = open_safetensors(name, *shards(name, path, stem))
    own = (path / CARD).exists()
    card = _read_card(name, path / CARD) if own else {}
    return path, tensors, config, card, "our own" if own else "original Wan" if "dim" in config else "Diffusers"


def plan_transformer(
    name: str, path: str | Path, cls: type[WanTransformer3DModel], wanted: tuple[str, ...] = names.STUDENT_PARTS
) -> Plan:
    """A Wan transformer of class `cls` from any of its formats. `name` is the config field that holds `path`."""
    path = resolve(path)
    if not path.exists():
        raise missing(name, path, "does not exist")
    path, tensors, config, card, kind = _transformer_tensors(name, path, wanted)
    if names.guess(tensors.shapes).startswith("an image-to-video") or config.get("model_type", "t2v") != "t2v":
        raise UserError(f"{name}={path} is an image-to-video Wan transformer; use text-to-video weights")
    if names.is_wan(tensors.shapes):
        stated, config = config, _sizes(name, path, names.wan_config, tensors.shapes, config)
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
    return _fitting(
        name, Plan(path=path, kind=kind, make=lambda: diffusers_network(cls, config), tensors=tensors, card=card)
    )


def has_average(name: str, path: str | Path) -> bool:
    """Whether `path` holds averaged weights of a student, too."""
    path = run_folders.find(resolve(path), averaged=False)
    if path.is_dir() and path.name != run_folders.SHARDS:
        return (subfolder(path, "transformer") / f"{EMA_STEM}.safetensors").is_file()
    parts = run_folders.open_parts(name, path)
    return any(part in parts for part in (*names.STUDENT_EMA_PARTS, *(f"{p}.average" for p in run_folders.STUDENTS)))


def config_of(plan: Plan) -> dict[str, Any]:
    """Sizes of a transformer, as diffusers has them."""
    with init_empty_weights(include_buffers=False):
        return dict(plan.make().config)


def diffusers_network(cls: type, config: Mapping[str, Any]) -> nn.Module:
    """A diffusers network of the sizes in `config`; keys that only describe the file are dropped."""
    return cls.from_config({key: value for key, value in config.items() if not key.startswith("_")})


def plan_vae(path: str | Path, name: str = "model.vae") -> Plan:
    """The Wan 2.1 VAE: our own or a Diffusers folder, or `Wan2.1_VAE.pth`."""
    path = subfolder(resolve(path), "vae")
    if path.is_dir() and (path / VAE_FILE).exists():
        path = path / VAE_FILE
    if path.is_dir():
        config = read_json(name, path / "config.json")
        tensors, kind = open_safetensors(name, *shards(name, path, DIFFUSERS_STEM)), "Diffusers"
    else:
        tensors = _part(name, path, open_file(name, path), ("state_dict",))
        if not names.is_wan_vae(tensors.shapes):
            raise UserError(
                f"{name}={path} is not a Wan 2.1 VAE; it seems to be {names.guess(tensors.shapes)}, use {VAE_FILE}"
            )
        config, kind = _sizes(name, path, names.vae_config, tensors.shapes), "original Wan"
        tensors = tensors.renamed(names.vae_names(config["num_res_blocks"]))
    _plausible(name, path, config, tensors)
    for key in ("latents_mean", "latents_std"):
        said = config.get(key, [1.0] * config.get("z_dim", 16))  # not said: those of the class, which are Wan's
        numbers = [n for n in said if isinstance(n, int | float)] if isinstance(said, list) else []
        if len(numbers) != config.get("z_dim", 16) or (key == "latents_std" and min(numbers) <= 0):
            raise UserError(f"{name}={path} says {key}={str(said)[:40]}, with which no latents can be; fetch it again")
    return _fitting(
        name, Plan(path=path, kind=kind, make=lambda: diffusers_network(AutoencoderKLWan, config), tensors=tensors)
    )


def plan_text_encoder(path: str | Path, name: str = "model.text_encoder") -> Plan:
    """UMT5's encoder: a transformers folder, or `models_t5_umt5-xxl-enc-bf16.pth`."""
    path = subfolder(resolve(path), "text_encoder")
    if path.is_dir() and (path / T5_FILE).exists():
        path = path / T5_FILE
    if path.is_dir():
        config = read_json(name, path / "config.json")
        tensors, kind = open_safetensors(name, *shards(name, path, HF_STEM)).renamed(names.hf_t5_name), "transformers"
    else:
        tensors = _part(name, path, open_file(name, path), ("state_dict",))
        if not names.is_wan_t5(tensors.shapes):
            raise UserError(
                f"{name}={path} is not Wan's text encoder; it seems to be {names.guess(tensors.shapes)}, use {T5_FILE}"
            )
        config, kind = _sizes(name, path, names.t5_config, tensors.shapes), "original Wan"
        tensors = tensors.renamed(names.t5_name)
    _plausible(name, path, config, tensors)

    def make() -> UMT5EncoderModel:
        return UMT5EncoderModel(UMT5Config.from_dict(config))

    return _fitting(name, Plan(path=path, kind=kind, make=make, tensors=tensors))


def plan_tiny_decoder(path: str | Path, name: str = "model.tiny_decoder") -> Plan:
    """The tiny decoder: `taew2_1.pth` or `.safetensors`. Growth weights that make more frames are cut to the last."""
    path = resolve(path)
    tensors = _part(name, path, open_file(name, path), ("state_dict",))
    if not names.is_taehv(tensors.shapes):
        raise UserError(
            f"{name}={path} is not a tiny decoder; it seems to be {names.guess(tensors.shapes)}, use taew2_1.pth"
        )
    config = TinyDecoderConfig(**_sizes(name, path, names.taehv_config, tensors.shapes))
    whole = tensors.renamed(names.taehv_name)
    rows = {f"decoder.{7 + 6 * i}.conv.weight": config.widths[i] * config.growth[i] for i in range(3)}
    shapes = {k: (min(s[0], rows[k]), *s[1:]) if k in rows else s for k, s in whole.shapes.items()}
    cut = Tensors(whole.files, shapes, lambda key: whole.read(key)[-shapes[key][0] :])
    return _fitting(name, Plan(path=path, kind="TAEHV", make=lambda: TinyDecoder(config), tensors=cut))
