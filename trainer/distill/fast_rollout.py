"""Rollouts without a gradient, made by the fast student of inference (model/fast/student.py).

The critic's samples are then generated as in inference: in the precision of activations, compiled, replayed as CUDA
graphs, with a cache that is written in place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from configs.geometry import Geometry
from configs.schema import Config
from model.cache import StreamCache
from model.causal_wan import CausalWanModel
from model.denoiser import Student
from model.fast.student import FastPlan, FastStudent, optimize_student
from model.weights.load import HALF, stored_dtype
from trainer.parallel.apply import reshard, unshard


class FastRollout:
    """A copy of the student with a cache and CUDA graphs, unsharded on every rank.

    chunks: number of chunks of the longest rollout.
    """

    def __init__(
        self, student: CausalWanModel, config: Config, geometry: Geometry, device: torch.device, dtype: torch.dtype,
        chunks: int,
    ):  # fmt: skip
        with init_empty_weights(include_buffers=False):
            model = CausalWanModel.from_config(student.config).eval()
        for name, p in model.named_parameters():
            p.data = p.data.to(stored_dtype(model, name, dtype))
        assert not list(model.buffers()), "they would be left empty"
        model.to_empty(device=device)
        attention = config.inference.attention if dtype in HALF else "sdpa"  # the others have no float32
        how = replace(config.inference, precision="auto", student="keep", attention=attention)
        plan = FastPlan.from_config(how, device)
        self.student: FastStudent = optimize_student(Student(model), plan)
        model.requires_grad_(False)  # what has been fused, too
        self.cache = self.student.new_cache(geometry, config.training.micro_batch, chunks, dtype)
        self.stale = True  # the student has changed since its weights were copied
        self._places = dict(_places(model))

    @contextmanager
    def ready(self, student: CausalWanModel) -> Iterator[tuple[FastStudent, StreamCache]]:
        """The fast student with the weights of `student`, and an empty cache; without autocast, as in inference."""
        with torch.autocast(self.student.model.device.type, enabled=False), torch.no_grad():
            self.refresh(student)
            self.cache.reset()
            yield self.student, self.cache

    @torch.no_grad()
    def refresh(self, student: CausalWanModel) -> None:
        """Copy the weights of `student` if they have changed; a collective if it is sharded."""
        if self.stale:
            unshard(student)
            now = dict(student.named_parameters())
            torch._foreach_copy_(list(self._places.values()), [now[name] for name in self._places])
            reshard(student)
            self.stale = False


def _places(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Maps the student's parameters to those of the fast student, which fuses q, k and v."""
    for name, p in model.named_parameters():
        owner, fused, kind = name.partition("to_qkv")
        if fused:
            yield from ((f"{owner}to_{part}{kind}", rows) for part, rows in zip("qkv", p.chunk(3), strict=True))
        else:
            yield name, p
