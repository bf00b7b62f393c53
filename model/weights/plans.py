"""Which file holds which network: found, opened and compared with the network, before anything is read.

A plan costs the headers of the files. It is refused, in one sentence, if the tensors are not exactly the network's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from configs.errors import UserError
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
from model.weights.fitting import as_text_encoder, as_transformer, as_vae, pick, read_card, refuse_misfit, sizes_of
from utils.files import CARD


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
    refuse_misfit(name, plan.path, plan.tensors, wanted)
    return plan


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, tied weights once."""
    state = model.state_dict()
    if isinstance(model, UMT5EncoderModel):
        state = {key: value for key, value in state.items() if names.hf_t5_name(key)}
    return state


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
        return path, pick(name, path, parts, wanted), {}, {}, kind
    path = subfolder(path, "transformer")
    config = read_json(name, path / "config.json")
    stem = EMA_STEM if ema else DIFFUSERS_STEM
    if ema and not (path / f"{stem}.safetensors").exists():
        raise UserError(f"{name}={path} holds no averaged weights; set model.use_ema=false")
    tensors = open_safetensors(name, *shards(name, path, stem))
    own = (path / CARD).exists()
    card = read_card(name, path / CARD) if own else {}
    return path, tensors, config, card, "our own" if own else "original Wan" if "dim" in config else "Diffusers"


def plan_transformer(
    name: str, path: str | Path, cls: type[WanTransformer3DModel], wanted: tuple[str, ...] = names.STUDENT_PARTS
) -> Plan:
    """A Wan transformer of class `cls` from any of its formats. `name` is the config field that holds `path`."""
    path = resolve(path)
    if not path.exists():
        raise missing(name, path, "does not exist")
    path, tensors, config, card, kind = _transformer_tensors(name, path, wanted)
    tensors, config = as_transformer(name, path, tensors, config)
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
        tensors, config, kind = pick(name, path, open_file(name, path), names.NETWORK_PARTS), {}, "original Wan"
    tensors, config = as_vae(name, path, tensors, config)
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
        tensors, kind = open_safetensors(name, *shards(name, path, HF_STEM)), "transformers"
    else:
        tensors, config = pick(name, path, open_file(name, path), names.NETWORK_PARTS), {}
        kind = "original Wan" if names.is_wan_t5(tensors.shapes) else "one file, names of transformers"
    tensors, config = as_text_encoder(name, path, tensors, config)

    def make() -> UMT5EncoderModel:
        return UMT5EncoderModel(UMT5Config.from_dict(config))

    return _fitting(name, Plan(path=path, kind=kind, make=make, tensors=tensors))


def plan_tiny_decoder(path: str | Path, name: str = "model.tiny_decoder") -> Plan:
    """The tiny decoder: `taew2_1.pth` or `.safetensors`. Growth weights that make more frames are cut to the last."""
    path = resolve(path)
    tensors = pick(name, path, open_file(name, path), names.NETWORK_PARTS)
    if not names.is_taehv(tensors.shapes):
        raise UserError(
            f"{name}={path} is not a tiny decoder; it seems to be {names.guess(tensors.shapes)}, use taew2_1.pth"
        )
    config = TinyDecoderConfig(**sizes_of(name, path, names.taehv_config, tensors.shapes))
    whole = tensors.renamed(names.taehv_name)
    rows = {f"decoder.{7 + 6 * i}.conv.weight": config.widths[i] * config.growth[i] for i in range(3)}
    shapes = {k: (min(s[0], rows[k]), *s[1:]) if k in rows else s for k, s in whole.shapes.items()}
    cut = Tensors(whole.files, shapes, lambda key: whole.read(key)[-shapes[key][0] :])
    return _fitting(name, Plan(path=path, kind="TAEHV", make=lambda: TinyDecoder(config), tensors=cut))
