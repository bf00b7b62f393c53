"""Weight files, checked and opened without reading their tensors.

Tensors are read one at a time: safetensors files are memory-mapped by the library, `.pt` and `.pth` by
`torch.load(mmap=True)`. Opening reads only headers. A file that is missing, truncated, or of another type than its name
says raises a UserError.
"""

import functools
import importlib.util
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from configs.errors import UserError
from configs.reading import ordinary_file
from model.weights.safe_pickle import NeedsCode, TensorRef, dry_run
from utils.files import parse_json

if TYPE_CHECKING:  # torch takes seconds to import, and is not needed before tensors are
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]  # the checkout; relative paths start here
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
MAX_HEADER = 16_000_000  # bytes of names and shapes; of a thousand tensors 0.15 MB, and adapters tell of their training
MAX_JSON = 16_000_000  # bytes; of the index of a thousand tensors 0.1 MB
MAX_SHARDS = 4096
MAX_TOKENIZER = 32_000_000  # bytes of each of its files; of UMT5's tokenizer.json 17 MB
MAX_GROWTH = 1000  # times that the rules of a tokenizer may lengthen a text
MAX_ENDS = 64  # tokens that it puts around one
MAX_REPEATS, REPEATED_GROUP = 3, re.compile(r"\)[*+?{]")  # of a regular expression
FLOATS = ("Double", "Float", "Half", "BFloat16", "Untyped")  # of storages; float8 has those without a type
NO_FILE = "give a folder or a file of weights"
FLAT_PART = ""  # the part of a file that is one flat dictionary of tensors

DIFFUSERS_STEM = "diffusion_pytorch_model"
HF_STEM = "model"
EMA_STEM = f"{DIFFUSERS_STEM}.ema"  # diffusers' way to name a variant
VAE_FILE = "Wan2.1_VAE.pth"
T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")

# Parts of a path, and the download of `scripts/download.py` that provides such a file.
DOWNLOADS = (
    ("self_forcing", "self-forcing"),
    ("ode_init", "self-forcing"),
    ("longlive", "longlive"),
    ("taew", "taew2.1"),
    ("umt5", "umt5"),
    ("vae", "vae"),
    ("krea", "krea-14b"),
    ("distill_lora", "lightx2v-lora"),
    ("lightx2v", "lightx2v-14b"),
    ("14b-diffusers", "wan-14b-hf"),
    ("14b", "wan-14b"),
    ("wan2.1", "wan-1.3b"),
)
DOWNLOAD_OF_FIELD = {
    "model.vae": "vae",
    "model.tiny_decoder": "taew2.1",
    "model.text_encoder": "umt5",
    "model.tokenizer": "umt5",
}


@dataclass(frozen=True)
class StoredTensors:
    """Named tensors on disk: names and shapes now, values when `read`."""

    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], "Tensor"]
    other_dtypes: Mapping[str, str] = field(default_factory=dict)  # name -> dtype of non-float tensors

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(file.stat().st_size for file in self.files)

    def renamed(self, rename: Callable[[str], str | None]) -> "StoredTensors":
        """The same tensors under other names, without those that `rename` maps to None."""
        origin: dict[str, str] = {}
        for old in self.shapes:
            new = rename(old)
            if new is not None and origin.setdefault(new, old) != old:
                raise UserError(f"{self.files[0]} holds {new} twice, as {origin[new]} and {old}; use another file")
        shapes = {new: self.shapes[old] for new, old in origin.items()}
        odd = {new: self.other_dtypes[old] for new, old in origin.items() if old in self.other_dtypes}
        return StoredTensors(self.files, shapes, lambda name: self.read(origin[name]), odd)

    def dequantized(self) -> "StoredTensors":
        """With what float8 weights are scaled by (ComfyUI's and LightX2V's, by tensor or by row) taken into them."""
        scale: dict[str, str] = {}
        for name in self.shapes:
            stem, _, kind = name.rpartition(".")
            weight = f"{stem}.weight"
            rows = self.shapes.get(weight, (0,))[:1]
            if kind in ("scale_weight", "weight_scale") and self.shapes[name] in ((), (1,), rows, (*rows, 1)):
                scale[weight] = name
        if not scale:
            return self
        used = {*scale.values(), "scaled_fp8"}
        kinds = ("scale_input", "input_scale", "comfy_quant")
        used |= {f"{weight.removesuffix('weight')}{kind}" for weight in scale for kind in kinds}
        used |= {name for name in self.shapes if name.endswith(".scaled_fp8")}
        shapes = {name: shape for name, shape in self.shapes.items() if name not in used}

        def read(name: str) -> "Tensor":
            value = self.read(name)
            if name not in scale:
                return value
            factor = self.read(scale[name]).float()
            return value.float() * factor.reshape(-1, *[1] * (value.ndim - 1))

        return StoredTensors(
            self.files, shapes, read, {name: kind for name, kind in self.other_dtypes.items() if name in shapes}
        )


def resolve_path(path: str | Path) -> Path:
    """An absolute path, or one relative to the working directory if it is there, else to the checkout."""
    path = Path(path).expanduser()
    return path if path.is_absolute() or path.exists() else ROOT / path


def missing_weights(field: str, path: Path, what: str) -> UserError:
    """A UserError for a missing file: the setting, the path, and how to get the file."""
    if (ROOT / "assets") in path.parents:
        here = path.relative_to(ROOT)
        if (ROOT / "assets").is_dir():
            maker = "train_world.py" if here.parts[1] == "world" else "train_tiny.py"
            fix = f"restore it with `git checkout -- {here}` if it is shipped, or make it with `python scripts/{maker}`"
        else:
            fix = (
                f"the tiny weights are in assets/tiny of the repository and not in the installed package: "
                f"install a clone with `pip install -e .`, or set {field}"
            )
    elif (ROOT / "logs") in path.parents:
        run = path.relative_to(ROOT / "logs").parts[0]
        with_file = f" (`bash training.sh --config_path configs/{run}.yaml`)" * (ROOT / f"configs/{run}.yaml").is_file()
        fix = f"train it first{with_file}, or set {field}"
    else:
        words = "/".join(path.parts[-3:]).lower()
        name = next((download for word, download in DOWNLOADS if word in words), DOWNLOAD_OF_FIELD.get(field))
        fetch = f"fetch it with `python scripts/download.py {name}` or " if name else ""
        fix = f"{fetch}set {field} to another path"
    return UserError(f"{field}={path} {what}; {fix}")


def read_json(field: str, path: Path) -> dict[str, Any]:
    """A JSON object, such as a config.json."""
    try:
        if path.exists():
            ordinary_file(field, path, MAX_JSON, fix="fetch it again")
        data = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise missing_weights(field, path.parent, f"has no {path.name}") from error
    except OSError as error:
        raise UserError(f"{field}: {path} cannot be read ({error.strerror}); give another path") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{field}: {path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(data, dict):
        raise UserError(f"{field}: {path} is not a JSON object; fetch it again")
    return data


def check_finite(path: Path, key: str, value: "Tensor", hint: str = "") -> "Tensor":
    """`value` of tensor `key` in `path`, if it is finite; raises UserError otherwise. hint: ends the sentence."""
    import torch

    numbers = value.float() if value.itemsize == 1 else value  # aminmax knows no float8
    if value.numel() and not torch.isfinite(torch.stack(torch.aminmax(numbers))).all():
        raise UserError(f"{path} holds values in {key} that are no numbers{hint}; fetch it again")
    return value


def subfolder(path: Path, name: str) -> Path:
    """`path`, or its folder `name` where `path` is the root of a Diffusers pipeline."""
    return path / name if (path / name / "config.json").exists() else path


def find_tokenizer(path: str | Path, name: str = "model.tokenizer") -> Path:
    """The folder with the tokenizer's files: `path`, its `tokenizer` folder, or the one in an original Wan folder."""
    path = resolve_path(path)
    for folder in (path, path / "tokenizer", path / "google" / "umt5-xxl"):
        if any((folder / file).exists() for file in TOKENIZER_FILES):
            _check_tokenizer(name, folder)
            return folder
    raise missing_weights(name, path, f"has no {' or '.join(TOKENIZER_FILES)}" if path.exists() else "does not exist")


def _check_tokenizer(name: str, folder: Path) -> None:
    """Raise a UserError for files that would hang the tokenizer's library or make a prompt grow to gigabytes."""
    for file in folder.iterdir():
        if file.suffix in (".json", ".model", ".txt") and not file.is_dir():
            ordinary_file(name, file, MAX_TOKENIZER, fix="fetch it again")
    main = folder / TOKENIZER_FILES[0]
    if main.exists():
        _check_rules(name, main, main.stat().st_mtime_ns)
    elif importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"{name}={folder} has spiece.model alone, for which the package sentencepiece is needed and not installed; "
            f"install it and protobuf, or put tokenizer.json beside it (`python scripts/download.py umt5`)"
        )


@functools.lru_cache(maxsize=4)
def _check_rules(name: str, path: Path, changed: int) -> None:
    """Raise a UserError for a tokenizer.json with rules that expand a text beyond MAX_GROWTH or match very slowly."""
    try:
        tokenizer = parse_json(path.read_bytes())
        growth, rules = 1, [tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")]
        while rules:
            rule = rules.pop()
            if isinstance(rule, list):
                rules += rule
            elif isinstance(rule, dict):
                rules += [value for value in rule.values() if isinstance(value, list | dict)]
                growth *= 1 + max((len(rule[key]) for key in ("content", "prepend") if key in rule), default=0)
                if growth > MAX_GROWTH:
                    raise ValueError("its rules make texts too long")
                if "Regex" in rule and is_slow_regex(rule["Regex"]):
                    raise ValueError("its rules could take for ever to match")
        ends = tokenizer.get("post_processor") or {}
        pieces = [*ends.get("single", []), *(token["ids"] for token in ends.get("special_tokens", {}).values())]
        if len(pieces) > MAX_ENDS or any(len(piece) > MAX_ENDS for piece in pieces):
            raise ValueError("it puts too many tokens around a text")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{name}: {path} is no tokenizer that can be read ({error}); fetch it again") from error


def is_slow_regex(pattern: str) -> bool:
    """Whether matching an untrusted regular expression may be slow: nested repeats, or more than MAX_REPEATS."""
    return bool(REPEATED_GROUP.search(pattern)) or sum(map(pattern.count, "*+?{")) > MAX_REPEATS


def indexed_files(field: str, index: Path) -> list[str]:
    """Names of the files, all in its own folder, that `*.safetensors.index.json` lists."""
    places = read_json(field, index).get("weight_map")
    names = sorted({str(name) for name in places.values()}) if isinstance(places, dict) else []
    if not names or any(Path(name).name != name or "\\" in name for name in names):
        raise UserError(f"{field}: {index} does not name files of its own folder; fetch the folder again")
    return names


def shard_files(field: str, folder: Path, stem: str) -> tuple[Path, ...]:
    """The safetensors files of a folder, `stem.safetensors` or all shards. Raises UserError if one is missing."""
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    if single.exists():
        return (single,)
    if index.exists():
        names = indexed_files(field, index)
    else:
        shards = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
        if not shards:
            raise missing_weights(field, folder, f"has no {single.name}")
        count = shards[0].stem.rsplit("-of-", 1)[1]
        if not count.isdecimal() or int(count) > MAX_SHARDS:
            raise UserError(f"{field}: {shards[0]} is not named as a shard is; fetch the folder again")
        names = [f"{stem}-{i + 1:0{len(count)}d}-of-{count}.safetensors" for i in range(int(count))]
    lost = [name for name in names if not (folder / name).exists()]
    if lost:
        raise missing_weights(field, folder, f"lacks {len(lost)} of {len(names)} shards, the first being {lost[0]}")
    return tuple(folder / name for name in names)


def _check_safetensors(field: str, path: Path) -> StoredTensors:
    """The tensors in a file's header, without values. Raises a UserError that says what is wrong with the file."""
    size = ordinary_file(field, path, fix=NO_FILE)
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith(b"version "):
            raise UserError(f"{field}: {path} is a Git LFS pointer and not the file; fetch it with `git lfs pull`")
        if len(start) < 8 or length > min(size - 8, MAX_HEADER):
            raise UserError(f"{field}: {path} is cut short or not a safetensors file ({size:,} bytes); fetch it again")
        try:
            header = parse_json(file.read(length))
            header.pop("__metadata__", None)
            whole = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            if size < whole:
                raise UserError(f"{field}: {path} is cut short ({size:,} of {whole:,} bytes); fetch it again")
            shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
            odd = {name: e["dtype"] for name, e in header.items() if not e["dtype"].startswith(("F", "BF"))}
            return StoredTensors((path,), shapes, _unread, odd)
        except UserError:
            raise
        except Exception as error:  # whatever a header of other types leads to
            raise UserError(f"{field}: {path} is not a safetensors file; fetch it again") from error


def _unread(name: str) -> "Tensor":
    raise AssertionError(f"{name} is known by its header alone")


def open_safetensors(field: str, *files: Path) -> StoredTensors:
    """Tensors of one or more safetensors files, each mapped and none read."""
    headers = safetensors_headers(field, *files)
    handles: dict[str, Any] = {}
    for file in files:
        try:
            handle = safe_open(file, framework="pt")  # which checks that sizes, types and places agree
        except (SafetensorError, OSError) as error:
            raise UserError(f"{field}: {file} cannot be read ({error}); fetch it again") from error
        handles |= dict.fromkeys(handle.keys(), handle)
    return StoredTensors(
        files, headers.shapes, lambda name: handles[name].get_tensor(name), headers.other_dtypes
    ).dequantized()


def safetensors_headers(field: str, *files: Path) -> StoredTensors:
    """Tensors of one or more safetensors files, known only by their headers."""
    headers = [_check_safetensors(field, file) for file in files]
    shapes = {name: shape for part in headers for name, shape in part.shapes.items()}
    return StoredTensors(
        files, shapes, _unread, {name: kind for part in headers for name, kind in part.other_dtypes.items()}
    )


def _load_pickle(field: str, path: Path, dry: bool = False) -> Any:
    """The content of a `.pt` file. dry: with a TensorRef in place of each tensor."""
    ordinary_file(field, path, fix=NO_FILE)
    with open(path, "rb") as file:
        start = file.read(8)
    try:
        walked = dry_run(path)
        if dry:
            return walked.value
        import torch

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Detected pickle protocol")  # it asks for a report to torch
                return torch.load(path, map_location="cpu", weights_only=True, mmap=walked.zipped)
        except pickle.UnpicklingError as error:
            raise NeedsCode(str(error).splitlines()[0]) from error
    except NeedsCode as error:
        raise UserError(
            f"{field}: {path} holds Python objects beside tensors, which can run code when they are read "
            f"({str(error)[:80]}); ask its author for safetensors, or take its tensors alone with "
            f"`python scripts/convert_checkpoint.py --tensors_only`"
        ) from error
    except Exception as error:  # a damaged file can make its reader fail in any way
        if start.startswith(b"PK") and not zipfile.is_zipfile(path):  # its directory is at the end
            state = "is cut short"
        elif not start.startswith((b"PK", b"\x80")):
            state = "is not a PyTorch file"
        else:
            reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
            state = f"is damaged: {reason}"
        raise UserError(f"{field}: {path} {state} ({path.stat().st_size:,} bytes); fetch it again") from error


def open_file(field: str, path: Path) -> dict[str, StoredTensors]:
    """The parts of a file, by name. A flat dictionary of tensors is the part FLAT_PART; a training checkpoint has
    several, and nested dictionaries are parts too (`module.average`).
    """
    if not path.exists():
        raise missing_weights(field, path, "does not exist")
    ordinary_file(field, path, fix=NO_FILE)
    if path.suffix == ".safetensors":
        return {FLAT_PART: open_safetensors(field, path)}
    if path.suffix not in PICKLES:
        raise UserError(f"{field}={path} is of an unknown type; use a folder, .safetensors, or {', '.join(PICKLES)}")
    parts = _parts(field, path, _load_pickle(field, path))
    return {name: tensors for name, value in parts.items() if (tensors := _flat(path, value)).shapes}


def _parts(field: str, path: Path, data: Any) -> dict[str, Mapping[Any, Any]]:
    """The dictionaries in a `.pt` file, down to two levels, by name."""
    if not isinstance(data, Mapping):
        raise UserError(f"{field}: {path} holds a {type(data).__name__} and not named tensors; choose another file")
    parts = {FLAT_PART: data} | {name: value for name, value in data.items() if isinstance(value, Mapping)}
    for name in [*parts][1:]:
        parts |= {f"{name}.{key}": value for key, value in parts[name].items() if isinstance(value, Mapping)}
    return parts


def read_headers(field: str, path: Path) -> dict[str, StoredTensors]:
    """As `open_file`, but without torch; values cannot be read."""
    if path.suffix == ".safetensors":
        return {FLAT_PART: safetensors_headers(field, path).dequantized()}
    if path.suffix not in PICKLES:
        raise UserError(f"{field}={path} is of an unknown type; use a folder, .safetensors, or {', '.join(PICKLES)}")
    parts = _parts(field, path, _load_pickle(field, path, dry=True))
    tensors = {}
    for part, values in parts.items():
        refs = {name: v for name, v in values.items() if isinstance(name, str) and isinstance(v, TensorRef)}
        odd = {name: v.storage.kind for name, v in refs.items() if v.storage.kind not in FLOATS}
        if refs:
            tensors[part] = StoredTensors(
                (path,), {name: v.shape for name, v in refs.items()}, _unread, odd
            ).dequantized()
    return tensors


def _flat(path: Path, data: Mapping[Any, Any]) -> StoredTensors:
    from torch import Tensor

    values = {name: value for name, value in data.items() if isinstance(name, str) and isinstance(value, Tensor)}
    odd = {name: str(value.dtype) for name, value in values.items() if not value.is_floating_point()}
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    return StoredTensors((path,), shapes, values.__getitem__, odd).dequantized()
