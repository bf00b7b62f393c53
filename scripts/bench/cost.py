"""FLOPs and memory traffic of a step, by formulas.

Only matrix products are counted; a multiplication and an addition are two FLOPs. Norms, activations and rotations have
less than 1% of the FLOPs at full size, and their memory traffic counts only as inputs and outputs of products. The time
of a step is at least FLOPs / matrix rate and at least bytes / copy rate.

tests/scripts/bench/test_cost.py compares the FLOPs with torch's FlopCounterMode.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from configs.geometry import Geometry
from model.schedule import Schedule
from model.sizes import TransformerSize


@dataclass(frozen=True)
class StepCost:
    """One network evaluation of the student for one chunk of `batch` streams."""

    flops: Mapping[str, int]  # by part
    bytes: Mapping[str, int]  # by part, each input read once and each output written once

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    def floor(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Lower bound of the time in seconds."""
        return max(self.total_flops / flops_per_second, self.total_bytes / bytes_per_second)


def step_cost(
    network: TransformerSize, geometry: Geometry, *, visible: int, text_tokens: int, batch: int = 1, fp8: bool = False,
    key_bytes: int = 2,
) -> StepCost:  # fmt: skip
    """Cost of a step of a chunk that attends to `visible` chunks, itself included; the text's keys are given.

    fp8: weights of all blocks have one byte per element (blocks without float8 are neglected).
    key_bytes: bytes per element of the KV cache.
    """
    n, d, f = batch * geometry.tokens_per_chunk, network.dim, network.ffn
    keys, cell = visible * geometry.tokens_per_chunk, network.channels * network.patch[1] * network.patch[2]
    time = batch * (network.freq_dim * d + d * d + 6 * d * d)
    flops = {
        "projections": network.layers * 2 * n * 6 * d * d,  # q, k, v, out; q and out of the text's
        "feed-forward": network.layers * 2 * n * 2 * d * f,
        "attention to the past": network.layers * 2 * n * 2 * keys * d,
        "attention to the text": network.layers * 2 * n * 2 * text_tokens * d,
        "ends": 2 * (n * 2 * cell * d + time),
    }
    weight = 1 if fp8 else 2
    moved = {
        "weights": network.layers * (6 * d * d + 2 * d * f) * weight + 2 * (2 * cell * d + network.freq_dim * d),
        "activations": network.layers * 2 * n * (12 * d + 2 * f),  # inputs and outputs of the six products
        "keys and values": network.layers * 2 * d * (key_bytes * (batch * keys + n) + 2 * batch * text_tokens),
    }
    return StepCost(flops, moved)


def clip_flops(
    network: TransformerSize, geometry: Geometry, schedule: Schedule, chunks: int, *, text_tokens: int, batch: int = 1
) -> int:
    """FLOPs of all passes of a clip, context passes included."""
    total = 0
    for chunk in range(chunks):
        passes = len(schedule.timesteps(chunk)) + (schedule.context_timestep(chunk) is not None)
        seen = len(geometry.visible_chunks(chunk))
        one = step_cost(network, geometry, visible=seen, text_tokens=text_tokens, batch=batch)
        total += passes * one.total_flops
    return total
