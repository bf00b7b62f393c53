"""Forward and backward pass of one loss, eager or replayed as a CUDA graph."""

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

    plan: hashable arguments of the loss besides its tensors, or (). With graphs on a GPU each plan is captured once and
    then replayed, so that steps of small networks are not bound by kernel launches; tensors of one name then need a
    fixed shape. All graphs accumulate into the same gradients and share a memory pool. Only this class may clear the
    gradients.
    """

    def __init__(
        self, loss: Loss, parameters: Iterable[Tensor], *, autocast: torch.dtype, device: torch.device, graphed: bool
    ):
        self.loss, self.parameters, self.dtype, self.device = loss, list(parameters), autocast, device
        self.graphed = graphed and device.type == "cuda"
        self.graphs: dict[Hashable, _Captured] = {}
        self.pool = None

    def once(self, plan: Hashable, scale: float, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Accumulate the gradient of one batch, times `scale`."""
        # no cache: casts made without grad must not be reused with grad
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=enabled, cache_enabled=False):
            out = self.loss(plan, **batch)
        (out["loss"] * scale).backward()
        return {name: value.detach() for name, value in out.items()}

    def clear(self) -> None:
        """Clear the gradients; with graphs in place, since graphs hold their addresses."""
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
        """Compute the gradient of the mean loss over micro-batches; return the means of the loss's outputs.

        between: called before each micro-batch; an exception aborts the update.
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
            # thread_local: NCCL asks for its events on a thread of its own
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                outputs = self.once(plan, scale, inputs)
        except RuntimeError as error:  # something cannot be captured: continue without graphs
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
