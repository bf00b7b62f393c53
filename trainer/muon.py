"""Muon for the hidden matrices and kernels of a network, AdamW for the rest, as one optimiser.

torch.optim.Muon moves matrices only; here a convolution's kernel [O, I, ...] counts as the matrix [O, I ...].
Embeddings, first and last layers, biases and norms stay with AdamW, as the authors of Muon advise.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from configs.optimizer_schema import OptimizerConfig

# First and last layers of diffusers' WanTransformer3DModel and AutoencoderKLWan.
ENDS = ("patch_embedding", "condition_embedder", "proj_out", "conv_in", "conv_out")


def hidden_matrices(module: nn.Module) -> Iterator[Tensor]:
    """Weights of the linear layers and convolutions that are neither a network's first nor its last."""
    for name, part in module.named_modules():
        inside = not any(end in name.split(".") for end in ENDS)
        if inside and isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d) and part.weight.requires_grad:
            yield part.weight


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but for parameter groups with `muon: True` (Muon, updates scaled like AdamW's: arXiv 2502.16982, eq. 4).

    Its state dict is that of one optimiser: `momentum_buffer` of a Muon parameter has the parameter's own shape.
    """

    def __init__(self, groups: list[dict], **adamw):
        super().__init__(groups, **adamw)
        self._views = {p: nn.Parameter(p.detach().flatten(1)) for g in self._groups(muon=True) for p in g["params"]}
        self._muon = torch.optim.Muon(self._views.values(), adjust_lr_fn="match_rms_adamw", weight_decay=0.0)

    def _groups(self, muon: bool) -> list[dict]:
        return [group for group in self.param_groups if group.get("muon", False) == muon]

    @torch.no_grad()
    def step(self, closure=None):
        """One step of both. The parameters' storage must be the one that they had at the start."""
        everything, loss = self.param_groups, None
        self.param_groups = self._groups(muon=False)
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = everything
        for group in self._groups(muon=True):
            self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict) -> None:
        """The views share storage with parameters and momentum, which this optimiser owns and saves."""
        moved = [p for p in group["params"] if p.grad is not None]
        for p in moved:
            state, view = self.state[p], self._views[p]
            if not state:  # AdamW's way of loading a state dict expects a step count of every parameter
                state |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(p)}
            state["step"] += 1
            view.grad = p.grad.flatten(1)
            self._muon.state[view]["momentum_buffer"] = state["momentum_buffer"].view_as(view)
        inner = self._muon.param_groups[0]
        inner["params"], inner["lr"] = [self._views[p] for p in moved], group["lr"]
        inner["weight_decay"] = group["weight_decay"]
        self._muon.step()


def grouped(module: nn.Module, knobs: OptimizerConfig) -> list[dict]:
    """Parameter groups: matrices, vectors (without weight decay) and, if `muon_lr` is set, what Muon moves."""
    hidden = {id(p) for p in hidden_matrices(module)} if knobs.muon_lr else set()
    trained = [p for p in module.parameters() if p.requires_grad]
    muon = [p for p in trained if id(p) in hidden]
    matrices = [p for p in trained if p.ndim > 1 and id(p) not in hidden]
    vectors = [p for p in trained if p.ndim <= 1]
    groups = [
        {"params": matrices},
        {"params": vectors, "weight_decay": 0.0},
        {"params": muon, "muon": True, "lr_share": knobs.muon_lr / knobs.lr if knobs.lr else 0.0},
    ]
    return [group for group in groups if group["params"]]
