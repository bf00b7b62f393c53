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
class Passes:
    """FLOPs of forward passes: of linear layers, self-attention and cross-attention."""

    linear: int = 0
    past: int = 0
    text: int = 0

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.linear + other.linear, self.past + other.past, self.text + other.text)

    @property
    def attention(self) -> int:
        return self.past + self.text

    @property
    def total(self) -> int:
        return self.linear + self.attention

    def backward(self, frozen: bool) -> int:
        """FLOPs of the backward pass. frozen: the weights of linear layers have no gradient."""
        return (1 if frozen else 2) * self.linear + 2 * self.attention


def network_pass(network: TransformerSize, *, tokens: int, keys: int, text_tokens: int, batch: int = 1) -> Passes:
    """A forward pass in which `tokens` of each sample attend to `keys`; the keys of the text are given."""
    n, d, f = batch * tokens, network.dim, network.ffn
    cell = network.channels * network.patch[0] * network.patch[1] * network.patch[2]
    time = batch * (network.freq_dim * d + d * d + 6 * d * d)
    linear = network.layers * 2 * n * (6 * d * d + 2 * d * f) + 2 * (n * 2 * cell * d + time)
    past, text = (network.layers * 2 * n * 2 * seen * d for seen in (keys, text_tokens))
    return Passes(linear, past, text)


def text_keys(network: TransformerSize, text_tokens: int, batch: int = 1) -> Passes:
    """The embedding of the prompt, and its keys and values in every layer."""
    d = network.dim
    return Passes(2 * batch * text_tokens * (network.text_dim * d + d * d + network.layers * 2 * d * d))


@dataclass(frozen=True)
class StepCost:
    """One network evaluation of the student for one chunk of `batch` streams."""

    passes: Passes
    bytes: Mapping[str, int]  # by part, each input read once and each output written once

    @property
    def flops(self) -> int:
        return self.passes.total

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    def matrix_seconds(self, half: float, fp8: float, *, linears: float = 0.0, attention: bool = False) -> float:
        """Seconds of all products at `half` and `fp8` FLOPs per second, the rates of half precision and of float8.

        linears: share of the linear layers' FLOPs that is float8. attention: self-attention is float8.
        """
        narrow = linears * self.passes.linear + attention * self.passes.past
        return narrow / fp8 + (self.flops - narrow) / half


def step_cost(
    network: TransformerSize, geometry: Geometry, *, visible: int, text_tokens: int, batch: int = 1, fp8: bool = False,
    key_bytes: int = 2,
) -> StepCost:  # fmt: skip
    """Cost of a step of a chunk that attends to `visible` chunks, itself included; the text's keys are given.

    fp8: weights of all blocks have one byte per element (blocks without float8 are neglected).
    key_bytes: bytes per element of the KV cache.
    """
    tokens, keys = geometry.tokens_per_chunk, visible * geometry.tokens_per_chunk
    n, d, f = batch * tokens, network.dim, network.ffn
    cell = network.channels * network.patch[1] * network.patch[2]
    weight = 1 if fp8 else 2
    moved = {
        "weights": network.layers * (6 * d * d + 2 * d * f) * weight + 2 * (2 * cell * d + network.freq_dim * d),
        "activations": network.layers * 2 * n * (12 * d + 2 * f),  # inputs and outputs of the six products
        "keys and values": network.layers * 2 * d * (key_bytes * (batch * keys + n) + 2 * batch * text_tokens),
    }
    return StepCost(network_pass(network, tokens=tokens, keys=keys, text_tokens=text_tokens, batch=batch), moved)


def clip_flops(
    network: TransformerSize, geometry: Geometry, schedule: Schedule, chunks: int, *, text_tokens: int, batch: int = 1
) -> int:
    """FLOPs of all passes of a clip, context passes included."""
    total, tokens = 0, geometry.tokens_per_chunk
    for chunk in range(chunks):
        passes = len(schedule.timesteps(chunk)) + (schedule.context_timestep is not None)
        keys = len(geometry.visible_chunks(chunk)) * tokens
        total += passes * network_pass(network, tokens=tokens, keys=keys, text_tokens=text_tokens, batch=batch).total
    return total
