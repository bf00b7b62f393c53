"""Rollouts for the critic, made in turns by ranks that share samples and hold a whole student each.

All micro-batches of the critic between two updates of the generator are rolled out by one student, whatever the critic
does meanwhile. So each of n ranks makes another one of the next n, at once, and then they are handed round one by one:

    rank 0   make 0 | step on 0, on 1 | make 2 | ...
    rank 1   make 1 | step on 0, on 1 | make 3 | ...
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model.sequence import SequenceGroup


class Turns:
    """micro_batches: of a step. shape: of a sample, float32."""

    def __init__(self, group: SequenceGroup, micro_batches: int, shape: tuple[int, ...], device: torch.device):
        self.group, self.micro_batches, self.shape, self.device = group, micro_batches, shape, device
        self.next = self.end = self.first = self.until = 0  # micro-batches, counted from the first step's
        self.own: Tensor | None = None

    def begin(self, step: int, end: int) -> None:
        """What is taken next is the first micro-batch of `step`; the student is the same until before step `end`."""
        self.next, self.end = step * self.micro_batches, end * self.micro_batches

    def take(self, make: Callable[[int, int], Tensor]) -> Tensor:
        """The sample of the next micro-batch, on every rank. make: of (step, micro-batch)."""
        place, self.next = self.next, self.next + 1
        if not self.first <= place < self.until:
            self.first, self.until = place, min(place + self.group.size, self.end)
            own = place + self.group.rank
            self.own = make(*divmod(own, self.micro_batches)).float() if own < self.until else None
        owner = place - self.first
        x = self.own if owner == self.group.rank else torch.empty(self.shape, device=self.device)
        return self.group.same(x, owner)
