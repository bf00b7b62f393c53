"""Loading and saving of networks. Supported formats:

- our own: folder with config.json, diffusion_pytorch_model.safetensors (and .ema), card.json
- Diffusers: folder, or the root of a pipeline with its `transformer`, `vae`, `text_encoder` folders
- original Wan: folder with config.json and shards; Wan2.1_VAE.pth; models_t5_umt5-xxl-enc-bf16.pth
- Self-Forcing: .pt with `generator`, `generator_ema`, `critic`, as trained or released
- TAEHV: taew2_1.pth or .safetensors

Loading first makes a plan (model/weights/plans.py), which is all that `check_weights` does. Then the network is created
on the meta device and its tensors are loaded one by one, so there is never a second copy.
"""

import shutil
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from configs.errors import UserError
from configs.schema import ModelConfig
from model.causal_wan import CausalWanModel
from model.text import TextEncoder
from model.tiny_decoder import TinyDecoder
from model.weights import names
from model.weights.files import (
    DIFFUSERS_STEM,
    EMA_STEM,
    HF_STEM,
    MAX_GROWTH,
    TOKENIZER_FILES,
    check_finite,
    find_tokenizer,
    read_json,
    resolve_path,
)
from model.weights.lora import plan_lora, settings_file
from model.weights.plans import (
    WeightPlan,
    diffusers_network,
    plan_text_encoder,
    plan_tiny_decoder,
    plan_transformer,
    plan_vae,
    unique_state_dict,
)
from utils.files import CARD, atomic_folder, write_json_atomic

HALF = (torch.float16, torch.bfloat16)


class WeightCheck(NamedTuple):
    """A checked weight file: one line of the pre-flight report."""

    role: str
    path: Path
    size: int  # bytes
    kind: str
    files: tuple[Path, ...]  # all that are read, sorted by name


def check_weights(config: ModelConfig) -> list[WeightCheck]:
    """Find and check all files that `config` names, reading only headers.

    Raises:
        UserError: a file is missing, truncated, or holds another network than its role needs.
    """
    plans = {"student": plan_transformer("model.student", config.student, CausalWanModel, use_ema=config.use_ema)}
    if config.codec == "wan":
        plans["vae"] = plan_vae(config.vae)
    else:
        plans["tiny_decoder"] = plan_tiny_decoder(config.tiny_decoder)
    plans["text_encoder"] = plan_text_encoder(config.text_encoder)
    checks = [
        WeightCheck(role, plan.path, plan.tensors.size, plan.kind, tuple(sorted(plan.tensors.files)))
        for role, plan in plans.items()
    ]
    for i, path in enumerate(config.lora):
        lora = plan_lora(path, plans["student"].tensors.shapes)
        settings = settings_file(lora.path)
        files = (*lora.tensors.files, *([settings] if settings else ()))
        checks.append(WeightCheck(f"lora {i}", lora.path, lora.tensors.size, lora.kind, tuple(sorted(files))))
    folder = find_tokenizer(config.tokenizer)
    files = tuple(sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".safetensors"))
    size = sum((folder / file).stat().st_size for file in TOKENIZER_FILES if (folder / file).exists())
    return [*checks, WeightCheck("tokenizer", folder, size, "transformers", files)]


def stored_dtype(model: nn.Module, key: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of parameter `key` in a network that is loaded in `dtype`.

    float32 where the network's library keeps it so (norms and time embedding of Wan; T5's `wo` if dtype is float16).
    """
    keep: set[str] = set()
    if isinstance(model, WanTransformer3DModel) or (isinstance(model, UMT5EncoderModel) and dtype == torch.float16):
        keep = set(model._keep_in_fp32_modules or ())
    return torch.float32 if dtype in HALF and not keep.isdisjoint(key.split(".")) else dtype


def iter_tensors(
    plan: WeightPlan, model: nn.Module, device: str | torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `plan` one by one, moved, cast, and checked for NaN and infinity."""
    for key in plan.tensors.shapes:
        value = plan.tensors.read(key).to(device=device, dtype=stored_dtype(model, key, dtype)).contiguous()
        range_of = f", or beyond the range of {dtype} (then set inference.precision=bfloat16)"
        yield key, check_finite(plan.path, key, value, range_of)


def materialize(plan: WeightPlan, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """The network of `plan` in evaluation mode, its tensors read, moved and cast one by one."""
    with init_empty_weights(include_buffers=False):
        model = plan.build()
    return assembled(model, dict(iter_tensors(plan, model, device, dtype))).to(device)


def assembled(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """`model`, whose parameters are on the meta device, with `state` in their place, in evaluation mode."""
    if isinstance(model, UMT5EncoderModel):
        state = state | {"encoder.embed_tokens.weight": state["shared.weight"]}
    model.load_state_dict(state, assign=True)
    if isinstance(model, UMT5EncoderModel):
        model.tie_weights()
    return model.eval()


def load_student(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    use_ema: bool = False,
    name: str = "model.student",
) -> CausalWanModel:
    """The causal student from any format; `.card` holds facts about its training ({} if unknown).

    use_ema: the EMA weights of a training checkpoint. name: the setting that errors mention.
    Raises UserError if the files are missing or do not fit.
    """
    plan = plan_transformer(name, path, CausalWanModel, use_ema=use_ema)
    student = materialize(plan, device, dtype)
    student.card = dict(plan.card)
    return student


def load_score(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    name: str = "training.init.teacher",
) -> WanTransformer3DModel:
    """A bidirectional network from any format. name: the setting; if it ends in critic, a training checkpoint's critic
    is loaded."""
    role = "critic" if name.endswith("critic") else "teacher"
    return materialize(plan_transformer(name, path, WanTransformer3DModel, role), device, dtype)


def load_vae(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> AutoencoderKLWan:
    """The Wan 2.1 VAE; WanCodec(load_vae(...)) is the codec."""
    return materialize(plan_vae(path), device, dtype)


def load_tiny_decoder(path: str | Path, device: str | torch.device = "cpu") -> TinyDecoder:
    """The tiny decoder in float32; TinyDecoderCodec(load_tiny_decoder(...)) is the codec."""
    return materialize(plan_tiny_decoder(path), device, torch.float32)


def load_tokenizer(path: str | Path, known: int) -> PreTrainedTokenizerBase:
    """The tokenizer in a local folder. Nothing is downloaded, and no code from the folder is run.

    known: size of the text encoder's vocabulary. Raises UserError for a tokenizer with larger ids.
    """
    folder = find_tokenizer(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        rules = tokenizer.backend_tokenizer.normalizer if tokenizer.is_fast else None
        if rules is not None and len(rules.normalize_str(string.printable)) > MAX_GROWTH * len(string.printable):
            raise ValueError("its rules make texts too long")
        most = max([*tokenizer.get_vocab().values(), *tokenizer("a").input_ids])
    except Exception as error:  # a damaged file can make its reader fail in any way
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise UserError(f"model.tokenizer={folder} cannot be read ({reason}); fetch it again") from error
    if most >= known:
        raise UserError(
            f"model.tokenizer={folder} gives ids up to {most:,} and model.text_encoder knows {known:,} words; name the "
            f"tokenizer that belongs to it"
        )
    return tokenizer


def load_text_encoder(
    path: str | Path,
    tokenizer: str | Path,
    text_tokens: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TextEncoder:
    """UMT5 with its tokenizer; embeddings are padded or truncated to `text_tokens`."""
    plan = plan_text_encoder(path)
    words = load_tokenizer(tokenizer, plan.tensors.shapes["shared.weight"][0])
    return TextEncoder(materialize(plan, device, dtype), words, text_tokens)


# --- fresh and saved --------------------------------------------------------------------------------------------------


def new_network(path: str | Path, *, causal: bool = False) -> nn.Module:
    """A network with the sizes of a config.json and random weights from torch's global generator.

    causal: use the student's class for a Wan transformer.
    """
    path = resolve_path(path)
    config = read_json("training.init", path)
    if config.get("model_type") == "umt5":
        return UMT5EncoderModel(UMT5Config.from_dict(config))
    classes = {
        "AutoencoderKLWan": AutoencoderKLWan,
        "WanTransformer3DModel": CausalWanModel if causal else WanTransformer3DModel,
        "CausalWanModel": CausalWanModel if causal else WanTransformer3DModel,
    }
    if config.get("_class_name") not in classes:
        raise UserError(
            f"training.init={path} has _class_name={config.get('_class_name')}; use one of {', '.join(classes)}"
        )
    return diffusers_network(classes[config["_class_name"]], config)


def on_disk(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """`state` on the CPU in `dtype` (None = unchanged), without wrappers' segments in the names."""
    out = {}
    for key, value in state.items():
        value = value.detach()
        half = value.to("cpu", dtype if dtype and value.is_floating_point() else value.dtype).contiguous()
        if not torch.isfinite(half).all() and torch.isfinite(value).all():
            raise ValueError(f"{key} has values beyond the range of {dtype}; save it as bfloat16")
        out[names.WRAPPERS.sub("", key)] = half
    return out


def save_network(
    model: nn.Module,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = torch.float16,
    state: Mapping[str, Tensor] | None = None,
    ema: Mapping[str, Tensor] | None = None,
    card: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write a folder that this module, diffusers and transformers can load, atomically.

    Args:
        dtype: of the saved weights; None = unchanged. The same weights give the same bytes.
        state: weights to write instead of the model's (gathered from shards).
        ema: EMA weights, for a Wan transformer.
        card: facts about the training, for card.json; the file also marks the folder as one that may be replaced.
        tokenizer: is saved to the same folder.
    """
    text = isinstance(model, UMT5EncoderModel)
    stem = HF_STEM if text else DIFFUSERS_STEM
    weights = {stem: unique_state_dict(model) if state is None else state} | ({} if ema is None else {EMA_STEM: ema})
    with atomic_folder(folder) as partial:
        if text:
            model.config.save_pretrained(partial)
        else:
            model.save_config(partial)
        for name, tensors in weights.items():
            file = partial / f"{name}.safetensors"
            save_file(on_disk(tensors, dtype), file, metadata={"format": "pt"})
            shutil.copymode(partial / "config.json", file)  # safetensors makes files that only their owner can read
        write_json_atomic(partial / CARD, dict(card or {}))
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
