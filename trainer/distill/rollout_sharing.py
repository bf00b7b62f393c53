"""Rollouts for the critic, shared by the ranks of a sequence group that each hold the full student.

Between two updates of the generator the student does not change. So each of n ranks makes one of the next n rollouts at
the same time, and they are broadcast one by one:

    rank 0   make 0 | update with 0, then 1 | make 2 | ...
    rank 1   make 1 | update with 0, then 1 | make 3 | ...
"""

from collections.abc import Callable

import torch
from torch import Tensor

from configs.train_schema import TrainingConfig
from model.sequence import SequenceGroup


def shares_rollouts(t: TrainingConfig) -> bool:
    """Whether a rank of a sequence group can make a rollout by itself: it holds the full student or its fast copy, and
    prompts are encoded ahead (a sharded text encoder needs all ranks).
    """
    whole = t.sequence_student == "whole" or t.distill.fast_rollout
    return t.sequence_parallel > 1 and whole and (t.distill.encode_ahead or t.distill.encoded_prompts is not None)


class RolloutSharing:
    """micro_batches: number per step. shape: of a sample, float32."""

    def __init__(self, group: SequenceGroup, micro_batches: int, shape: tuple[int, ...], device: torch.device):
        self.group, self.micro_batches, self.shape, self.device = group, micro_batches, shape, device
        self.next = self.start = self.end = 0  # micro-batches, counted from the run's first
        self.round, self.own = -1, torch.empty(0)

    def begin(self, step: int, start: int, end: int) -> None:
        """Start of `step`, whose first micro-batch comes next; the student is fixed from step `start` to `end`."""
        self.next, self.start, self.end = (n * self.micro_batches for n in (step, start, end))

    def take(self, make: Callable[[int, int], Tensor]) -> Tensor:
        """The sample of the next micro-batch, on every rank. make: makes that of (step, micro-batch).

        The rank that makes a sample depends on its position only, so a resumed run gets it from the same rank.
        """
        place, self.next = self.next, self.next + 1
        owner = (place - self.start) % self.group.size
        if self.round != place - owner:
            self.round = place - owner
            own = self.round + self.group.rank
            if place <= own < self.end:
                self.own = make(*divmod(own, self.micro_batches)).float()
        x = self.own if owner == self.group.rank else torch.empty(self.shape, device=self.device)
        return self.group.broadcast(x, owner)
