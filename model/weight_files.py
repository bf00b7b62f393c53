"""Weight files, checked and opened without reading what is in them.

Tensors are read one at a time: safetensors through its own mapping of the file, `.pt` and `.pth` through
`torch.load(mmap=True)`. Opening costs the headers; a file that is missing, cut short or not what its name says is
refused in one sentence.
"""

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import UserError

ROOT = Path(__file__).resolve().parents[1]  # the checkout; relative paths start here
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
BARE = ""  # the part of a file that is one flat dictionary of tensors

# Words in a path, and what `scripts/download.py` calls the thing that is missing there.
DOWNLOADS = (
    ("self_forcing", "self-forcing"),
    ("longlive", "longlive"),
    ("taew", "taew2.1"),
    ("umt5", "umt5"),
    ("vae", "vae"),
    ("14b", "wan-14b"),
)
DOWNLOAD_OF_FIELD = {
    "model.vae": "vae",
    "model.tiny_decoder": "taew2.1",
    "model.text_encoder": "umt5",
    "model.tokenizer": "umt5",
}


@dataclass(frozen=True)
class Tensors:
    """Named tensors on disk: names and shapes now, values when `read`."""

    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(file.stat().st_size for file in self.files)

    def renamed(self, rename: Callable[[str], str | None]) -> "Tensors":
        """The same tensors under other names; those that `rename` maps to None are left out."""
        origin = {new: old for old in self.shapes if (new := rename(old)) is not None}
        shapes = {new: self.shapes[old] for new, old in origin.items()}
        return Tensors(self.files, shapes, lambda name: self.read(origin[name]))


def resolve(path: str | Path) -> Path:
    """An absolute path, or one relative to the working directory if it is there, else to the checkout."""
    path = Path(path).expanduser()
    return path if path.is_absolute() or path.exists() else ROOT / path


def missing(field: str, path: Path, what: str) -> UserError:
    """The sentence for something that is not there: which, where it was looked for, and how to get it."""
    if (ROOT / "assets") in path.parents:
        fix = f"it is part of the repository, so restore it with `git checkout -- {path.relative_to(ROOT)}`"
    else:
        words = "/".join(path.parts[-3:]).lower()
        default = DOWNLOAD_OF_FIELD.get(field, "wan-1.3b")
        name = next((download for word, download in DOWNLOADS if word in words), default)
        fix = f"fetch it with `python scripts/download.py {name}` or set {field}"
    return UserError(f"{field}={path} {what}; {fix}")


def read_json(field: str, path: Path) -> dict[str, Any]:
    """A JSON object, such as a config.json."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise missing(field, path.parent, f"has no {path.name}") from error
    except ValueError as error:
        raise UserError(f"{field}: {path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(data, dict):
        raise UserError(f"{field}: {path} is not a JSON object; fetch it again")
    return data


def shards(field: str, folder: Path, stem: str) -> tuple[Path, ...]:
    """The safetensors files `stem*.safetensors` of a folder, one or many, none of them missing."""
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    if single.exists():
        return (single,)
    if index.exists():
        names = sorted(set(read_json(field, index).get("weight_map", {}).values()))
    else:
        found = sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
        if not found:
            raise missing(field, folder, f"has no {single.name}")
        count = found[0].stem.rsplit("-of-", 1)[1]
        names = [f"{stem}-{i + 1:0{len(count)}d}-of-{count}.safetensors" for i in range(int(count))]
    lost = [name for name in names if not (folder / name).exists()]
    if lost:
        raise missing(field, folder, f"lacks {len(lost)} of {len(names)} shards, the first being {lost[0]}")
    return tuple(folder / name for name in names)


def _safetensors_shapes(field: str, path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from the header, which also says how long the file must be."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith(b"version "):
            raise UserError(f"{field}: {path} is a Git LFS pointer and not the file; fetch it with `git lfs pull`")
        if len(start) < 8 or length > size - 8:
            raise UserError(f"{field}: {path} is cut short or not a safetensors file ({size:,} bytes); fetch it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise UserError(f"{field}: {path} is not a safetensors file; fetch it again") from error
    header.pop("__metadata__", None)
    whole = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != whole:
        raise UserError(f"{field}: {path} is cut short ({size:,} of {whole:,} bytes); fetch it again")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def open_safetensors(field: str, *files: Path) -> Tensors:
    """Tensors of one or more safetensors files."""
    place: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        found = _safetensors_shapes(field, file)
        shapes |= found
        place |= dict.fromkeys(found, file)
    handles: dict[Path, Any] = {}

    def read(name: str) -> Tensor:
        file = place[name]
        if file not in handles:
            try:
                handles[file] = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise UserError(f"{field}: {file} cannot be read ({error}); fetch it again") from error
        return handles[file].get_tensor(name)

    return Tensors(files, shapes, read)


def _load_pickle(field: str, path: Path) -> Any:
    with open(path, "rb") as file:
        start = file.read(8)
    zipped = zipfile.is_zipfile(path)  # its directory is at the end, so a file cut short has none
    if not zipped and not start.startswith(b"\x80"):
        state = "cut short" if start.startswith(b"PK") else "not a PyTorch file"
        raise UserError(f"{field}: {path} is {state} ({path.stat().st_size:,} bytes); fetch it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{field}: {path} holds Python objects beside tensors, which can run code when they are read; "
            f"ask its author for safetensors, or save its tensors alone with torch.save"
        ) from error
    except (EOFError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends too early"
        raise UserError(f"{field}: {path} cannot be read ({reason}); fetch it again") from error


def open_file(field: str, path: Path) -> dict[str, Tensors]:
    """The parts of a file: a flat dictionary of tensors is the part `BARE`; a training checkpoint has several."""
    if not path.exists():
        raise missing(field, path, "does not exist")
    if path.suffix == ".safetensors":
        return {BARE: open_safetensors(field, path)}
    if path.suffix not in PICKLES:
        raise UserError(f"{field}={path} is of an unknown type; use a folder, .safetensors, or {', '.join(PICKLES)}")
    data = _load_pickle(field, path)
    if not isinstance(data, Mapping):
        raise UserError(f"{field}: {path} holds a {type(data).__name__} and not named tensors; choose another file")
    parts = {name: _flat(path, value) for name, value in data.items() if isinstance(value, Mapping)}
    parts[BARE] = _flat(path, data)
    return {name: tensors for name, tensors in parts.items() if tensors.shapes}


def _flat(path: Path, data: Mapping[Any, Any]) -> Tensors:
    values = {name: value for name, value in data.items() if isinstance(name, str) and isinstance(value, Tensor)}
    return Tensors((path,), {name: tuple(value.shape) for name, value in values.items()}, values.__getitem__)
