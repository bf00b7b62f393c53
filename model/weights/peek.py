"""What weights are there, told from their headers in milliseconds, without torch or a network to compare them with.

`model.weights.check_weights` compares every tensor with the network; this only says what a file seems to be.
"""

from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.schema import Config
from model.sizes import RANDOM, Network
from model.weights import names, run_folders
from model.weights.files import (
    DIFFUSERS_STEM,
    EMA_STEM,
    HF_STEM,
    PICKLES,
    T5_FILE,
    VAE_FILE,
    find_tokenizer,
    headers,
    missing,
    read_json,
    resolve,
    safetensors_headers,
    shards,
    subfolder,
)
from model.weights.fitting import (
    as_lora,
    as_text_encoder,
    as_transformer,
    as_vae,
    layout,
    pick,
    read_card,
    refuse_misfit,
    sizes_of,
)
from utils.files import CARD

Shapes = dict[str, tuple[int, ...]]
KINDS = {
    "vae": "a video VAE",
    "text_encoder": "a T5 text encoder",
    "tiny_decoder": "a tiny decoder",
    "student": "a Wan transformer",
    "teacher": "a Wan transformer",
    "critic": "a Wan transformer",
    "lora": "a LoRA",
}


@dataclass(frozen=True)
class Peek:
    """One thing of a configuration, as far as its header tells."""

    role: str
    path: Path
    size: int  # bytes
    kind: str
    network: Network | None = None  # sizes, of a transformer


def peek(role: str, path: str | Path, *, use_ema: bool = False, name: str | None = None) -> Peek:
    """Look at the weights of `role`.

    Raises:
        UserError: they are missing, cut short, or of another kind; `name` is the config field to speak of.
    """
    name, path, label = name or f"model.{role}", resolve(path), role
    role = role.split(" ")[0]  # lora 0, lora 1, ...
    if not path.exists():
        raise missing(name, path, "does not exist")
    if role == "tokenizer":
        folder = find_tokenizer(path, name)
        return Peek(role, folder, sum(p.stat().st_size for p in folder.iterdir() if p.is_file()), "tokenizer")
    place = _place(role, path, use_ema)
    wanted, config, files, form = _wanted(role, use_ema), {}, (place,), place.suffix
    if place.name == run_folders.SHARDS:
        files, form = tuple(sorted(place.iterdir())), "shards"
        tensors = pick(name, place, run_folders.open_parts(name, place), wanted)
    elif place.is_dir():
        stem = HF_STEM if role == "text_encoder" else EMA_STEM if use_ema else DIFFUSERS_STEM
        if use_ema and not (place / f"{stem}.safetensors").is_file():
            raise UserError(f"{name}={path} holds no averaged weights; set model.use_ema=false")
        files, form = shards(name, place, stem), "our own" if (place / CARD).exists() else "folder"
        tensors = safetensors_headers(name, *files).scaled().renamed(names.unwrapped)
        config = read_json(name, place / "config.json") if role != "lora" else {}
        if form == "our own":
            read_card(name, place / CARD)
    else:
        tensors = pick(name, place, headers(name, place), wanted)
    kind = names.guess(tensors.shapes)
    if not kind.startswith(KINDS[role]):
        raise UserError(f"{name}={path} should be {KINDS[role]} and seems to be {kind}; give {name} another file")
    sized = place.name in (run_folders.STATE, run_folders.SHARDS)  # whose sizes are told elsewhere
    transformer, network = KINDS[role] == "a Wan transformer", None
    if transformer and not sized:
        ours, config = as_transformer(name, place, tensors, config)
        refuse_misfit(name, place, ours, layout(name, place, names.wan_layout, config))
    elif role == "text_encoder":
        ours, config = as_text_encoder(name, place, tensors, config)
        refuse_misfit(name, place, ours, layout(name, place, names.t5_layout, config))
    elif role == "lora":
        as_lora(name, place, tensors)
    elif role == "vae":
        as_vae(name, place, tensors, config)
    if transformer:
        network = sizes_of(name, place, network_of, tensors.shapes)
    return Peek(label, place, sum(file.stat().st_size for file in files), f"{kind.split(' ', 1)[1]} ({form})", network)


def _place(role: str, path: Path, use_ema: bool) -> Path:
    """The file or folder below `path` that is read for `role`."""
    if role in ("student", "teacher", "critic"):
        return subfolder(run_folders.find(path, use_ema), "transformer")
    if role == "lora" and path.is_dir():
        found = [file for file in sorted(path.iterdir()) if file.suffix in (".safetensors", *PICKLES)]
        return found[0] if found else path
    path = subfolder(path, role)
    inner = path / {"vae": VAE_FILE, "text_encoder": T5_FILE}.get(role, "")
    return inner if inner.is_file() else path


def _wanted(role: str, use_ema: bool) -> tuple[str, ...]:
    """The parts of a training checkpoint, others' or ours, that can be `role`, best first."""
    if role == "lora":
        return names.LORA_PARTS
    if role not in ("student", "teacher", "critic"):
        return names.NETWORK_PARTS
    players = run_folders.CRITICS if role == "critic" else run_folders.STUDENTS
    state = [f"{player}.{'average' if use_ema else 'module'}" for player in players]
    theirs = names.STUDENT_EMA_PARTS if use_ema else names.SCORE_PARTS if role == "critic" else names.STUDENT_PARTS
    return (*theirs, *state)


def network_of(shapes: Shapes) -> Network:
    """Sizes of a Wan transformer by the shapes of its tensors, under original names or diffusers'."""
    ours = {names.wan_name(key): shape for key, shape in shapes.items()} if names.is_wan(shapes) else shapes
    dim, channels, *patch = ours["patch_embedding.weight"]
    blocks = {key.split(".")[1] for key in ours if key.startswith("blocks.")}
    return Network(
        dim=dim,
        ffn=ours["blocks.0.ffn.net.0.proj.weight"][0],
        layers=len(blocks),
        text_dim=ours["condition_embedder.text_embedder.linear_1.weight"][1],
        freq_dim=ours["condition_embedder.time_embedder.linear_1.weight"][1],
        channels=channels,
        patch=tuple(patch),
    )


def wanted(config: Config, *, training: bool = False) -> list[tuple[str, str, str]]:
    """(role, path, config field) of all weights that a configuration reads."""
    model = config.model
    found = [("vae", model.vae, "model.vae")]
    if model.codec == "taehv" and not training:
        found = [("tiny_decoder", model.tiny_decoder, "model.tiny_decoder")]
    found += [("text_encoder", model.text_encoder, "model.text_encoder")]
    found += [("tokenizer", model.tokenizer, "model.tokenizer")]
    if not training:
        loras = [(f"lora {i}", path, "model.lora") for i, path in enumerate(model.lora)]
        return [("student", model.student, "model.student"), *loras, *found]
    init = config.training.init
    roles = [role for role in ("student", "teacher", "critic") if role in init]
    networks = [(role, init[role], f"training.init.{role}") for role in roles]
    unread = {role for role in ("vae", "text_encoder") if role in init}
    if config.training.distill.encoded_prompts is not None:
        unread |= {"text_encoder", "tokenizer"}
    return [
        *(entry for entry in networks if not entry[1].endswith(".json") and not entry[1].startswith(RANDOM)),
        *(entry for entry in found if entry[0] not in unread and config.training.stage not in ("text", "codec")),
    ]
