"""Writing and reading of precomputed prompt embeddings, with which training needs no text encoder.

File format: model/encoded_manifest.py. Any number of processes can write one folder: each writes its share of the
files, atomically, and skips those that an earlier run of the same job has written. The process that finds all files
complete writes the manifest.
"""

import hashlib
import json
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import UserError
from configs.schema import ModelConfig
from model.encoded_manifest import (
    FIELD,
    PROMPTS,
    REBUILD,
    Manifest,
    file_name,
    prompts_hash,
    read_manifest,
    read_prompt_list,
)
from model.text import TextEncoder
from model.weights.files import TOKENIZER_FILES, find_tokenizer, open_safetensors, resolve_path
from model.weights.plans import plan_text_encoder
from utils.device import DTYPES
from utils.files import atomic_path, sampled_hash, sha256_of, write_json_atomic

BATCH = 64  # prompts per call of the encoder; the same as in training, so that embeddings are bit-identical
BATCHES = 4  # in a file
Encode = Callable[[Sequence[str]], list[Tensor]]  # embeddings [rows of each prompt, dim]


def encoder_hash(model: ModelConfig) -> str:
    """Hash of the files of `model.text_encoder` (samples of their bytes) and `model.tokenizer`."""
    hashes = [sampled_hash(file) for file in sorted(plan_text_encoder(model.text_encoder).tensors.files)]
    folder = find_tokenizer(model.tokenizer)
    hashes += [sha256_of(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def unpadded_embeddings(encoder: TextEncoder, prompts: Sequence[str], dtype: torch.dtype) -> list[Tensor]:
    """Embeddings [tokens of the prompt, dim] of each prompt, on the CPU."""
    _, mask = encoder.tokenize(prompts)
    text, lengths = encoder(prompts).to(dtype).cpu(), mask.sum(1).tolist()
    return [row[:length].clone() for row, length in zip(text, lengths, strict=True)]


def _sum(prompt: str, rows: Tensor) -> int:
    """CRC-32 of a prompt and its embeddings."""
    return zlib.crc32(rows.contiguous().view(torch.uint8).numpy(), zlib.crc32(prompt.encode()))


def _tables(path: Path) -> tuple[Tensor, Tensor]:
    """`ends` [prompts + 1] and `sums` [prompts] of a file."""
    tensors = open_safetensors(FIELD, path)
    return tensors.read("ends"), tensors.read("sums")


def _check(ends: Tensor, sums: Tensor) -> str:
    return hashlib.sha256(ends.numpy().tobytes() + sums.numpy().tobytes()).hexdigest()


class EncodingJob:
    """Encodes groups of prompts into a folder. Batches do not cross the borders of groups.

    Args:
        about: the manifest's `encoder`, `encoder_path`, `prompts_file`, `prompts_file_sha256`.
    """

    def __init__(
        self, folder: Path, groups: Iterable[Sequence[str]], *, text_tokens: int, dim: int, dtype: str, about: dict
    ):
        self.folder, self.dtype = folder, dtype
        seen: set[str] = set()
        batches: list[list[str]] = []
        for group in groups:
            new = [prompt for prompt in group if prompt not in seen]
            seen |= set(new)
            batches += [new[i : i + BATCH] for i in range(0, len(new), BATCH)]
        self.files = [batches[i : i + BATCHES] for i in range(0, len(batches), BATCHES)]
        self.prompts = [prompt for batch in batches for prompt in batch]
        self.facts = {"text_tokens": text_tokens, "dim": dim, "dtype": dtype} | about

    def key(self, index: int) -> str:
        """Hash of the prompts, sizes and encoder from which file `index` is made."""
        made_of = [self.facts[name] for name in ("text_tokens", "dim", "dtype", "encoder")]
        return hashlib.sha256(json.dumps([made_of, self.files[index]]).encode()).hexdigest()

    def done(self, index: int) -> bool:
        """Whether the file exists, is complete, and belongs to this job."""
        path = self.folder / file_name(index)
        if not path.is_file():
            return False
        try:
            with safe_open(path, "pt") as file:  # refuses a file that is shorter than its header says
                whole = {"text", "ends", "sums"} == set(file.keys())
                return whole and (file.metadata() or {}).get("key") == self.key(index)
        except SafetensorError:
            return False

    def pending(self) -> list[int]:
        return [index for index in range(len(self.files)) if not self.done(index)]

    def write(self, index: int, encode: Encode) -> None:
        """Encode the prompts of one file."""
        rows = [row for batch in self.files[index] for row in encode(batch)]
        ends = torch.tensor([0, *accumulate(len(row) for row in rows)])
        prompts = [prompt for batch in self.files[index] for prompt in batch]
        sums = torch.tensor([_sum(prompt, row) for prompt, row in zip(prompts, rows, strict=True)])
        with atomic_path(self.folder / file_name(index)) as path:
            tensors = {"text": torch.cat(rows), "ends": ends, "sums": sums}
            save_file(tensors, path, metadata={"key": self.key(index)})

    def finish(self) -> bool:
        """Write the manifest if all files are complete; returns whether they are."""
        if self.pending():
            return False
        write_json_atomic(self.folder / PROMPTS, self.prompts)
        sizes = [(self.folder / file_name(i)).stat().st_size for i in range(len(self.files))]
        counts = [sum(map(len, batches)) for batches in self.files]
        checks = [_check(*_tables(self.folder / file_name(i))) for i in range(len(self.files))]
        facts = self.facts | {"counts": counts, "sizes": sizes, "checks": checks}
        manifest = Manifest(prompts_sha256=prompts_hash(self.prompts), **facts)
        manifest.write(self.folder)
        return True


class EncodedText:
    """Stands in for a text encoder: looks prompts up in a folder that was made ahead.

    Gives what the encoder would: float32, because that is what a run's own encoder computes in.
    """

    def __init__(self, path: str | Path, model: ModelConfig, device: torch.device):
        self.folder, self.manifest = read_manifest(path, text_tokens=model.text_tokens)
        if resolve_path(model.text_encoder).exists() and encoder_hash(model) != self.manifest.encoder:
            raise UserError(
                f"{FIELD}={path} was made by another text encoder ({self.manifest.encoder_path}) than "
                f"model.text_encoder={model.text_encoder}; name that one, or {REBUILD}"
            )
        if self.manifest.dtype not in DTYPES:
            raise UserError(f"{FIELD}={path} holds numbers of type {self.manifest.dtype[:40]}; {REBUILD}")
        self.device, self.text_tokens, self.dim = device, self.manifest.text_tokens, self.manifest.dim
        listed = read_prompt_list(self.folder, self.manifest)
        self.index = {prompt: i for i, prompt in reversed(list(enumerate(listed)))}  # the first of equal ones
        self.starts = [0, *accumulate(self.manifest.counts)]
        self.tables = [self._open(number) for number in range(len(self.manifest.counts))]

    def _open(self, number: int) -> tuple[list[int], list[int]]:
        """`ends` and `sums` of a file, which are those of the manifest, and agree with its text."""
        path, most = self.folder / file_name(number), self.text_tokens
        text = open_safetensors(FIELD, path).shapes.get("text")
        try:
            ends, sums = _tables(path)
        except (KeyError, SafetensorError):
            ends = sums = torch.zeros(0)
        offsets = ends.flatten().tolist()
        lengths = [end - begin for begin, end in pairwise(offsets)]
        whole = _check(ends, sums) == self.manifest.checks[number] and text == (offsets[-1], self.dim)
        whole = whole and offsets[0] == 0 and all(0 <= length <= most for length in lengths)
        if not whole or not len(lengths) == len(sums) == self.manifest.counts[number]:
            raise UserError(f"{FIELD}={self.folder}: {path.name} is not the file that was written; {REBUILD}")
        return offsets, sums.tolist()

    def require(self, prompts: Iterable[str]) -> None:
        """Refuse, before the first step, what would be missing at a later one."""
        absent = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self.index))
        if absent:
            raise UserError(
                f"{FIELD}={self.folder} lacks {len(absent):,} of the run's prompts, such as {absent[0][:60]!r}; start "
                f"scripts/encode_prompts.py again with this configuration, which adds them"
            )

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """[B, text_tokens, dim] float32 on the device, zeros after each prompt's end."""
        self.require(prompts)
        shape, dtype = (len(prompts), self.text_tokens, self.dim), DTYPES[self.manifest.dtype]
        host = torch.zeros(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        for row, prompt in zip(host, prompts, strict=True):
            embedding = self._read(prompt)
            row[: len(embedding)] = embedding
        return host.to(self.device, non_blocking=True).float()

    def _read(self, prompt: str) -> Tensor:
        """[rows of the prompt, dim]; only these bytes of the file are read."""
        index = self.index[prompt]
        number = bisect_right(self.starts, index) - 1
        at = index - self.starts[number]
        (begin, end), path = self.tables[number][0][at : at + 2], self.folder / file_name(number)
        try:
            with safe_open(path, "pt") as file:
                rows = file.get_slice("text")[begin:end]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{FIELD}={self.folder}: {path.name} cannot be read ({error}); {REBUILD}") from error
        if rows.dtype != DTYPES[self.manifest.dtype] or _sum(prompt, rows) != self.tables[number][1][at]:
            raise UserError(f"{FIELD}={self.folder}: {path.name} has changed since it was written; {REBUILD}")
        return rows
