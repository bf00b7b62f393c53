"""The interface of a training stage, and the base class of stages with one module and one loss."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Config
from trainer.backward import Backward
from trainer.optim.train_state import TrainState
from utils.compiling import TRAINING_OPTIONS
from utils.device import pick_dtype
from utils.distributed import Ranks
from utils.logs import get_logger

log = get_logger(__name__)


class Stage(ABC):
    """One kind of training, driven by trainer/loop.py. Random draws are functions of (seed, name, step, rank)."""

    name: ClassVar[str]
    train_states: dict[str, TrainState]  # what is trained and saved, by name
    export_often: ClassVar[bool] = False  # to <logdir>/export with every checkpoint, not only at the end
    sharded: bool = False  # every rank is needed for `validate` and `export`
    between: Callable[[], None] = staticmethod(lambda: None)  # called before each micro-batch; may abort the update

    def __init__(self, config: Config, device: torch.device, ranks: Ranks):
        self.config, self.device, self.ranks = config, device, ranks
        self.micro_batches, batch = config.training.accumulation(ranks.world)
        log.info("batch: %s", batch)
        warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # norms stay float32

    @abstractmethod
    def update(self, step: int) -> dict[str, Tensor]:
        """Step `step` (from 0) of every train state that is due. Returns logged values, as scalars on the device."""

    def begin(self, step: int, logdir: Path) -> None:  # noqa: B027  most stages have nothing to do
        """Called once before step `step`, when weights are loaded: checks before training."""

    def diagnose(self, rows: list[dict[str, Any]]) -> list[str]:
        """Warnings, each a sentence with a remedy, about the newest of the logged `rows`."""
        return []

    @abstractmethod
    def inputs(self, step: int) -> dict[str, Any]:
        """Inputs of the update of step `step`, drawn again: they are saved if it ended in NaN."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds besides the train states."""
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
        self.module = module.to(device).train()
        self.train_state = TrainState(self.module, t)
        self.train_states = {"module": self.train_state}
        if t.compile:  # after the EMA was copied, which stays uncompiled
            self.module.compile_repeated_blocks(fullgraph=True, options=TRAINING_OPTIONS)
        dtype = pick_dtype(t.precision, device)
        self.backward = Backward(
            lambda plan, **batch: self.loss(**batch), self.train_state.parameters,
            autocast=dtype, device=device, graphed=t.cuda_graphs,
        )  # fmt: skip

    def plan(self, step: int) -> Hashable:
        """Which kind of batch a step takes, the same on all ranks. Batches of one kind have one shape."""
        return ()

    def part(self, step: int, micro: int) -> int:
        """Number of a micro-batch among those of all steps and ranks, from which its samples are drawn: N ranks see the
        same ones as one rank with N times the accumulation."""
        return (step * self.micro_batches + micro) * self.ranks.world + self.ranks.rank

    @abstractmethod
    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        """Inputs of `loss` for micro-batch `micro` of a step: `training.micro_batch` samples."""

    @abstractmethod
    def loss(self, **batch: Tensor) -> dict[str, Tensor]:
        """{"loss": the mean that is differentiated, other names: logged}."""

    @property
    def averaged(self) -> nn.Module:
        return self.train_state.average.module

    def _batches(self, step: int) -> list[dict[str, Tensor]]:
        return [self.batch(step, micro) for micro in range(self.micro_batches)]

    def update(self, step: int) -> dict[str, Tensor]:
        logs = self.backward.run(self.plan(step), self._batches(step))
        return logs | {"gradient_norm": self.train_state.step(step)}

    def inputs(self, step: int) -> dict[str, Any]:
        return {"plan": str(self.plan(step)), "batches": self._batches(step)}
