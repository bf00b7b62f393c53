"""Forward and backward of one loss: eagerly, or replayed as a CUDA graph."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Loss = Callable[..., dict[str, Tensor]]  # named tensors in, {"loss": differentiated, others: logged} out


class Backward:
    """`run(**batch)` leaves the loss's gradient in the parameters and returns what the loss returned, detached."""

    def __init__(self, loss: Loss, parameters: Iterable[Tensor], *, autocast: torch.dtype, device: torch.device):
        self.loss, self.parameters, self.dtype, self.device = loss, list(parameters), autocast, device

    def _once(self, scale: float, **batch: Tensor) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            out = self.loss(**batch)
        (out["loss"] * scale).backward()
        return {name: value.detach() for name, value in out.items()}

    def clear(self) -> None:
        for p in self.parameters:
            p.grad = None

    def run(self, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Gradient of the mean loss over the micro-batches."""
        self.clear()
        outs = [self._once(1 / len(batches), **batch) for batch in batches]
        return {name: torch.stack([o[name] for o in outs]).mean(0) for name in outs[0]}


class GraphedBackward(Backward):
    """The same, captured once and replayed: a small network's step is then no longer bound by kernel launches.

    One micro-batch of fixed shapes a step. The batch is copied into the graph's own inputs; gradients live in the
    graph's memory and are overwritten by each replay, so nothing but this class may clear them.
    """

    warmups = 3  # eager runs before the capture, for autotuning and lazy initialisation

    def __init__(self, loss: Loss, parameters: Iterable[Tensor], *, autocast: torch.dtype, device: torch.device):
        super().__init__(loss, parameters, autocast=autocast, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _capture(self, batch: dict[str, Tensor]) -> None:
        self.inputs = {name: value.clone() for name, value in batch.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.warmups):
                self.clear()
                self._once(1.0, **self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        self.clear()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = self._once(1.0, **self.inputs)

    def run(self, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        (batch,) = batches
        if self.graph is None:
            self._capture(batch)
        for name, value in batch.items():
            self.inputs[name].copy_(value)
        self.graph.replay()
        return {name: value.clone() for name, value in self.outputs.items()}
