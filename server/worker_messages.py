"""What the front and a worker's process tell each other, each way over one pipe, as tuples (kind, number, ...).

    to the process    control, stream, Control           a checked control; the first one of a stream opens it
                      close, stream
                      job, job, (JobSpec, path)          make a video
                      cancel, job
                      stop, 0
    to the front      ready, 0, dict                     the model is warm: `about`, `costs`, `memory`
                      failed, 0, str                     it cannot be loaded; the sentence says why
                      alive, 0, float                    nothing may be heard for so many seconds
                      event, stream, dict                as docs/live-protocol.md has it
                      video, stream, Video[, measured]   measured: dict, what making the chunk has shown
                      job, job, dict                     `type`: progress, done or failed

The front never loads a network: nothing here imports the model's half when it is imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from configs.load import load_config
from configs.schema import Config
from model.schedule import Schedule
from model.weights.inspection import inspect_weights, required_weights

if TYPE_CHECKING:
    from pipeline.diagonal import DiagonalPipeline

STOP_SECONDS = 10.0  # that a process has to end by itself
NO_ROOM = "the server's disk is full, and the video could not be written; create it again later"


@dataclass(frozen=True)
class ModelSource:
    """What each worker loads; sent to its process. A subclass may override `load`."""

    config_path: str
    overrides: tuple[str, ...] = ()
    loras: Mapping[str, str] = field(default_factory=dict)  # files of the adapters that jobs may name

    def config(self) -> Config:
        return load_config(self.config_path, self.overrides)

    def check(self) -> None:
        """Raise a UserError if weights or an adapter are missing or damaged, by their headers, before workers start."""
        config = self.config()
        for role, path, name in required_weights(config):
            inspect_weights(role, path, use_ema=config.model.use_ema and role == "student", name=name)
        for name, path in self.loras.items():
            inspect_weights("lora", path, name=f"--lora {name}")

    def load(self, rank: int) -> "DiagonalPipeline":
        """The pipeline on GPU `rank` of those there are. Runs in the worker; the front must not import torch's half."""
        from pipeline.diagonal import DiagonalPipeline

        return DiagonalPipeline.from_config(self.config_path, *self.overrides, local_rank=rank)


@dataclass(frozen=True)
class JobSpec:
    """A whole video."""

    prompt: str
    seed: int = 0
    frames: int | None = None  # pixel frames, 1 + 4 n in whole chunks; None = as configured
    schedule: Schedule | None = None  # None = as configured
    image: Any = None  # uint8 [H, W, 3] that it begins with
    lora: str | None = None  # name of an adapter of ModelSource


@dataclass(frozen=True)
class Video:
    """A piece of video for one stream, as docs/live-protocol.md describes it."""

    header: dict[str, Any]
    payload: bytes = field(repr=False)
