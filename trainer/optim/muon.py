"""Muon for the hidden matrices and kernels of a network, AdamW for the rest, as one optimizer.

A convolution's kernel [O, I, ...] counts as the matrix [O, I ...]. Embeddings, first and last layers, biases and norms
stay with AdamW, as the authors of Muon advise. torch.optim.Muon takes one matrix after the other: on a GPU a small
network's step then waits for thousands of tiny kernels. Here matrices of one shape are updated together.
"""

import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from configs.optimizer_schema import OptimizerConfig

# First and last layers of diffusers' WanTransformer3DModel and AutoencoderKLWan.
ENDS = ("patch_embedding", "condition_embedder", "proj_out", "conv_in", "conv_out")

MOMENTUM = 0.95
QUINTIC = (3.4445, -4.775, 2.0315)  # x -> a x + b x^3 + c x^5, five times: singular values end near 1
ROUNDS = 5


def hidden_matrices(module: nn.Module) -> Iterator[Tensor]:
    """Weights of the linear layers and convolutions that are neither a network's first nor its last."""
    for name, part in module.named_modules():
        inside = not any(end in name.split(".") for end in ENDS)
        if inside and isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d) and part.weight.requires_grad:
            yield part.weight


def orthogonalized(matrices: Tensor) -> Tensor:
    """[N, O, I] -> bfloat16 [N, O, I]: each matrix with its singular values near 1, by a Newton-Schulz iteration."""
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonAdamW(torch.optim.AdamW):
    """AdamW, but for parameter groups with `muon: True` (Muon, updates scaled like AdamW's: arXiv 2502.16982, eq. 4).

    Its state dict is that of one optimizer: `momentum_buffer` of a Muon parameter has the parameter's own shape.
    """

    def _groups(self, muon: bool) -> list[dict]:
        return [group for group in self.param_groups if group.get("muon", False) == muon]

    @torch.no_grad()
    def step(self, closure=None):
        """One step of both."""
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
        alike = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                alike[len(p), p[0].numel()].append(p)
        for shape, moved in alike.items():
            self._step_alike(shape, moved, group["lr"], group["weight_decay"])

    def _step_alike(self, shape: tuple[int, int], moved: list[Tensor], lr: float, weight_decay: float) -> None:
        for p in moved:
            if not self.state[p]:  # AdamW's way of loading a state dict expects a step count of every parameter
                self.state[p] |= {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(p)}
        torch._foreach_add_([self.state[p]["step"] for p in moved], 1)
        gradients, momentum = [p.grad for p in moved], [self.state[p]["momentum_buffer"] for p in moved]
        torch._foreach_lerp_(momentum, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momentum, MOMENTUM)  # Nesterov's
        update = orthogonalized(torch.stack([x.flatten(1) for x in ahead])).to(moved[0].dtype)
        torch._foreach_mul_(moved, 1 - lr * weight_decay)
        scale = 0.2 * math.sqrt(max(shape))
        torch._foreach_add_(moved, [x.view_as(p) for x, p in zip(update, moved, strict=True)], alpha=-lr * scale)


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict]:
    """Parameter groups: matrices, vectors (without weight decay) and, if `muon_lr` is set, those of Muon."""
    hidden = {id(p) for p in hidden_matrices(module)} if config.muon_lr else set()
    trained = [p for p in module.parameters() if p.requires_grad]
    muon = [p for p in trained if id(p) in hidden]
    matrices = [p for p in trained if p.ndim > 1 and id(p) not in hidden]
    vectors = [p for p in trained if p.ndim <= 1]
    groups = [
        {"params": matrices},
        {"params": vectors, "weight_decay": 0.0},
        {"params": muon, "muon": True, "lr_share": config.muon_lr / config.lr if config.lr else 0.0},
    ]
    return [group for group in groups if group["params"]]
