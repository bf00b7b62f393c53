"""Search over schedules: predicted latency, the next candidate, and the Pareto front.

Syntax: digits as in `schedule.steps`, one per chunk, and the context mode: `4322222`, `4322222+clean`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from configs.errors import UserError
from configs.schema import CONTEXTS, Config
from model.schedule import Schedule, with_steps

MAX_STEPS = 9  # of one chunk: a digit


@dataclass(frozen=True, order=True)
class Candidate:
    """Denoising steps of each chunk, and the context mode."""

    steps: tuple[int, ...]
    context: str = "last_step"

    def __post_init__(self):
        if not self.steps or not all(1 <= n <= MAX_STEPS for n in self.steps):
            raise UserError(f"steps={list(self.steps)} is no schedule; give 1 to {MAX_STEPS} steps for each chunk")
        if self.context not in CONTEXTS:
            raise UserError(f"context={self.context} is unknown; use one of {', '.join(CONTEXTS)}")

    @classmethod
    def parse(cls, text: str, chunks: int, context: str = "last_step") -> "Candidate":
        """Parse `4322` or `4322+clean`. The last digit repeats up to `chunks`; further digits are dropped."""
        digits, plus, policy = text.partition("+")
        if not digits.isascii() or not digits.isdecimal() or "0" in digits:
            raise UserError(f"schedules={text} is no schedule; write digits 1-9, one a chunk: 4322222 or 4322+clean")
        steps = [int(digit) for digit in digits]
        steps += [steps[-1]] * (chunks - len(steps))
        return cls(tuple(steps[:chunks]), policy if plus else context)

    @property
    def name(self) -> str:
        suffix = "" if self.context == "last_step" else f"+{self.context}"
        return "".join(map(str, self.steps)) + suffix

    def apply(self, config: Config) -> Config:
        """`config` with these numbers of steps and this context mode; the rest of its schedule is unchanged."""
        return replace(with_steps(config, self.steps, self.context), name=f"{config.name}_{self.name}")

    def schedule(self, config: Config) -> Schedule:
        changed = self.apply(config)
        return Schedule.from_config(changed.schedule, changed.stream)


@dataclass(frozen=True)
class Costs:
    """Milliseconds of the parts of a clip by chunk; a step takes longer when more keys are visible."""

    step: tuple[float, ...]  # one denoising step of chunk k
    context: tuple[float, ...]  # context pass; that of a step if none was measured
    decode: tuple[float, ...]

    @classmethod
    def measured(cls, clips: Sequence[Sequence[Mapping[str, float]]]) -> "Costs":
        """Medians over `ChunkResult.timings` (seconds) of clips of equal length."""
        chunks = len(clips[0])
        step, context, decode = [], [], []
        for k in range(chunks):
            spans = [clip[k] for clip in clips]
            steps = [value for s in spans for name, value in s.items() if name.startswith("step")]
            passes = [s["context"] for s in spans if "context" in s]
            step.append(1000 * median(steps))
            context.append(1000 * median(passes) if passes else step[-1])
            decode.append(1000 * median([s["decode"] for s in spans if "decode" in s] or [0.0]))
        return cls(tuple(step), tuple(context), tuple(decode))

    def clip(self, schedule: Schedule) -> float:
        """Predicted milliseconds of a clip, without encoding the prompt."""
        parts = zip(self.step, self.context, self.decode, strict=True)
        return sum(
            len(schedule.timesteps(k)) * step + decode + (context if schedule.context_timestep(k) is not None else 0)
            for k, (step, context, decode) in enumerate(parts)
        )


@dataclass(frozen=True)
class Point:
    """A schedule that was run. quality: higher is better."""

    candidate: Candidate
    latency_ms: float
    quality: float


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front, fastest first: each point is better than all faster ones."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.latency_ms, -p.quality)):
        if not best or point.quality > best[-1].quality:
            best.append(point)
    return best


def neighbours(candidate: Candidate, max_steps: int = 6) -> Iterator[Candidate]:
    """Schedules with one step more, one less, or one moved, whose steps do not increase from chunk to chunk."""
    steps = candidate.steps
    moves = [{k: d} for k in range(len(steps)) for d in (1, -1)]
    moves += [{a: 1, b: -1} for a in range(len(steps)) for b in range(len(steps)) if a != b]
    for move in moves:
        changed = tuple(n + move.get(k, 0) for k, n in enumerate(steps))
        falls = all(a >= b for a, b in zip(changed, changed[1:], strict=False))
        if falls and min(changed) >= 1 and max(changed) <= max_steps:
            yield replace(candidate, steps=changed)


def next_candidate(
    points: Sequence[Point], cost: Callable[[Candidate], float], budget_ms: float, max_steps: int = 6
) -> Candidate | None:
    """The most expensive untried neighbour, within the budget, of the best schedule within the budget.

    If that has no such neighbour, of the second best, and so on; None if there is none. cost: predicted milliseconds of
    a clip.
    """
    tried = {point.candidate for point in points}
    within = [point for point in points if cost(point.candidate) <= budget_ms]
    for point in sorted(within, key=lambda p: -p.quality):
        fresh = [c for c in neighbours(point.candidate, max_steps) if c not in tried and cost(c) <= budget_ms]
        if fresh:
            return max(fresh, key=lambda c: (cost(c), c.steps))
    return None
