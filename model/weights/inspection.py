"""Inspection of weight files by their headers, in milliseconds and without torch.

`model.weights.load.check_weights` compares every tensor with the network; this only tells what a file seems to be.
"""

from dataclasses import dataclass
from pathlib import Path

from configs.schema import Config
from model.sizes import RANDOM, TransformerSize
from model.weights import names
from model.weights.files import StoredTensors, find_tokenizer, missing_weights, resolve_path
from model.weights.fitting import check_shapes, expected_shapes, infer_sizes
from model.weights.parts import TRANSFORMERS, find_lora, find_part


@dataclass(frozen=True)
class WeightInfo:
    """A weight file of a configuration, as described by its header."""

    role: str
    path: Path
    size: int  # bytes
    kind: str
    network: TransformerSize | None = None  # sizes, of a transformer


def inspect_weights(role: str, path: str | Path, *, use_ema: bool = False, name: str | None = None) -> WeightInfo:
    """Look at the weights of `role`.

    Raises:
        UserError: they are missing, cut short, or of another kind. The message mentions the config field `name`.
    """
    name, path, label = name or f"model.{role}", resolve_path(path), role
    role = role.split(" ")[0]  # lora 0, lora 1, ...
    if not path.exists():
        raise missing_weights(name, path, "does not exist")
    if role == "tokenizer":
        folder = find_tokenizer(path, name)
        return WeightInfo(role, folder, sum(p.stat().st_size for p in folder.iterdir() if p.is_file()), "tokenizer")
    if role == "lora":
        file, tensors, _ = find_lora(path, name, values=False)
        return WeightInfo(label, file, tensors.size, f"{_guess(tensors)} ({file.suffix})")
    part, network = find_part(role, path, name, use_ema=use_ema, values=False), None
    if role in TRANSFORMERS:
        check_shapes(name, part.path, part.tensors, expected_shapes(name, part.path, names.wan_shapes, part.config))
        network = infer_sizes(name, part.path, size_from_shapes, part.tensors.shapes)
    elif role == "text_encoder":
        check_shapes(name, part.path, part.tensors, expected_shapes(name, part.path, names.t5_shapes, part.config))
    return WeightInfo(label, part.path, part.tensors.size, f"{_guess(part.tensors)} ({part.kind})", network)


def _guess(tensors: StoredTensors) -> str:
    return names.guess(tensors.shapes).split(" ", 1)[1]


def size_from_shapes(shapes: names.Shapes) -> TransformerSize:
    """Sizes of a Wan transformer from the shapes of its tensors, with our names."""
    dim, channels, *patch = shapes["patch_embedding.weight"]
    blocks = {key.split(".")[1] for key in shapes if key.startswith("blocks.")}
    return TransformerSize(
        dim=dim,
        ffn=shapes["blocks.0.ffn.net.0.proj.weight"][0],
        layers=len(blocks),
        text_dim=shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        freq_dim=shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        channels=channels,
        patch=tuple(patch),
    )


def required_weights(config: Config, *, training: bool = False) -> list[tuple[str, str, str]]:
    """(role, path, config field) of all weights that a configuration reads."""
    model = config.model
    entries = [("vae", model.vae, "model.vae")]
    if model.codec == "taehv" and not training:
        entries = [("tiny_decoder", model.tiny_decoder, "model.tiny_decoder")]
    entries += [("text_encoder", model.text_encoder, "model.text_encoder")]
    entries += [("tokenizer", model.tokenizer, "model.tokenizer")]
    if not training:
        loras = [(f"lora {i}", path, "model.lora") for i, path in enumerate(model.lora)]
        return [("student", model.student, "model.student"), *loras, *entries]
    init = config.training.init
    roles = [role for role in TRANSFORMERS if role in init]
    networks = [(role, init[role], f"training.init.{role}") for role in roles]
    unread = {role for role in ("vae", "text_encoder") if role in init}
    if config.training.distill.encoded_prompts is not None:
        unread |= {"text_encoder", "tokenizer"}
    alone = config.training.stage in ("text", "codec", "world_text", "world_vae")  # need no other network
    return [
        *(entry for entry in networks if not entry[1].endswith(".json") and not entry[1].startswith(RANDOM)),
        *(entry for entry in entries if entry[0] not in unread and not alone),
    ]
