"""Plans of loading: the files of a network, compared with it before any tensor is read.

Making a plan reads only headers. It raises a UserError if the tensors are not exactly those of the network.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from configs.errors import UserError
from model.tiny_decoder import TinyDecoder, TinyDecoderConfig
from model.weights import names, run_folders
from model.weights.files import EMA_STEM, StoredTensors, resolve_path, subfolder
from model.weights.fitting import check_shapes, infer_sizes
from model.weights.parts import Part, find_part


@dataclass(frozen=True, kw_only=True)
class WeightPlan(Part):
    """A network and its tensors, none of which has been read."""

    build: Callable[[], nn.Module]


def _fitting(name: str, part: Part, build: Callable[[], nn.Module]) -> WeightPlan:
    """The plan, if the tensors are exactly those of the network; else raises a UserError with the differences."""
    plan = WeightPlan(**{one.name: vars(part)[one.name] for one in fields(part)}, build=build)
    try:
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # they do not fit then
            wanted = {key: tuple(value.shape) for key, value in unique_state_dict(plan.build()).items()}
    except UserError:
        raise
    except Exception as error:  # sizes that no network can have
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(f"{name}={plan.path} describes no network ({reason}); fetch it again") from error
    check_shapes(name, plan.path, plan.tensors, wanted)
    return plan


def unique_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, tied weights once."""
    state = model.state_dict()
    if isinstance(model, UMT5EncoderModel):
        state = {key: value for key, value in state.items() if names.hf_t5_name(key)}
    return state


def plan_transformer(
    name: str, path: str | Path, cls: type[WanTransformer3DModel], role: str = "student", *, use_ema: bool = False
) -> WeightPlan:
    """A Wan transformer of class `cls` from any of its formats. `name` is the config field that holds `path`; role:
    student, teacher or critic, which is another part of a training checkpoint."""
    part = find_part(role, path, name, use_ema=use_ema)
    return _fitting(name, part, lambda: diffusers_network(cls, part.config))


def has_ema(name: str, path: str | Path) -> bool:
    """Whether `path` also holds averaged weights of a student."""
    path = run_folders.find_weights(resolve_path(path))
    if path.is_dir() and path.name != run_folders.SHARDS:
        return (subfolder(path, "transformer") / f"{EMA_STEM}.safetensors").is_file()
    parts = run_folders.open_parts(name, path)
    return any(part in parts for part in (*names.STUDENT_EMA_PARTS, *(f"{p}.average" for p in run_folders.STUDENTS)))


def transformer_config(plan: WeightPlan) -> dict[str, Any]:
    """Sizes of a transformer, as diffusers has them."""
    with init_empty_weights(include_buffers=False):
        return dict(plan.build().config)


def diffusers_network(cls: type, config: Mapping[str, Any]) -> nn.Module:
    """A diffusers network of the sizes in `config`; keys that only describe the file are dropped."""
    return cls.from_config({key: value for key, value in config.items() if not key.startswith("_")})


def plan_vae(path: str | Path, name: str = "model.vae") -> WeightPlan:
    """The Wan 2.1 VAE: our own or a Diffusers folder, or `Wan2.1_VAE.pth`."""
    part = find_part("vae", path, name)
    return _fitting(name, part, lambda: diffusers_network(AutoencoderKLWan, part.config))


def plan_text_encoder(path: str | Path, name: str = "model.text_encoder") -> WeightPlan:
    """UMT5's encoder: a transformers folder, or `models_t5_umt5-xxl-enc-bf16.pth`."""
    part = find_part("text_encoder", path, name)
    return _fitting(name, part, lambda: UMT5EncoderModel(UMT5Config.from_dict(dict(part.config))))


def plan_tiny_decoder(path: str | Path, name: str = "model.tiny_decoder") -> WeightPlan:
    """The tiny decoder: `taew2_1.pth` or `.safetensors`. Growth weights that make more frames are cut to the last."""
    part = find_part("tiny_decoder", path, name)
    config = TinyDecoderConfig(**infer_sizes(name, part.path, names.taehv_config, part.tensors.shapes))
    whole = part.tensors.renamed(names.taehv_name)
    rows = {f"decoder.{7 + 6 * i}.conv.weight": config.widths[i] * config.growth[i] for i in range(3)}
    shapes = {k: (min(s[0], rows[k]), *s[1:]) if k in rows else s for k, s in whole.shapes.items()}
    cut = StoredTensors(whole.files, shapes, lambda key: whole.read(key)[-shapes[key][0] :])
    return _fitting(name, replace(part, tensors=cut), lambda: TinyDecoder(config))
