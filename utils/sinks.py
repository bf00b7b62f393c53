"""Metric sinks beside the JSON lines: Weights & Biases and TensorBoard, where they are installed and asked for."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.errors import UserError


class WandbSink:
    """A Weights & Biases run that a resumed training continues: its id is that of the folder."""

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any], save_dir: Path | None = None):
        try:
            import wandb
        except ImportError as error:
            raise UserError("training.loggers names wandb, which is not installed; run pip install wandb, or pass "
                            "--disable-wandb") from error  # fmt: skip
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        where = save_dir or folder
        where.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project="diagonal-distillation", name=name, id=identity, resume="allow", dir=str(where), config=dict(config)
        )

    def write(self, step: int, **values: Any) -> None:
        self._run.log(values, step=step)

    def __enter__(self):
        return self

    def __exit__(self, kind, *exception):
        self._run.finish(exit_code=int(kind is not None))


class TensorboardSink:
    """Scalars as event files under `folder`."""

    def __init__(self, folder: Path, purge_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError("training.loggers names tensorboard, which is not installed; run pip install tensorboard, "
                            "or set training.loggers=[]") from error  # fmt: skip
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def write(self, step: int, **values: Any) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"train/{name}", value, step)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._writer.close()
