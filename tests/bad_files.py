"""More than 200 weight files that are damaged or mean harm, made from small whole ones. Used by test_weights_fuzz.py.

Each maker takes an empty folder and returns (role, path); `CASES` maps a label to a maker. Everything is drawn from
fixed seeds.
"""

import io
import json
import os
import pickle
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from diffusers import AutoencoderKLWan
from safetensors.torch import save, save_file
from torch.distributed.checkpoint import FileSystemWriter
from weight_layouts import TO_T5, WAN_CONFIG, foreign, foreign_vae, original, random_t5, random_wan

from model.tiny_decoder import TinyDecoder, TinyDecoderConfig

Maker = Callable[[Path], tuple[str, Path]]


def saved(value, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


WAN = random_wan()
STATE = original(WAN)
T5 = {foreign(n, TO_T5): v for n, v in random_t5().state_dict().items() if "embed_tokens" not in n}
TINY = TinyDecoder(TinyDecoderConfig(widths=(12, 8, 6, 6))).state_dict()
VAE = {foreign_vae(name): value for name, value in AutoencoderKLWan(base_dim=4).state_dict().items()}

# role, name of the file, its bytes when it is whole
WHOLE = {
    "student.pt": ("student", saved({"generator": STATE, "step": 3})),
    "old.pt": ("student", saved(STATE, legacy=True)),
    "student.safetensors": ("student", save(STATE)),
    "Wan2.1_VAE.pth": ("vae", saved(VAE)),
    "models_t5_umt5-xxl-enc-bf16.pth": ("text_encoder", saved(T5)),
    "taew2_1.safetensors": ("tiny_decoder", save(TINY)),
    "taew2_1.pth": ("tiny_decoder", saved(TINY)),
}


def written(folder: Path, role: str, name: str, content: bytes) -> tuple[str, Path]:
    (folder / name).write_bytes(content)
    return role, folder / name


# --- damaged ----------------------------------------------------------------------------------------------------------


def truncated(name: str, seed: int) -> Maker:
    role, content = WHOLE[name]
    length = random.Random(f"cut {name} {seed}").randrange(len(content))
    return lambda folder: written(folder, role, name, content[:length])


def structure(content: bytes) -> tuple[int, int]:
    """The bytes that say what the tensors are."""
    if content.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (main,) = [e for e in archive.infolist() if e.filename.endswith("data.pkl")]
            start = content.index(archive.read(main))
            return start, start + main.file_size
    if content.startswith(b"\x80"):
        return 0, content.index(b"storage") + 4000
    return 0, 8 + int.from_bytes(content[:8], "little")


def flipped(name: str, seed: int) -> Maker:
    """24 bits turned over among the names, sizes and places of the tensors."""
    role, content = WHOLE[name]
    rng, damaged = random.Random(f"flip {name} {seed}"), bytearray(content)
    start, end = structure(content)
    for _ in range(24):
        damaged[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    return lambda folder: written(folder, role, name, bytes(damaged))


def directory_flipped(seed: int) -> Maker:
    """The zip's own table of contents, at the end."""
    content = WHOLE["student.pt"][1]
    rng, damaged = random.Random(f"directory {seed}"), bytearray(content)
    for _ in range(40):
        damaged[rng.randrange(content.rindex(b"PK\x01\x02") - 2000, len(content))] ^= 1 << rng.randrange(8)
    return lambda folder: written(folder, "student", "student.pt", bytes(damaged))


def noise(seed: int) -> Maker:
    start = [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x05", struct.pack("<Q", 50) + b'{"a":'][seed % 5]
    content = start + random.Random(seed).randbytes(3000)
    name = f"student{'.safetensors' if seed % 5 == 4 else '.pt'}"
    return lambda folder: written(folder, "student", name, content)


def wrong_type(dtype: torch.dtype, suffix: str) -> Maker:
    changed = STATE | {"head.head.weight": torch.zeros(64, 128).to(dtype)}

    def make(folder: Path) -> tuple[str, Path]:
        return written(folder, "student", f"s{suffix}", saved(changed) if suffix == ".pt" else save(changed))

    return make


def replaced(value: torch.Tensor | None, suffix: str) -> Maker:
    """One tensor of another shape, or of none."""
    changed = {k: v for k, v in STATE.items() if k != "blocks.0.ffn.0.weight"}
    changed |= {} if value is None else {"blocks.0.ffn.0.weight": value}

    def make(folder: Path) -> tuple[str, Path]:
        return written(folder, "student", f"s{suffix}", saved(changed) if suffix == ".pt" else save(changed))

    return make


def no_number(value: float, name: str) -> Maker:
    changed = {k: v.clone() for k, v in STATE.items()}
    changed[name].flatten()[0] = value
    return lambda folder: written(folder, "student", "s.safetensors", save(changed))


# --- sizes that lie ---------------------------------------------------------------------------------------------------


def header(**entry) -> Maker:
    """A safetensors file whose first tensor says of itself what `entry` says."""
    content = WHOLE["student.safetensors"][1]
    length = int.from_bytes(content[:8], "little")
    names = json.loads(content[8 : 8 + length])
    names["head.head.weight"] |= entry
    text = json.dumps(names).encode()
    changed = struct.pack("<Q", len(text)) + text + content[8 + length :]
    return lambda folder: written(folder, "student", "student.safetensors", changed)


def raw_header(text: bytes, length: int | None = None) -> Maker:
    content = struct.pack("<Q", len(text) if length is None else length) + text
    return lambda folder: written(folder, "student", "student.safetensors", content)


def config_says(**values) -> Maker:
    """A Diffusers folder whose config.json was changed."""

    def make(folder: Path) -> tuple[str, Path]:
        WAN.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
        return "student", folder

    return make


def vae_says(**values) -> Maker:
    """A Diffusers folder of a VAE whose config.json was changed."""

    def make(folder: Path) -> tuple[str, Path]:
        AutoencoderKLWan(base_dim=4).save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
        return "vae", folder

    return make


def long_header(entry: bytes, count: int) -> Maker:
    def make(folder: Path) -> tuple[str, Path]:
        text = b"{" + (entry * count)[:-1] + b"}"
        return written(folder, "student", "student.safetensors", struct.pack("<Q", len(text)) + text + bytes(4))

    return make


def original_says(role: str, **values) -> Maker:
    def make(folder: Path) -> tuple[str, Path]:
        save_file(STATE, folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text(json.dumps(WAN_CONFIG | values))
        return role, folder

    return make


def folder_file(name: str, content: bytes) -> Maker:
    """A whole Diffusers folder with one more or another file."""

    def make(folder: Path) -> tuple[str, Path]:
        WAN.save_pretrained(folder)
        (folder / name).write_bytes(content)
        return "student", folder

    return make


def index(*names: str) -> Maker:
    def make(folder: Path) -> tuple[str, Path]:
        WAN.save_pretrained(folder)
        file = folder / "diffusion_pytorch_model.safetensors"
        file.rename(folder.parent / f"outside-{folder.name}.safetensors")
        weight_map = {f"t{i}": name.format(outside=f"outside-{folder.name}") for i, name in enumerate(names)}
        (folder / f"{file.name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return "student", folder

    return make


# --- archives ---------------------------------------------------------------------------------------------------------


def archive(entries: list[tuple[str, bytes, int, int]]) -> bytes:
    """A zip of (name, bytes as stored, method, size when unpacked), which need not agree with each other."""
    body, table = b"", b""
    for name, data, method, size in entries:
        packed = len(data) if method else size
        fields = struct.pack("<HHHHHIIIHH", 20, 0, method, 0, 33, zlib.crc32(data), packed, size, len(name), 0)
        table += b"PK\x01\x02" + struct.pack("<H", 20) + fields
        table += struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + name.encode()
        body += b"PK\x03\x04" + fields + name.encode() + data
    count = len(entries)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, count, len(table), len(body), 0)
    return body + table + end


def records(value) -> dict[str, bytes]:
    """What torch.save puts into its zip."""
    with zipfile.ZipFile(io.BytesIO(saved(value))) as whole:
        return {name: whole.read(name) for name in whole.namelist()}


def rebuilt(change: Callable[[dict[str, bytes]], list[tuple[str, bytes, int, int]]]) -> Maker:
    content = archive(change(records(STATE)))
    return lambda folder: written(folder, "student", "student.pt", content)


def stored(parts: dict[str, bytes]) -> list[tuple[str, bytes, int, int]]:
    return [(name, data, 0, len(data)) for name, data in parts.items()]


def zeros(gigabytes: int) -> bytes:
    """So many GB of zeros, deflated: a block that ends on a byte border, again and again."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(1 << 24)) + deflate.flush(zlib.Z_FULL_FLUSH)
    return block * (gigabytes * 64) + b"\x03\x00"


def bomb(record: str) -> Maker:
    def change(parts):
        data = zeros(3)
        return [(n, data, 8, 3 << 30) if n.endswith(record) else (n, d, 0, len(d)) for n, d in parts.items()]

    return rebuilt(change)


# --- pickles that act -------------------------------------------------------------------------------------------------

CALLS = {
    "system": b"cposix\nsystem\n(V{mark}\ntR.",
    "eval": b"cbuiltins\neval\n(Vopen('{mark}', 'w')\ntR.",
    "exec in a dictionary": b"}Vgenerator\ncbuiltins\nexec\n(Vopen('{mark}', 'w')\ntRs.",
    "open": b"cbuiltins\nopen\n(V{mark}\nVw\ntR.",
    "instance": b"(V{mark}\nVw\nibuiltins\nopen\n.",
    "object": b"(cbuiltins\nopen\nV{mark}\nVw\no.",
    "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\nV__call__\ntR(Vos\ntR.",
    "torch.load": b"ctorch\nload\n(V{mark}\ntR.",
    "nested name": b"\x80\x04\x8c\x05torch\x8c\x13serialization.os.fs\x93.",
    "import of a module": b"cthis\ns\n.",
    "bytearray": b"cbuiltins\nbytearray\n(L100000000000L\ntR.",
    "tensor of any size": b"ctorch\nTensor\n(L10000000000L\ntR.",
    "storage of any size": b"ctorch\nFloatStorage\n(L100000000000L\ntR.",
    "memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "text of any length": b"\x80\x04\x8d\xff\xff\xff\xff\xff\x00\x00\x00abc.",
    "bytes of any length": b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00abc.",
    "bytearray of any length": b"\x80\x05\x96\x00\x00\x00\x00\xff\x00\x00\x00abc.",
    "frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\x00\x00\x00}.",
    "number of many digits": b"I" + b"9" * 100_000 + b"\n.",
    "key that takes for ever": b"\x80\x02}K\x01\x85" + b"2\x86" * 60 + b"K\x01s.",
    "set that takes for ever": b"\x80\x04\x8f(K\x01\x85" + b"2\x86" * 60 + b"\x90.",
    "itself": b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
    "deep": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
    "endless stack": b"\x80\x02" + b"N" * 1_000_000,
    "no dictionary": b"\x80\x02K\x01.",
    "empty": b"",
}


# Small files that take for ever, or all memory: each step copies something large once more. (First step, step, times)
OPENING = b"\x80\x02"
WIDE = b"(" + b"K\x01" * 200_000 + b"tq\x000"  # a tuple that later steps have as h0
DICTIONARY = b"}q\x00(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(200_000)) + b"u0"
TEXT = b"X" + struct.pack("<I", 4_000_000) + b"a" * 4_000_000 + b"q\x000"
REPEATED = {
    "steps of 60 MB": (b"", b"N0", 30_000_000),
    "steps of 8 MB": (b"", b"N0", 4_000_000),
    "copies of a dictionary": (DICTIONARY, b"ccollections\nOrderedDict\nh\x00\x85R0", 100_000),
    "sizes out of a text": (TEXT, b"ctorch\nSize\nh\x00\x85R", 1000),
    "sizes without end": (WIDE, b"ctorch\nSize\nh\x00\x85R0", 100_000),
    "calls of many arguments": (WIDE, b"ctorch._utils\n_rebuild_parameter\nh\x00R0", 100_000),
    "new objects of many arguments": (WIDE, b"ccollections\nOrderedDict\nh\x00\x810", 100_000),
    "storages of many arguments": (WIDE, b"h\x00Q0", 100_000),
    "attributes without end": (DICTIONARY, b"ccollections\nOrderedDict\n)Rh\x00b0", 50_000),
    "names of classes without end": (b"\x80\x04" + TEXT, b"h\x00h\x00\x930", 100_000),
    "numbers of a megabyte as keys": (
        b"\x8b" + struct.pack("<I", 1_000_000) + b"\x01" * 1_000_000 + b"q\x000}q\x010", b"h\x01h\x00Ns0", 100_000
    ),
}  # fmt: skip


def repeated(name: str, legacy: bool = False) -> Maker:
    def make(folder: Path) -> tuple[str, Path]:
        first, step, times = REPEATED[name]
        code = OPENING + first + step * times + b"}."
        if legacy:
            start = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
            return written(folder, "student", "s.pt", start + code)
        return written(folder, "student", "s.pt", archive(stored(records({}) | {"archive/data.pkl": code})))

    return make


def many_records(folder: Path) -> tuple[str, Path]:
    entry = b"PK\x01\x02" + struct.pack("<HHHHHHIIIHHHHHII", 20, 20, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    table = entry * 600_000
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 65535, 65535, len(table), 0, 0)
    return written(folder, "student", "s.pt", table + end)


def pipe(name: str) -> Maker:
    """A whole folder in which one file is a pipe, that nobody writes to."""

    def make(folder: Path) -> tuple[str, Path]:
        WAN.save_pretrained(folder)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
        return "student", folder / name if name.endswith((".pt", "alone.safetensors")) else folder

    return make


# --- shards of several processes --------------------------------------------------------------------------------------


def run_of_shards(folder: Path) -> Path:
    """A training run with one sharded checkpoint, whole; returns its metadata."""
    (folder / "export").mkdir()
    (folder / "export" / "config.json").write_text(WAN.to_json_string())
    checkpoint = folder / "checkpoint_000001"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text('{"stage": "distill", "step": 1}')
    tensors = {f"generator.module.{name}": value for name, value in WAN.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, storage_writer=FileSystemWriter(checkpoint / "shards", thread_count=1), no_dist=True)
    return checkpoint / "shards" / ".metadata"


def shards(change: Callable[[Path], object]) -> Maker:
    def make(folder: Path) -> tuple[str, Path]:
        metadata = run_of_shards(folder)
        change(metadata)
        return "student", metadata.parent.parent

    return make


def described(change: Callable[[Any], object]) -> Maker:
    """Shards whose metadata says something else."""

    def rewrite(path: Path) -> None:
        told = pickle.loads(path.read_bytes())
        change(told)
        path.write_bytes(pickle.dumps(told))

    return shards(rewrite)


def replaced_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def places(told) -> list:
    return list(told.storage_data.values())


def widened(told) -> None:
    for entry in told.state_dict_metadata.values():
        entry.size = torch.Size([BIG, *entry.size])


def widened_whole(told) -> None:
    for entry in told.state_dict_metadata.values():
        entry.size = entry.chunks[0].sizes = torch.Size([BIG, *entry.size])


def bombs_inside(path: Path) -> None:
    """Each tensor's own pickle begins with a memo of 2^28."""
    (file,) = path.parent.glob("*.distcp")
    code = b"\x80\x02ctorch._utils"
    file.write_bytes(file.read_bytes().replace(code, b"\x80\x02r\x00\x00\x00\x10.".ljust(len(code), b"."), 1))


NESTED = b"\x80\x02}K\x01\x85" + b"2\x86" * 60 + b"K\x01s."
META = b"ctorch.distributed.checkpoint.metadata\n"
SHARDS: dict[str, Maker] = {
    "metadata memo of 2^28": shards(lambda path: path.write_bytes(b"\x80\x02}r\x00\x00\x00\x10.")),
    "metadata of nested keys": shards(lambda path: path.write_bytes(NESTED)),
    "metadata of a nested format": shards(
        lambda path: path.write_bytes(
            OPENING + META + b"_MEM_FORMAT_ENCODING\nK\x01\x85" + b"2\x86" * 60 + b"\x85R."
        )
    ),
    "metadata of a nested layout": shards(
        lambda path: path.write_bytes(
            OPENING + b"ctorch.serialization\n_get_layout\nK\x01\x85" + b"2\x86" * 60 + b"\x85R."
        )
    ),
    "metadata of a book for a path": shards(
        lambda path: path.write_bytes(OPENING + TEXT + b"cpathlib\nPosixPath\nh\x00h\x00\x86R0" * 100_000 + b"}.")
    ),
    "metadata that calls a class": shards(
        lambda path: path.write_bytes(OPENING + WIDE + (META + b"MetadataIndex\nX\x01\x00\x00\x00ah\x00\x86R0") * 9999)
    ),
    "metadata of 60 MB": shards(lambda path: path.write_bytes(OPENING + b"N0" * 30_000_000 + b"}.")),
    "metadata empty": shards(lambda path: path.write_bytes(b"")),
    "metadata of a number": shards(lambda path: path.write_bytes(b"\x80\x02K\x01.")),
    "metadata a pipe": shards(replaced_by_pipe),
    "metadata gone": shards(lambda path: path.unlink()),
    "shard a pipe": shards(lambda path: replaced_by_pipe(next(path.parent.glob("*.distcp")))),
    "shard gone": shards(lambda path: next(path.parent.glob("*.distcp")).unlink()),
    "shard cut": shards(lambda path: os.truncate(next(path.parent.glob("*.distcp")), 3000)),
    "shard of bombs": shards(bombs_inside),
    "shard elsewhere": described(lambda told: setattr(places(told)[0], "relative_path", "../../../secret.distcp")),
    "shard of another root": described(lambda told: setattr(places(told)[0], "relative_path", "/etc/hostname")),
    "shard beyond its end": described(lambda told: setattr(places(told)[0], "length", BIG)),
    "shard before its start": described(lambda told: setattr(places(told)[0], "offset", -5)),
    "shard packed": described(lambda told: setattr(places(told)[0], "transform_descriptors", ["zstd"])),
    "giant tensor of shards": described(widened),
    "giant part of a tensor": described(widened_whole),
    "part of no place": described(lambda told: told.storage_data.clear()),
}


def acting(name: str, legacy: bool) -> Maker:
    def make(folder: Path) -> tuple[str, Path]:
        code = CALLS[name].replace(b"{mark}", str(folder / "executed").encode())
        if legacy:
            start = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
            return written(folder, "student", "s.pt", start + code + pickle.dumps([], 2))
        parts = records({}) | {"archive/data.pkl": code}
        return written(folder, "student", "s.pt", archive(stored(parts)))

    return make


def tensor(count: int, shape: tuple[int, ...], stride: tuple[int, ...], legacy: bool, data: bytes = b"") -> Maker:
    """A checkpoint of one tensor that declares `count` values in storage and `shape` over them."""

    class Declared:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Stored(), 0, shape, stride, False, {})

    class Stored:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(value, Stored) else None

    def dumped(value) -> bytes:
        file = io.BytesIO()
        Pickler(file, 2).dump(value)
        return file.getvalue()

    def make(folder: Path) -> tuple[str, Path]:
        code = dumped({"patch_embedding.weight": Declared()})
        if legacy:
            start = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
            return written(folder, "student", "s.pt", start + code + pickle.dumps(["0"], 2) + data)
        parts = records({}) | {"archive/data.pkl": code, "archive/data/0": data}
        return written(folder, "student", "s.pt", archive(stored(parts)))

    return make


# --- all of them ------------------------------------------------------------------------------------------------------


def _cases() -> Iterator[tuple[str, Maker]]:
    for name in WHOLE:
        yield from ((f"cut {name} {i}", truncated(name, i)) for i in range(4))
        yield from ((f"flip {name} {i}", flipped(name, i)) for i in range(4))
    yield from ((f"directory {i}", directory_flipped(i)) for i in range(4))
    yield from ((f"noise {i}", noise(i)) for i in range(10))
    for suffix in (".pt", ".safetensors"):
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64):
            yield f"{dtype} {suffix}", wrong_type(dtype, suffix)
        for shape in ((0,), (0, 128), (40, 0), (), (128, 40), (40, 128, 1)):
            yield f"shape {shape} {suffix}", replaced(torch.zeros(shape), suffix)
        yield f"missing {suffix}", replaced(None, suffix)
    for value in ("nan", "inf", "-inf"):
        yield value, no_number(float(value), "blocks.1.ffn.2.bias")
    for key, value in SIZES.items():
        yield f"config {key}={value}"[:40], config_says(**{key: value})
    yield from OTHERS.items()
    for name in CALLS:
        yield f"call {name}", acting(name, legacy=False)
    yield from ((f"repeated {name}", repeated(name)) for name in REPEATED)
    for name in ("steps of 8 MB", "sizes without end"):
        yield f"old repeated {name}", repeated(name, legacy=True)
    yield from SHARDS.items()
    for name in ("system", "bytearray", "memo", "key that takes for ever", "no dictionary"):
        yield f"old call {name}", acting(name, legacy=True)


BIG = 10**12
SIZES = {"num_layers": 10**9, "rope_max_seq_len": BIG, "attention_head_dim": 10**6, "ffn_dim": -1, "patch_size": "x"}
SIZES |= {"num_attention_heads": BIG, "freq_dim": None, "text_dim": 2**70, "eps": [1] * 100, "in_channels": 17}
OTHERS: dict[str, Maker] = {
    "empty .pt": lambda folder: written(folder, "student", "s.pt", b""),
    "empty .safetensors": lambda folder: written(folder, "vae", "s.safetensors", b""),
    "empty folder": lambda folder: ("student", folder),
    "no tensors .pt": lambda folder: written(folder, "student", "s.pt", saved({})),
    "no tensors .safetensors": raw_header(b"{}"),
    "header of 2^63": raw_header(b"{}", 2**63),
    "header beyond the file": raw_header(b"{}", 3),
    "header a list": raw_header(b"[1, 2]"),
    "header deep": raw_header(b"[" * 100_000),
    "header of numbers": raw_header(b'{"a": 1}'),
    "header without places": raw_header(b'{"a": {"dtype": "F32", "shape": [1]}}'),
    "giant shape": header(shape=[BIG, BIG]),
    "shape that overflows": header(shape=[2**62, 4]),
    "negative shape": header(shape=[-64, -128]),
    "fractional shape": header(shape=[64.5, 128]),
    "no type": header(dtype="F31"),
    "other type": header(dtype="F64"),
    "places backwards": header(data_offsets=[64, 0]),
    "places beyond": header(data_offsets=[0, BIG]),
    "giant tensor": tensor(BIG, (BIG,), (1,), False, bytes(16)),
    "giant tensor, old": tensor(BIG, (BIG,), (1,), True, bytes(16)),
    "giant view of nothing": tensor(4, (BIG, BIG), (0, 0), False, bytes(16)),
    "view beyond its storage": tensor(4, (128, 16, 1, 2, 2), (64, 4, 4, 2, 1), False, bytes(16)),
    "negative count": tensor(-4, (4,), (1,), False, bytes(16)),
    "original says more layers": original_says("student", num_layers=10**9),
    "original says no heads": original_says("student", num_heads=0),
    "teacher with text for heads": original_says("teacher", num_heads="many"),
    "index climbs": index("../{outside}.safetensors"),
    "index of another root": index("/etc/hostname"),
    "index climbs, backslash": index("..\\{outside}.safetensors"),
    "index empty": index(),
    "config of 20 MB": folder_file("config.json", b" " * 20_000_000 + b"{}"),
    "config deep": folder_file("config.json", b"[" * 200_000),
    "config no text": folder_file("config.json", b"\xff\xfe\x00"),
    "card no schedule": folder_file("card.json", b'{"schedule": {"rows": 7}}'),
    "record climbs": rebuilt(lambda p: stored(p | {"../../climbed": b"x"})),
    "record of another root": rebuilt(lambda p: stored(p | {"/tmp/climbed": b"x"})),
    "names packed 3 GB": bomb("data.pkl"),
    "values packed 3 GB": bomb("data/0"),
    "records that overlap": rebuilt(lambda p: [(n, d, 0, 10**9) for n, d in p.items()]),
    "records without end": many_records,
    "names of 90 MB": long_header(b'"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},', 1_800_000),
    "names of 15 MB": long_header(b'"a":[1,1,1,1],', 1_100_000),
    "pipe for a .pt": pipe("a.pt"),
    "pipe for a .safetensors": pipe("alone.safetensors"),
    "pipe for the weights of a folder": pipe("diffusion_pytorch_model.safetensors"),
    "pipe for config.json": pipe("config.json"),
    "pipe for card.json": pipe("card.json"),
    "NaN in config.json": folder_file("config.json", json.dumps(dict(WAN.config) | {"eps": float("nan")}).encode()),
    "infinity in config.json": folder_file("config.json", b'{"eps": 1e999}'),
    "eps below nothing": config_says(eps=-1e-6),
    "statistics that are no numbers": vae_says(latents_std=[float("nan")] * 16),
    "statistics of nothing": vae_says(latents_std=[0.0] * 16),
    "statistics too few": vae_says(latents_mean=[0.0]),
    "record twice": rebuilt(lambda p: stored(p) + stored({"archive/data.pkl": b"."})),
}
CASES = dict(_cases())
