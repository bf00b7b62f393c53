"""LoRA adapters that jobs name: the student's weights with each of them, of which one set is in place at a time.

Streams and jobs take turns at one student, so adapters come and go between two chunks. Weights are copied into the
tensors that are there, for which neither compiled code nor CUDA graphs must be made anew; what runs without an adapter
takes no longer for those that there are. Each costs the memory of the weights that it changes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import Config
from model.denoiser import Student
from model.fast.student import FastPlan, optimize_student
from model.weights.load import load_student
from pipeline.diagonal import DiagonalPipeline
from pipeline.networks import load_loras


class Adapters:
    """`use` puts an adapter on the pipeline's student, or takes it off."""

    def __init__(self, pipe: DiagonalPipeline, files: Mapping[str, str]):
        """files: by name. UserError where one does not fit the student."""
        self._present = dict(_tensors(pipe.session.student.model))
        self._sets: dict[str | None, dict[str, Tensor]] = {None: {}}
        self._active: str | None = None
        for name, file in files.items():
            self._sets[name] = self._changed(pipe, file)
        touched = {key for changed in self._sets.values() for key in changed}
        self._plain = {key: self._present[key].clone() for key in touched}

    def _changed(self, pipe: DiagonalPipeline, file: str) -> dict[str, Tensor]:
        """The tensors that are others with this adapter than without, made as the pipeline's own were."""
        with_it = _student(pipe.config, file, pipe.device, pipe.dtype)
        return {key: value for key, value in _tensors(with_it) if not torch.equal(value, self._present[key])}

    @torch.no_grad()
    def use(self, name: str | None) -> None:
        """Compute with this adapter from now on; None = with none. UserError for a name that there is not."""
        if name == self._active:
            return
        if name not in self._sets:  # of a job that an earlier server took
            raise UserError(f"lora={name} is not served any more; start the server with --lora {name}=FILE")
        wanted = {key: self._plain[key] for key in self._sets[self._active]} | self._sets[name]
        for key, value in wanted.items():
            self._present[key].copy_(value)
        self._active = name


def _student(config: Config, file: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The student of a configuration as its pipeline holds it, with one more adapter merged."""
    names, places = config.model, config.inference
    if places.student != "keep":
        raise UserError(f"--lora needs the student on its device: leave out inference.student={places.student}")
    if places.sequence_parallel > 1:
        raise UserError(f"--lora needs one GPU: leave out inference.sequence_parallel={places.sequence_parallel}")
    if names.lora and not names.lora_merge:
        raise UserError("--lora needs merged weights below it: leave out model.lora_merge=false")
    scales = [*(names.lora_scales or [1.0] * len(names.lora)), 1.0]
    names = replace(names, lora=[*names.lora, file], lora_scales=scales)
    model = load_student(names.student, device, dtype, use_ema=names.use_ema)
    load_loras(model, names)
    plan = FastPlan.from_config(places, device)
    if not plan.is_noop:
        optimize_student(Student(model), plan)
    return model


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())
