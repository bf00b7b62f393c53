"""Conversion of weights between formats, tensor by tensor: input files are memory-mapped, output files streamed.

    ours          folder: config.json, safetensors with diffusers' names, card.json; EMA weights in a file of their own
    diffusers     the same without a card, and with either weights or EMA weights
    wan           folder: original Wan's config.json, safetensors with original names
    self-forcing  .pt: {"generator": {"model.<original name>": ...}, "generator_ema": ...}

Tensors are not transposed, and cast only on request, so a round trip gives the same bits.
"""

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from configs.reading import ordinary_file
from model.weights import names
from model.weights.files import DIFFUSERS_STEM, EMA_STEM, check_finite, open_safetensors
from model.weights.lora import LoraPlan
from model.weights.plans import WeightPlan
from model.weights.safe_pickle import StorageRef, TensorRef, dry_run
from utils.files import CARD, atomic_folder, atomic_path, temporary_path, write_json_atomic

FORMATS = ("ours", "diffusers", "wan", "self-forcing")
SHARD_BYTES = 5_000_000_000  # of one safetensors file; a whole 1.3B network is one
SAFETENSORS_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
STORAGE_TYPES = {"Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16}
STORAGE_TYPES |= {"Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8}
STORAGE_TYPES |= {"Byte": torch.uint8, "Bool": torch.bool}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed when it is written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def lazy_tensors(
    plan: WeightPlan, loras: Sequence[tuple[LoraPlan, float]] = (), dtype: torch.dtype | None = None
) -> dict[str, LazyTensor]:
    """The tensors of `plan` by name, with adapters merged (plan, scale), in `dtype` (None = unchanged)."""

    def lazy(name: str) -> LazyTensor:
        own = plan.tensors.read(name).dtype  # of a map: nothing is read yet
        layer = name.removesuffix(".weight")
        here = [(lora, scale) for lora, scale in loras if f"{layer}.A" in lora.tensors.shapes]
        added = [(lora, scale) for lora, scale in loras if name in lora.differences.shapes]

        def read() -> Tensor:
            value = check_finite(plan.path, name, plan.tensors.read(name))
            if here or added:
                value = value.float()
            for lora, scale in here:
                down, up = (lora.tensors.read(f"{layer}.{part}").float() for part in "AB")
                value = value + scale * lora.scaling(layer) * (up @ down)
            for lora, scale in added:
                value = value + scale * lora.differences.read(name)
            return value.to(dtype or own)

        return LazyTensor(plan.tensors.shapes[name], dtype or own, read)

    return {name: lazy(name) for name in plan.tensors.shapes}


def write_safetensors(
    path: Path, tensors: Mapping[str, LazyTensor], done: Callable[[int], Any] = lambda size: None
) -> None:
    """Write a safetensors file, one tensor at a time, in the library's order: widest dtype first, then by name.

    done: called with the size in bytes of each tensor that has been written.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        place = [end, end := end + tensor.size]
        header[name] = {
            "dtype": SAFETENSORS_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": place,
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            value = tensors[name].read().contiguous()
            assert (tuple(value.shape), value.dtype) == (tensors[name].shape, tensors[name].dtype), name
            if not torch.isfinite(value.float()).all():
                raise UserError(f"{name} holds values that {value.dtype} does not; convert with another --dtype")
            file.write(value.reshape(-1).view(torch.uint8).numpy())
            done(tensors[name].size)


def write_shards(
    folder: Path, stem: str, tensors: Mapping[str, LazyTensor], done: Callable[[int], Any], limit: int = SHARD_BYTES
) -> None:
    """Write `stem.safetensors`, or shards of at most `limit` bytes and an index, named as diffusers names them."""
    shards: list[dict[str, LazyTensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.size for t in shards[-1].values()) + tensor.size > limit:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", tensors, done)
        return
    places = {}
    for i, shard in enumerate(shards):
        file = f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, done)
        places |= dict.fromkeys(shard, file)
    total = sum(tensor.size for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json_atomic(folder / f"{stem}.safetensors.index.json", index)


def write(
    form: str,
    out: Path,
    weights: Mapping[str, LazyTensor],
    config: Mapping[str, Any],
    *,
    ema: Mapping[str, LazyTensor] | None = None,
    card: Mapping[str, Any] | None = None,
    part: str = "generator",
    done: Callable[[int], Any] = lambda size: None,
    limit: int = SHARD_BYTES,
) -> None:
    """Write a transformer in one of FORMATS, atomically.

    Args:
        config: config.json in diffusers' format.
        ema: EMA weights, for the two formats that hold both.
        part: key of the weights in self-forcing's file.
        limit: maximal bytes of a shard.
    """
    assert form in FORMATS and (ema is None or form in ("ours", "self-forcing")), form
    if form == "self-forcing":
        parts = {part: weights} | ({"generator_ema": ema} if ema is not None else {})
        _write_checkpoint(out, parts, done)
        return
    with atomic_folder(out) as folder:
        if form == "wan":
            weights = {names.original_name(name): tensor for name, tensor in weights.items()}
            write_json_atomic(folder / "config.json", names.original_config(config))
        else:
            kept = {key: value for key, value in config.items() if not key.startswith("_")}
            write_json_atomic(folder / "config.json", {"_class_name": "WanTransformer3DModel"} | kept)
        if form == "ours":
            write_json_atomic(folder / CARD, dict(card or {}))
            if ema is not None:
                write_safetensors(folder / f"{EMA_STEM}.safetensors", ema, done)
            write_safetensors(folder / f"{DIFFUSERS_STEM}.safetensors", weights, done)
        else:
            write_shards(folder, DIFFUSERS_STEM, weights, done, limit)


def _write_checkpoint(out: Path, parts: Mapping[str, Mapping[str, LazyTensor]], done: Callable[[int], Any]) -> None:
    """Write a .pt file. torch.save needs all tensors at once, so they are first written to a file that is mapped."""
    if out.suffix != ".pt":
        raise UserError(f"out={out} is not the name of a .pt file, which form self-forcing is; give one")
    flat = {f"{part}:{name}": tensor for part, weights in parts.items() for name, tensor in weights.items()}
    with temporary_path(out, "tensors.safetensors") as between:
        write_safetensors(between, flat, done)
        tensors = open_safetensors("out", between)
        state = {
            part: {f"model.{names.original_name(name)}": tensors.read(f"{part}:{name}") for name in weights}
            for part, weights in parts.items()
        }
        with atomic_path(out) as temporary:
            torch.save(state, temporary)


# --- tensors out of a file that holds more ----------------------------------------------------------------------------


def read_tensors_only(path: Path) -> dict[str, Any]:
    """The named tensors of a `.pt` file that also contains other objects, which are skipped and never created.
    Dictionaries stay nested.

    Raises:
        UserError: there are no tensors, or the file is damaged.
    """
    ordinary_file("in", path)
    try:
        contents = dry_run(path, keep_going=True)
    except Exception as error:  # a damaged file can make its reader fail in any way
        raise UserError(f"in={path} cannot be read ({error or type(error).__name__}); fetch it again") from error
    if not contents.zipped:
        raise UserError(f"in={path} is of a kind from before torch 1.6; save it with a newer torch")
    whole = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)

    def made(ref: TensorRef) -> Tensor:
        storage: StorageRef = ref.storage
        start = contents.places[storage.key]
        values = whole[start : start + storage.size]
        return torch.empty(0, dtype=STORAGE_TYPES[storage.kind]).set_(values, ref.offset, ref.shape, ref.stride)

    def walk(value: Any) -> Any:
        if isinstance(value, TensorRef):
            return made(value) if value.storage.kind in STORAGE_TYPES else None
        if isinstance(value, Mapping):
            inner = {key: walk(v) for key, v in value.items() if isinstance(key, str)}
            return {key: v for key, v in inner.items() if v is not None} or None
        return value if isinstance(value, int | float | str) else None

    tensors = walk(contents.value)
    if not isinstance(tensors, dict):
        raise UserError(f"in={path} holds no named tensors; choose another file")
    return tensors
