"""FLOPs of each phase of a distillation, for one micro-batch, by formulas.

Counted as in scripts/bench/cost.py. A backward pass has twice the FLOPs of the forward pass (gradients of inputs and of
weights; for linear layers that are frozen under LoRA, of inputs only). *Model* FLOPs leave out what activation
checkpointing computes again (model/checkpointing.py), which is `recomputed`. Softmax, norms and losses are not counted,
nor are the scores that the backward pass of a fused kernel computes again.

tests/scripts/bench/test_training_cost.py compares them with torch's FlopCounterMode.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from configs.geometry import Geometry
from model.schedule import Schedule
from model.sizes import TransformerSize
from scripts.bench.cost import Passes, network_pass, text_keys

ROLLOUT, STUDENT, TEACHER, SCORE, CRITIC = (
    "rollout without grad",
    "student forward with grad",
    "teacher",
    "critic's score",
    "critic forward with grad",
)
BACKWARD = "backward"


@dataclass(frozen=True, kw_only=True)
class DistillCost:
    """FLOPs of the phases of an update, for given networks and settings."""

    student: TransformerSize
    teacher: TransformerSize
    critic: TransformerSize
    geometry: Geometry
    schedule: Schedule
    frames: int  # latent frames in the loss window
    text_tokens: int
    batch: int = 1  # samples of a micro-batch
    guidance: bool = True
    fake_guidance: bool = False
    release_context: bool = False  # training.distill.rollout_context
    start_steps: int = 0  # steps per chunk of the frozen initial student, for the motion regression
    frozen: bool = False  # only adapters are trained

    def generator(self, exits: Sequence[int]) -> dict[str, int]:
        """FLOPs of a generator update by phase. exits: exit step of each chunk."""
        without, graph = self._rollout(exits)
        return {
            ROLLOUT: (without + self._start_rollout(len(exits))).total,
            STUDENT: graph.total,
            TEACHER: self._score(self.teacher, 2 if self.guidance else 1).total,
            SCORE: self._score(self.critic, 2 if self.fake_guidance else 1).total,
            BACKWARD: graph.backward(self.frozen),
        }

    def critic_update(self, exits: Sequence[int]) -> dict[str, int]:
        """FLOPs of a critic update by phase."""
        without, graph = self._rollout(exits)
        forward = self._score(self.critic, 1)
        return {ROLLOUT: (without + graph).total, CRITIC: forward.total, BACKWARD: forward.backward(self.frozen)}

    def recomputed(self, who: str, exits: Sequence[int]) -> int:
        """FLOPs that activation checkpointing adds: for "generator" the forward passes of all chunks, for "critic" all
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
        """FLOPs of passes without a graph and with one (which include the keys of the text, computed once)."""
        without, graph = Passes(), text_keys(self.student, self.text_tokens, self.batch)
        for chunk, exit_at in enumerate(exits):
            one = self._pass(chunk)
            graph += one
            for _ in range(exit_at + self._after(chunk, exit_at, last=chunk + 1 == len(exits))):
                without += one
        return without, graph

    def _start_rollout(self, chunks: int) -> Passes:
        """FLOPs of the rollout of the frozen initial student, all steps of every chunk."""
        total = text_keys(self.student, self.text_tokens, self.batch) if self.start_steps else Passes()
        for chunk in range(chunks if self.start_steps else 0):
            extra = self.release_context or self.schedule.context_timestep is not None
            for _ in range(self.start_steps + (extra and chunk + 1 < chunks)):
                total += self._pass(chunk)
        return total

    def _pass(self, chunk: int) -> Passes:
        """FLOPs of one step of a chunk."""
        tokens = self.geometry.tokens_per_chunk
        keys = len(self.geometry.visible_chunks(chunk)) * tokens
        return network_pass(self.student, tokens=tokens, keys=keys, text_tokens=self.text_tokens, batch=self.batch)

    def _after(self, chunk: int, exit_at: int, *, last: bool) -> int:
        """Number of passes after the exit step, for the context of later chunks (pipeline/rollout.py)."""
        if last:
            return 0
        if self.release_context:
            return 1
        rest = len(self.schedule.timesteps(chunk)) - 1 - exit_at
        return rest + (self.schedule.context_timestep is not None)
