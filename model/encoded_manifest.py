"""The folder format of precomputed prompt embeddings, and its checks. Needs no torch.

    manifest.json                 a `Manifest`; written last, so a folder without it is not finished
    prompts.json                  the prompts, in the order of their embeddings
    text_00000.safetensors ...    some hundred prompts each: `text` [rows, dim] without padding, `ends` [prompts + 1]:
                                  prompt i of the file has rows ends[i] to ends[i + 1]; `sums` [prompts]: the CRC-32 of
                                  prompt and rows
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.errors import UserError
from configs.reading import ordinary_file
from model.weights.files import read_json, resolve_path
from utils.files import parse_json, write_json_atomic

MANIFEST, PROMPTS = "manifest.json", "prompts.json"
MAX_PROMPTS = 1 << 29  # bytes of prompts.json; the 250,000 prompts of VidProM take 200 MB
FIELD = "training.distill.encoded_prompts"
REBUILD = "make it again with scripts/encode_prompts.py"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What was encoded, with which encoder, into which files."""

    text_tokens: int
    dim: int
    dtype: str  # of the numbers on disk
    encoder: str  # hash of the files of text encoder and tokenizer
    encoder_path: str
    prompts_file: str | None  # None: prompts of the tiny world
    prompts_file_sha256: str | None
    prompts_sha256: str  # of prompts.json
    counts: list[int]  # prompts in each file
    sizes: list[int]  # bytes of each file
    checks: list[str]  # SHA-256 of each file's ends and sums

    def __post_init__(self):
        whole = {"text_tokens": int, "dim": int, "dtype": str, "encoder": str, "encoder_path": str}
        wrong = [name for name, kind in whole.items() if type(vars(self)[name]) is not kind]
        lists = {"counts": int, "sizes": int, "checks": str}
        for name, kind in lists.items():
            values = vars(self)[name]
            if type(values) is not list or any(type(v) is not kind or (kind is int and v < 1) for v in values):
                wrong.append(name)
        if wrong or len({len(vars(self)[name]) for name in lists}) != 1 or not self.counts:
            raise ValueError(f"its {(wrong or ['counts'])[0]} cannot be")

    def write(self, folder: Path) -> None:
        write_json_atomic(folder / MANIFEST, asdict(self))


def file_name(index: int) -> str:
    return f"text_{index:05d}.safetensors"


def prompts_hash(prompts: Sequence[str]) -> str:
    """SHA-256 of the list of prompts; depends on their order."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def read_manifest(path: str | Path, *, text_tokens: int) -> tuple[Path, Manifest]:
    """The folder and its manifest.

    Raises:
        UserError: the folder is missing, unfinished, truncated, or was made for another number of text tokens.
    """
    folder = resolve_path(path)
    if not folder.is_dir():
        raise UserError(f"{FIELD}={path} does not exist; make it with scripts/encode_prompts.py --output_folder {path}")
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{FIELD}={path} is not finished; start scripts/encode_prompts.py again, which goes on")
    try:
        manifest = Manifest(**read_json(FIELD, folder / MANIFEST))
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        reason = "is of another version" if isinstance(error, TypeError) else f"is damaged ({error})"
        raise UserError(f"{FIELD}={path}: {MANIFEST} {reason}; {REBUILD}") from error
    for index, size in enumerate(manifest.sizes):
        file = folder / file_name(index)
        if not file.is_file() or file.stat().st_size != size:
            state = "is cut short or was changed" if file.is_file() else "is missing"
            raise UserError(f"{FIELD}={path}: {file.name} {state}; start scripts/encode_prompts.py again")
    if manifest.text_tokens != text_tokens:
        raise UserError(
            f"{FIELD}={path} was made with {manifest.text_tokens} text tokens and model.text_tokens={text_tokens}; "
            f"set model.text_tokens={manifest.text_tokens}, or {REBUILD}"
        )
    return folder, manifest


def read_prompt_list(folder: Path, manifest: Manifest) -> list[str]:
    """The prompts, in the order of their embeddings."""
    ordinary_file(FIELD, folder / PROMPTS, MAX_PROMPTS, fix=REBUILD)
    try:
        prompts = parse_json((folder / PROMPTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{FIELD}={folder}: {PROMPTS} cannot be read ({error}); {REBUILD}") from error
    listed = isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)
    if not listed or prompts_hash(prompts) != manifest.prompts_sha256 or len(prompts) != sum(manifest.counts):
        raise UserError(f"{FIELD}={folder}: {PROMPTS} is not the list that was encoded; {REBUILD}")
    return prompts
