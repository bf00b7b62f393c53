"""What a stage of training is, and the common part of those with one module and one loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Config
from configs.train_schema import TrainingConfig
from trainer.backward import Backward
from trainer.optim.train_state import TrainState
from utils.compiling import TRAINING_OPTIONS
from utils.device import pick_dtype
from utils.distributed import Ranks
from utils.logs import get_logger

log = get_logger(__name__)


def accumulation(training: TrainingConfig, ranks: Ranks) -> int:
    """Micro-batches that each rank takes a step, so that all ranks together see `training.global_batch` samples."""
    at_once = training.micro_batch * ranks.world
    parts, rest = divmod(training.global_batch, at_once)
    if rest or not parts:
        raise UserError(
            f"training.global_batch={training.global_batch} is not a multiple of training.micro_batch="
            f"{training.micro_batch} x {ranks.world} ranks; try {max(1, parts) * at_once}"
        )
    ranks_text = f"{ranks.world} rank{'s' * (ranks.world != 1)}"
    log.info("global batch %d = micro batch %d x %s x %d accumulated", training.global_batch, training.micro_batch,
             ranks_text, parts)  # fmt: skip
    return parts


class Stage(ABC):
    """One kind of training; trainer/loop.py drives it. Everything drawn is a function of (seed, name, step, rank)."""

    name: ClassVar[str]
    export_often: ClassVar[bool] = False  # with every checkpoint, into <logdir>/export, and not only at the end
    sharded: bool = False  # every rank is needed for `validate` and `export`
    between: Callable[[], None] = staticmethod(lambda: None)  # called where an update can be given up; may raise

    def __init__(self, config: Config, device: torch.device, ranks: Ranks):
        self.config, self.device, self.ranks = config, device, ranks

    @property
    @abstractmethod
    def players(self) -> dict[str, TrainState]:
        """What is trained and saved, by name."""

    @abstractmethod
    def update(self, step: int) -> dict[str, Tensor]:
        """Step `step` (from 0) of every player whose turn it is. Returns what is logged, as scalars on the device."""

    def begin(self, step: int, logdir: Path) -> None:  # noqa: B027  most stages have nothing to do
        """Called once, when weights are loaded and step `step` comes next: what has to be looked at first."""

    def diagnose(self, rows: list[dict[str, Any]]) -> list[str]:
        """Warnings, each a sentence with a remedy, about the newest of the logged `rows`."""
        return []

    def last_batch(self) -> dict[str, Any]:
        """What the newest update was given, to be kept when it ended in NaN."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept besides the players."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  likewise
        """Inverse of `state_dict`."""

    @abstractmethod
    def validate(self, step: int, folder: Path) -> dict[str, float]:
        """Measure the averaged weights; pictures go into `folder`."""

    @abstractmethod
    def export(self, folder: Path, step: int) -> None:
        """Write the averaged weights in the form that inference and later stages load."""


class Supervised(Stage):
    """One module, one loss, one batch a step. A subclass gives `module`, `batch` and `loss`."""

    def __init__(self, config: Config, device: torch.device, ranks: Ranks, module: nn.Module):
        super().__init__(config, device, ranks)
        t = config.training
        if t.sharding != "none":
            raise UserError(f"training.sharding={t.sharding} is for stage distill; use none for stage {t.stage}")
        self.micro_batches = accumulation(t, ranks)
        self.module = module.to(device).train()
        self.player = TrainState(self.module, t)
        if t.compile:  # after the average was copied: it is compiled by nobody
            self.module.compile_repeated_blocks(fullgraph=True, options=TRAINING_OPTIONS)
        dtype = pick_dtype(t.precision, device)
        self.backward = Backward(
            lambda plan, **batch: self.loss(**batch), self.player.parameters,
            autocast=dtype, device=device, graphed=t.cuda_graphs,
        )  # fmt: skip

    def plan(self, step: int) -> Hashable:
        """Which of its kinds of batch a step takes: batches of one kind have one shape."""
        return ()

    @abstractmethod
    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        """Inputs of `loss` for micro-batch `micro` of a step: `training.micro_batch` samples."""

    @abstractmethod
    def loss(self, **batch: Tensor) -> dict[str, Tensor]:
        """{"loss": the mean that is differentiated, other names: logged}."""

    @property
    def players(self) -> dict[str, TrainState]:
        return {"module": self.player}

    @property
    def averaged(self) -> nn.Module:
        return self.player.average.module

    def update(self, step: int) -> dict[str, Tensor]:
        logs = self.backward.run(self.plan(step), [self.batch(step, micro) for micro in range(self.micro_batches)])
        return logs | {"gradient_norm": self.player.step(step)}
