"""What a stage of training is, and the common part of those with one module and one loss."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Config
from trainer.backward import Backward, GraphedBackward
from trainer.optim import Player
from utils.device import pick_dtype
from utils.distributed import Ranks


class Stage(ABC):
    """One kind of training; trainer/loop.py drives it. Everything drawn is a function of (seed, name, step, rank)."""

    name: ClassVar[str]

    def __init__(self, config: Config, device: torch.device, ranks: Ranks):
        self.config, self.device, self.ranks = config, device, ranks

    @property
    @abstractmethod
    def players(self) -> dict[str, Player]:
        """What is trained and saved, by name."""

    @abstractmethod
    def update(self, step: int) -> dict[str, Tensor]:
        """Step `step` (from 0) of every player whose turn it is. Returns what is logged, as scalars on the device."""

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
        at_once = t.micro_batch * ranks.world
        self.micro_batches, rest = divmod(t.global_batch, at_once)
        if rest or not self.micro_batches:
            raise UserError(
                f"training.global_batch={t.global_batch} is not a multiple of training.micro_batch={t.micro_batch} x "
                f"{ranks.world} ranks; try {max(1, self.micro_batches) * at_once}"
            )
        self.module = module.to(device).train()
        self.player = Player(self.module, t)
        if t.compile:  # after the average was copied: it is compiled by nobody
            self.module.compile_repeated_blocks(fullgraph=True)
        dtype = pick_dtype(t.precision, device)
        graphed = t.cuda_graphs and device.type == "cuda" and self.micro_batches == 1
        runner = GraphedBackward if graphed else Backward
        self.backward = runner(self.loss, self.player.parameters, autocast=dtype, device=device)

    @abstractmethod
    def batch(self, step: int, micro: int) -> dict[str, Tensor]:
        """Inputs of `loss` for micro-batch `micro` of a step: `training.micro_batch` samples."""

    @abstractmethod
    def loss(self, **batch: Tensor) -> dict[str, Tensor]:
        """{"loss": the mean that is differentiated, other names: logged}."""

    @property
    def players(self) -> dict[str, Player]:
        return {"module": self.player}

    @property
    def averaged(self) -> nn.Module:
        return self.player.average.module

    def update(self, step: int) -> dict[str, Tensor]:
        logs = self.backward.run([self.batch(step, micro) for micro in range(self.micro_batches)])
        return logs | {"gradient_norm": self.player.step(step)}
