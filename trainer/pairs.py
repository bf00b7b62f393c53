"""ODE trajectories of the teacher: states between noise and clean latents, with their prompts.

Two layouts, both of Self-Forcing, either readable:

    folder/00042.pt     {prompt: tensor [1, S, F, C, H, W]}, the first state at t = 1000, the last clean
    LMDB                latents_{i}_data (raw float16), prompts_{i}_data (UTF-8), latents_shape, prompts_shape (digits)

Neither stores the timesteps of the states. Ours are stored beside them, in `timesteps.json`; without it Self-Forcing's
are assumed: 48 Euler steps at shift 8, every twelfth of them kept. Causal trajectories, whose chunks are conditioned on
the clean ends of earlier chunks, are marked there (`causal`).
"""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from configs.reading import ordinary_file
from model.flow import shift_time
from model.weights.files import FLAT_PART, check_finite, open_file, read_headers, resolve_path
from utils.files import atomic_path, parse_json

TIMESTEPS = "timesteps.json"
MAX_TOLD = 1 << 20  # bytes of it
SELF_FORCING = tuple(shift_time(t, 8.0) for t in (1000.0, 750.0, 500.0, 250.0, 0.0))


def open_pairs(field: str, path: str | Path) -> "Pairs":
    """Open pairs of either layout in `path` and check everything but their values. field: the setting that names it."""
    path = resolve_path(Path(path))
    if (path / "data.mdb").exists():
        return LmdbPairs(field, path)
    if path.is_dir() and any(path.glob("*.pt")):
        return FolderPairs(field, path)
    raise UserError(
        f"{field}={path} holds no trajectories; make some with "
        f"python scripts/generate_ode_pairs.py --output_folder {path}"
    )


class FolderPairs:
    """One file per prompt. Prompts and shapes are read at once, states on demand.

    timesteps: of the S states. causal: whether chunks are conditioned on the clean ends of earlier ones.
    """

    def __init__(self, field: str, path: Path):
        self.field, self.files = field, sorted(path.glob("*.pt"))
        self.prompts: list[str] = []
        for file in self.files:
            parts = read_headers(field, file)
            shapes = parts[FLAT_PART].shapes if set(parts) == {FLAT_PART} else {}
            shape = next(iter(shapes.values()), ())[-5:]
            if self.files[0] is file:
                self.shape = shape
            if len(shapes) != 1 or parts[FLAT_PART].other_dtypes or len(shape) != 5 or shape != self.shape:
                raise UserError(
                    f"{field}: {file} does not hold one prompt with states [S, F, C, H, W] like those of the "
                    f"other files; make it again with scripts/generate_ode_pairs.py"
                )
            self.prompts += shapes
        self.timesteps, self.causal = _timesteps(field, path, self.shape[0])

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: Sequence[int]) -> Tensor:
        """float16 [B, S, F, C, H, W] on the CPU."""
        states = []
        for i in index:
            tensors = open_file(self.field, self.files[i])[FLAT_PART]
            value = tensors.read(self.prompts[i])
            states.append(check_finite(self.files[i], "its states", value.reshape(self.shape)))
        return torch.stack(states).half()


class LmdbPairs:
    """The database that Self-Forcing's scripts write; otherwise as FolderPairs."""

    def __init__(self, field: str, path: Path):
        import lmdb  # only runs on pairs need it

        self.path, again = path, "make it again"
        size = ordinary_file(field, path / "data.mdb", fix=again)
        try:
            self.env = lmdb.open(str(path), readonly=True, lock=False, readahead=False, meminit=False)
            needed = (self.env.info()["last_pgno"] + 1) * self.env.stat()["psize"]
        except lmdb.Error as error:
            raise UserError(f"{field}={path} is damaged ({error}); {again}") from error
        if size < needed:  # reading beyond the end of a memory map kills the process
            raise UserError(f"{field}={path} is cut short ({size:,} of {needed:,} bytes); {again}")
        try:
            self.shape = tuple(int(n) for n in self._get("latents_shape").decode().split())
            if len(self.shape) not in (5, 6) or min(self.shape) < 1:
                raise ValueError(f"latents_shape={self.shape}")
            self.prompts = [self._get(f"prompts_{i}_data").decode() for i in range(self.shape[0])]
            with self.env.begin(buffers=True) as transaction:
                sizes = {len(transaction.get(f"latents_{i}_data".encode(), b"")) for i in range(self.shape[0])}
            if sizes != {2 * math.prod(self.shape[1:])}:
                raise ValueError(f"latents of {sorted(sizes)[0]:,} bytes for {self.shape[1:]}")
        except (ValueError, lmdb.Error) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{field}={path} holds no valid trajectories ({error}); {again}") from error
        self.timesteps, self.causal = _timesteps(field, path, self.shape[1] if len(self.shape) == 6 else 1)

    def _get(self, key: str) -> bytes:
        with self.env.begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise UserError(f"{self.env.path()} has no entry {key}; make it again")
        return value

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, index: Sequence[int]) -> Tensor:
        rows = [np.frombuffer(self._get(f"latents_{i}_data"), dtype=np.float16) for i in index]
        states = check_finite(self.path, f"its trajectories {list(index)}", torch.from_numpy(np.stack(rows)))
        return states.reshape(len(rows), *((1,) if len(self.shape) == 5 else ()), *self.shape[1:])


Pairs = FolderPairs | LmdbPairs


def write_timesteps(folder: Path, timesteps: Sequence[float], *, causal: bool) -> None:
    """Write the timesteps of the trajectories in `folder` beside them; UserError if it holds trajectories of others."""
    file, stored = folder / TIMESTEPS, list(timesteps)
    content = {"timesteps": stored, "causal": True} if causal else stored
    if file.is_file() and _read_stored("--output_folder", file) != content:
        raise UserError(f"{folder} holds trajectories of another kind, by its {TIMESTEPS}; choose another folder")
    with atomic_path(file) as aside:
        aside.write_text(json.dumps(content))


def _read_stored(field: str, file: Path) -> Any:
    ordinary_file(field, file, MAX_TOLD)
    try:
        return parse_json(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{field}: {file} is not valid JSON ({error}); make the trajectories again") from error


def _timesteps(field: str, path: Path, states: int) -> tuple[tuple[float, ...], bool]:
    """The timesteps of the trajectories in `path`, Self-Forcing's if none are stored and the number of states fits;
    and whether the trajectories are causal."""
    content = _read_stored(field, path / TIMESTEPS) if (path / TIMESTEPS).is_file() else {}
    content = content if isinstance(content, dict) else {"timesteps": content}
    stored, causal = content.get("timesteps"), content.get("causal", False) is True
    if stored is None and states == len(SELF_FORCING):
        return SELF_FORCING, causal
    if stored is None or not isinstance(stored, list) or len(stored) != states:
        raise UserError(f"{path} has trajectories of {states} states at unknown timesteps; write them to {TIMESTEPS}")
    numbers = [t for t in stored if isinstance(t, int | float) and 0 <= t <= 1000]
    if len(numbers) != states or any(a <= b for a, b in pairwise(numbers)) or numbers[-1] != 0:
        raise UserError(f"{field}={path} has timesteps {str(stored)[:60]} that do not fall to 0; correct {TIMESTEPS}")
    return tuple(float(t) for t in numbers), causal
