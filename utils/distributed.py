"""Processes started by torchrun: ranks, distribution of work, and the process group for training."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from configs.errors import UserError
from configs.validate import groups_of

T = TypeVar("T")
LATER_S = 60.0  # seconds that NCCL waits beyond the timeout


@dataclass(frozen=True)
class Ranks:
    """Position of this process among all (`rank` of `world`) and on its machine (`local_rank`)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def from_env(cls) -> "Ranks":
        """From the environment variables of torchrun; a single process if they are not set. Raises UserError."""
        names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
        try:
            values = [int(os.environ.get(name, default)) for name, default in names.items()]
        except ValueError as error:
            raise UserError("RANK, WORLD_SIZE and LOCAL_RANK must be integers; start with torchrun") from error
        rank, world, local_rank = values
        if not 0 <= rank < world:
            raise UserError(f"RANK={rank} does not fit WORLD_SIZE={world}; start with torchrun or unset both")
        return cls(rank, world, local_rank)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def groups(self, degree: int, setting: str) -> "Ranks":
        """Position of this rank's group among groups of `degree` neighbouring ranks that share samples.

        Raises UserError if `setting`=degree does not divide the number of ranks.
        """
        return Ranks(self.rank // degree, groups_of(self.world, degree, setting), self.local_rank // degree)

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's items, distributed round robin."""
        return list(items[self.rank :: self.world])


@contextmanager
def process_group(ranks: Ranks, device: torch.device, timeout_s: float = 1800) -> Iterator[None]:
    """The default process group (NCCL on CUDA, else gloo) for as long as the block runs; nothing for one process, or
    within a block that has one.

    NCCL waits longer than `timeout_s`, because it ends the process without a message; the rank watch reports first.
    """
    if ranks.world == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # passing the device makes NCCL connect at once, so that a wrong set-up fails here and not at the first step
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        rank=ranks.rank,
        world_size=ranks.world,
        timeout=timedelta(seconds=timeout_s + (LATER_S if device.type == "cuda" else 0)),
        device_id=device if device.type == "cuda" else None,
    )
    ended_well = False
    try:
        yield
        ended_well = True
    finally:
        if ended_well or device.type != "cuda":  # NCCL would wait for ranks that may be gone
            dist.destroy_process_group()
