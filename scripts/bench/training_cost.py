"""What a distillation costs by counting: operations of the matrix products of each phase, one micro-batch.

As in scripts/bench/cost.py a multiplication and an addition are two operations. A backward pass is two forward passes
(the gradient of the inputs and that of the weights; under LoRA of frozen linears the first alone). *Model* operations
leave out what activation checkpointing computes again (model/checkpointing.py); `recomputed` has it.
Softmax, norms and the losses are left out, and the scores that a fused kernel's backward pass computes again.

tests/scripts/bench/test_training_cost.py holds them to what torch's FlopCounterMode sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from configs.geometry import Geometry
from model.schedule import Schedule
from model.sizes import TransformerSize

ROLLOUT, STUDENT, TEACHER, SCORE, CRITIC = (
    "rollout without grad",
    "student forward with grad",
    "teacher",
    "critic's score",
    "critic forward with grad",
)
BACKWARD = "backward"


@dataclass(frozen=True)
class Passes:
    """Operations of some forward passes: of linear layers, and between queries and keys, of tokens and of the text."""

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
        """Of the backward pass; frozen: the linear layers' weights have no gradient."""
        return (1 if frozen else 2) * self.linear + 2 * self.attention


def network_pass(network: TransformerSize, *, tokens: int, keys: int, text_tokens: int, batch: int = 1) -> Passes:
    """`tokens` of each sample see `keys`; the text's keys are made already."""
    n, d, f = batch * tokens, network.dim, network.ffn
    cell = network.channels * network.patch[0] * network.patch[1] * network.patch[2]
    time = batch * (network.freq_dim * d + d * d + 6 * d * d)
    linear = network.layers * 2 * n * (6 * d * d + 2 * d * f) + 2 * (n * 2 * cell * d + time)
    past, text = (network.layers * 2 * n * 2 * seen * d for seen in (keys, text_tokens))
    return Passes(linear, past, text)


def text_keys(network: TransformerSize, text_tokens: int, batch: int = 1) -> Passes:
    """The prompt's embedding, and its keys and values in every layer."""
    d = network.dim
    return Passes(2 * batch * text_tokens * (network.text_dim * d + d * d + network.layers * 2 * d * d))


@dataclass(frozen=True, kw_only=True)
class DistillCost:
    """Operations of the phases of an update, for given networks and settings."""

    student: TransformerSize
    teacher: TransformerSize
    critic: TransformerSize
    geometry: Geometry
    schedule: Schedule
    frames: int  # latent frames of the window that the losses see
    text_tokens: int
    batch: int = 1  # samples of a micro-batch
    guidance: bool = True
    fake_guidance: bool = False
    release_context: bool = False  # training.distill.rollout_context
    start_steps: int = 0  # of a chunk of the frozen start, where motion is regressed on what it makes
    frozen: bool = False  # adapters are trained

    def generator(self, exits: Sequence[int]) -> dict[str, int]:
        """Of an update of the student whose chunks exit at these steps."""
        without, graph = self._rollout(exits)
        return {
            ROLLOUT: (without + self._start_rollout(len(exits))).total,
            STUDENT: graph.total,
            TEACHER: self._score(self.teacher, 2 if self.guidance else 1).total,
            SCORE: self._score(self.critic, 2 if self.fake_guidance else 1).total,
            BACKWARD: graph.backward(self.frozen),
        }

    def critic_update(self, exits: Sequence[int]) -> dict[str, int]:
        """Of an update of the critic."""
        without, graph = self._rollout(exits)
        forward = self._score(self.critic, 1)
        return {ROLLOUT: (without + graph).total, CRITIC: forward.total, BACKWARD: forward.backward(self.frozen)}

    def recomputed(self, who: str, exits: Sequence[int]) -> int:
        """What checkpointing adds to a backward pass: of "generator" all of its chunks' forward passes, of "critic" all
        but self-attention."""
        if who == "generator":
            return self._rollout(exits)[1].total
        forward = self._score(self.critic, 1)
        return forward.linear + forward.text

    def _score(self, network: TransformerSize, branches: int) -> Passes:
        tokens, batch = self.frames * self.geometry.tokens_per_frame, self.batch * branches
        one = network_pass(network, tokens=tokens, keys=tokens, text_tokens=self.text_tokens, batch=batch)
        return one + text_keys(network, self.text_tokens, batch)

    def _rollout(self, exits: Sequence[int]) -> tuple[Passes, Passes]:
        """Passes without a graph, and those with one (with the text's keys, which are made once a rollout)."""
        without, graph = Passes(), text_keys(self.student, self.text_tokens, self.batch)
        for chunk, exit_at in enumerate(exits):
            one = self._pass(chunk)
            graph += one
            for _ in range(exit_at + self._after(chunk, exit_at, last=chunk + 1 == len(exits))):
                without += one
        return without, graph

    def _start_rollout(self, chunks: int) -> Passes:
        """The frozen start's, every chunk to the end of its steps."""
        total = text_keys(self.student, self.text_tokens, self.batch) if self.start_steps else Passes()
        for chunk in range(chunks if self.start_steps else 0):
            extra = self.release_context or self.schedule.context_timestep(chunk) is not None
            for _ in range(self.start_steps + (extra and chunk + 1 < chunks)):
                total += self._pass(chunk)
        return total

    def _pass(self, chunk: int) -> Passes:
        """One step of a chunk."""
        tokens = self.geometry.tokens_per_chunk
        keys = len(self.geometry.visible_chunks(chunk)) * tokens
        return network_pass(self.student, tokens=tokens, keys=keys, text_tokens=self.text_tokens, batch=self.batch)

    def _after(self, chunk: int, exit_at: int, *, last: bool) -> int:
        """Passes after the exit, for the chunks to come (pipeline/rollout.py)."""
        if last:
            return 0
        if self.release_context:
            return 1
        rest = len(self.schedule.timesteps(chunk)) - 1 - exit_at
        return rest + (self.schedule.context_timestep(chunk) is not None)
