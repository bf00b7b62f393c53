"""Forward and backward of one loss: eagerly, or replayed as a CUDA graph."""

from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from utils.device import side_stream
from utils.logs import get_logger

log = get_logger(__name__)

Loss = Callable[..., dict[str, Tensor]]  # plan and named tensors in, {"loss": differentiated, others: logged} out


class Backward:
    """`run(plan, batches)` leaves the loss's gradient in the parameters and returns what the loss returned, detached.

    plan: what a loss depends on besides its tensors, hashable; () where there is nothing. With graphs, on a GPU, each
    plan is captured when it first comes up and then replayed, so that a small network's step is no longer bound by
    kernel launches; tensors of one name always have one shape then. All graphs add to the same gradients and share
    their memory, so any plan and any number of micro-batches can follow each other. Nothing but this class may clear
    the gradients.
    """

    def __init__(
        self, loss: Loss, parameters: Iterable[Tensor], *, autocast: torch.dtype, device: torch.device, graphed: bool
    ):
        self.loss, self.parameters, self.dtype, self.device = loss, list(parameters), autocast, device
        self.graphed = graphed and device.type == "cuda"
        self.graphs: dict[Hashable, _Captured] = {}
        self.pool = None

    def once(self, plan: Hashable, scale: float, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the gradient of one batch, times `scale`, to what is there."""
        # Weights that a step without gradients has cast must not be taken over by a step with them
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=False):
            out = self.loss(plan, **batch)
        (out["loss"] * scale).backward()
        return {name: value.detach() for name, value in out.items()}

    def clear(self) -> None:
        """No gradient; under graphs zeros, in place, because the graphs hold their addresses."""
        if not self.graphed:
            for p in self.parameters:
                p.grad = None
            return
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        torch._foreach_zero_([p.grad for p in self.parameters])

    def run(
        self, plan: Hashable, batches: list[dict[str, Tensor]], between: Callable[[], None] = lambda: None
    ) -> dict[str, Tensor]:
        """Leave the gradient of the mean loss over the micro-batches; return the means of what the loss returned.

        between: called before each micro-batch; what it raises gives them up.
        """
        scale, outs = 1 / len(batches), []
        if self.graphed and plan not in self.graphs:
            self._capture(plan, scale, batches[0])
        self.clear()
        for batch in batches:
            between()
            outs.append(self._replay(plan, batch) if self.graphed else self.once(plan, scale, batch))
        return {name: torch.stack([o[name] for o in outs]).mean(0) for name in outs[0]}

    def _capture(self, plan: Hashable, scale: float, batch: dict[str, Tensor]) -> None:
        inputs = {name: value.clone() for name, value in batch.items()}
        self.clear()
        side = side_stream(self.device, "capture")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3 if not self.graphs else 1):  # autotuning and lazy initialisation
                self.once(plan, scale, inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                outputs = self.once(plan, scale, inputs)
        except RuntimeError as error:  # something here cannot be captured: slower is better than not at all
            reason = str(error).splitlines()[0]
            log.warning("training.cuda_graphs=true: capturing a graph failed (%s); going on without", reason)
            torch.cuda.synchronize()
            self.graphed = False
            return
        self.pool = self.pool or graph.pool()
        self.graphs[plan] = _Captured(graph, inputs, outputs)

    def _replay(self, plan: Hashable, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        captured = self.graphs[plan]
        for name, value in batch.items():
            captured.inputs[name].copy_(value)
        captured.graph.replay()
        return {name: value.clone() for name, value in captured.outputs.items()}


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
