"""One rank of many by itself, for its figures: what it computes and holds is real, the others are not there.

Its process group is torch's fake one (scripts/bench/fake_ranks.py). A message is answered at once with what this rank
put into it, so that numbers stay numbers: over rubbish a GPU draws less power, and is faster for it. What would have
been sent is counted; how long that takes, only a run of all ranks shows.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch import Tensor

ROUNDS = {  # how often the message of all ranks goes round; names of torch 2.11 and of 2.13
    "all_gather_into_tensor": 1, "all_gather_single": 1, "reduce_scatter_tensor": 1, "reduce_scatter_single": 1,
    "all_to_all_single": 1, "all_reduce": 2, "broadcast": 1,
}  # fmt: skip


class Messages:
    """Answers and counts messages for as long as the block runs: those of FSDP and of this project; DTensor's, numbers
    of a few bytes, go uncounted to the fake group. bytes: sent by a rank, on average over the ranks of a ring."""

    def __init__(self):
        self.bytes, self._before = Counter(), {}
        self.restart(lambda: "all")

    def restart(self, who: Callable[[], str]) -> None:
        """Count anew, by what `who` says at the time."""
        self.who = who
        self.bytes.clear()

    def __enter__(self) -> "Messages":
        for name in ROUNDS.keys() & vars(dist).keys():
            self._before[name] = vars(dist)[name]
            setattr(dist, name, self._counted(name))
        return self

    def __exit__(self, *error: object) -> None:
        for name, inner in self._before.items():
            setattr(dist, name, inner)

    def _counted(self, name: str) -> Callable[..., Any]:
        inner, rounds = self._before[name], ROUNDS[name]
        order = inspect.signature(inner)

        @wraps(inner)
        def counted(*args, **kwargs):
            given = order.bind(*args, **kwargs).arguments  # in the function's own order: results come first
            first, *rest = (value for value in given.values() if isinstance(value, Tensor))
            group, source = given.get("group"), given.get("group_src")
            size, rank = dist.get_world_size(group), dist.get_rank(group)
            whole = max((first, *rest), key=Tensor.numel)
            self.bytes[self.who()] += rounds * whole.numel() * whole.element_size() * (size - 1) / size
            if rest and first.numel() <= rest[0].numel():  # torch 2.11 leaves these results as they are
                first.copy_(rest[0].view(-1)[: first.numel()].view_as(first))
            if source is not None and source != rank:  # what another rank would have made
                first.normal_()
            return inner(*args, **kwargs)

        return counted
