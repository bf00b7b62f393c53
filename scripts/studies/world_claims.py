"""What of the method's claims is tested on the moving world: rows, claims, and how a claim is decided.

Written before any row was trained; docs/evaluation.md has the same in words. A claim compares two rows in a figure of
their clips, seed by seed, or two figures of one row; claims about streams of ten minutes are measured by
scripts/evaluate_world.py.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from scripts.studies.ablation import Row
from utils.intervals import Interval, paired_interval
from utils.tables import number

SEEDS = (0, 1, 2)  # of training
# A row's training: 200 updates of the student, on half the recipe's batch
BUDGET = (
    "training.steps=1200", "training.global_batch=32", "training.micro_batch=32", "training.optimizer.lr=1.0e-4",
    "training.checkpoint_every=0", "training.distill.critic_warmup=200",
)  # fmt: skip
CLIPS = 512  # of every row and seed, of captions from seed 4322222
HARD = ("swing", "pulse", "bounce", "spin")  # motions in place
QUICK = ("fast", "medium")
MEMORY_CLIPS = 128  # of hide, and of motions without a gap
MEMORY_CHUNKS = 10  # 117 frames: the slowest hides, comes back and is looked at whatever its phase
SHOWN = ("travel", "spin", "swing", "pulse", "bounce")  # motions with one subject that is always seen
REMEMBERED = ("slow", "medium")  # rates at which a hiding subject is gone for a chunk or longer
NO_FLOW, TWO = "training.distill.flow.weight=0", "schedule.steps=2"
CUT = "training.distill.flow.gradient_cut=true"
NEWEST = (
    "training.distill.flow.half=false", "training.distill.flow.frame_error=release",
    "training.distill.motion_regression.weight=1",
)  # fmt: skip
ROWS = (
    Row("four_no_flow", "4 steps in every chunk, no flow loss", ("schedule.steps=4", NO_FLOW)),
    Row("two_no_flow", "2 steps in every chunk, no flow loss", (TWO, NO_FLOW)),
    Row("two_flow", "2 steps, flow loss", (TWO,)),
    Row("two_cut", "2 steps, flow loss without its gradient (4ea418d)", (TWO, CUT)),
    Row("two_newest", "2 steps, flow loss as in 24ef1c9", (TWO, *NEWEST)),
    Row("diagonal", "4322222, diagonal forcing"),
    Row("clean", "4322222, clean refresh", ("stream.context=clean",)),
    Row("mismatch", "4322222, context in training as in 24ef1c9", ("training.distill.rollout_context=release",)),
    Row("even", "2232323, as many evaluations as 4322222", ("schedule.steps=2232323",)),
    Row("two_stages", "4322222, after 4 steps in every chunk, half of the updates each"),
)  # fmt: skip
HALVES = ("four", "two_stages")  # have half of the steps, and of the critic's warm-up
# Where a row starts, unless from the causal student; not measured
PARENTS = {"two_stages": Row("four", "4 steps in every chunk, half of the updates", ("schedule.steps=4",))}


@dataclass(frozen=True)
class Claim:
    """`better` is above `worse` by `effect` in a figure. figure: a column of agreement(), or seam (lower is better).

    as_good: the claim is that `better` is not below `worse` by `effect`. against: a figure of `worse`, where it is
    another one; clips without a value then do not count. lost_from: a row; `better` also has to regain half of what
    `worse` lost against it.
    """

    number: int
    title: str
    better: str
    worse: str
    figure: str
    effect: float
    hard: bool = False  # on motions in place at fast and medium rates alone
    as_good: bool = False
    against: str | None = None
    lost_from: str | None = None


def _motion(number: int, title: str, better: str, worse: str, lost_from: str | None = None) -> tuple[Claim, ...]:
    return tuple(
        Claim(number, f"{title}: {name}", better, worse, f"{name}_ratio", 0.05, hard=True, lost_from=lost_from)
        for name in ("rate", "amplitude")
    )


CLAIMS = (
    *_motion(1, "fewer steps lose motion", "four_no_flow", "two_no_flow"),
    *_motion(2, "the flow loss restores it", "two_flow", "two_no_flow", "four_no_flow"),
    *_motion(2, "without its gradient", "two_cut", "two_no_flow", "four_no_flow"),
    *_motion(2, "as 24ef1c9 has it", "two_newest", "two_no_flow", "four_no_flow"),
    Claim(3, "diagonal forcing against a clean refresh: seams", "diagonal", "clean", "seam", 0.03, as_good=True),
    Claim(3, "diagonal forcing against a clean refresh", "diagonal", "clean", "all", 0.05, as_good=True),
    Claim(3, "diagonal forcing against the mismatch of 24ef1c9: seams", "diagonal", "mismatch", "seam", 0.03),
    Claim(3, "diagonal forcing against the mismatch of 24ef1c9", "diagonal", "mismatch", "all", 0.05),
    Claim(4, "steps early", "diagonal", "even", "all", 0.05),
    Claim(4, "steps early: rate", "diagonal", "even", "rate_near", 0.05),
    Claim(4, "steps early: amplitude", "diagonal", "even", "amplitude_near", 0.05),
    Claim(6, "two stages", "two_stages", "diagonal", "all", 0.05),
    Claim(7, "memory: colour kept behind the board", "diagonal", "diagonal", "kept_hide", 0.05, as_good=True,
          against="kept_shown"),
)
Figures = Mapping[tuple[str, int], Mapping[str, Sequence[float | None]]]  # (row, seed) -> figure -> a value a clip


def difference(claim: Claim, figures: Figures, hard: Sequence[bool]) -> Interval:
    """better - worse over training seeds, each a mean over the same clips, with Student's interval; NaN if not there.

    hard: of each clip, whether its motion is in place and quick. A clip that does not show the caption's motion has
    none of its rate and amplitude: 0.
    """
    keep = torch.tensor(hard) if claim.hard else torch.ones(len(hard), dtype=torch.bool)
    places = ((claim.better, claim.figure), (claim.worse, claim.against or claim.figure))
    rows = []
    for seed in SEEDS:
        if all(figure in figures.get((row, seed), {}) for row, figure in places):
            values = [figures[row, seed][figure] for row, figure in places]
            rows.append([_mean(v, keep) if claim.against is None else _mean_of_known(v) for v in values])
    if not rows:
        return Interval(math.nan, math.nan, math.nan, 0)
    better, worse = (torch.stack(column) for column in zip(*rows, strict=True))
    return paired_interval(better, worse) if claim.figure == "seam" else paired_interval(worse, better)


def _mean(values: Sequence[float | None], keep: torch.Tensor) -> torch.Tensor:
    """Ratios count up to 2, so that a few clips read as very fast do not decide."""
    clips = torch.tensor([0.0 if value is None else float(value) for value in values], dtype=torch.float64)
    return clips.nan_to_num(0.0).clamp_max(2.0)[keep].mean()


def _mean_of_known(values: Sequence[float | None]) -> torch.Tensor:
    return torch.tensor([value for value in values if value is not None], dtype=torch.float64).mean()


def with_effect(claim: Claim, figures: Figures, hard: Sequence[bool]) -> Claim:
    """The claim with the effect that follows from `lost_from`; NaN while that is not measured."""
    if claim.lost_from is None:
        return claim
    lost = difference(replace(claim, better=claim.lost_from), figures, hard)
    return replace(claim, effect=max(claim.effect, lost.value / 2) if lost.n == len(SEEDS) else math.nan)


def decision(claim: Claim, interval: Interval) -> str:
    """holds: the interval excludes 0 on the claim's side and the mean reaches the effect; refuted: it excludes the
    effect; undecided: neither, with the smallest effect that would have been seen.

    Of a claim of one that is as good, holds: the interval is above minus the effect; refuted: it is below.
    """
    if interval.n < len(SEEDS):
        return f"not measured ({interval.n} of {len(SEEDS)} seeds)"
    if math.isnan(claim.effect):
        return f"not measured: {claim.lost_from} is missing"
    least = -claim.effect if claim.as_good else claim.effect
    if interval.low > min(0.0, least) and interval.value >= least:
        return "holds"
    if interval.high < least:
        return "refuted"
    return f"undecided; {(interval.high - interval.low) / 2:.3f} would have been seen"


def table(figures: Figures, hard: Sequence[bool]) -> str:
    """Markdown, a row a claim."""
    lines = ["| | claim | better - worse | effect that matters | decision |", "| --- | --- | --- | --- | --- |"]
    for claim in CLAIMS:
        claim, interval = with_effect(claim, figures, hard), difference(claim, figures, hard)
        value, low, high = (number(x, "+.3f") for x in (interval.value, interval.low, interval.high))
        cells = [str(claim.number), claim.title, f"{value} ({low} .. {high})" if interval.n else "-"]
        lines.append(f"| {' | '.join(cells)} | {number(claim.effect, 'g')} | {decision(claim, interval)} |")
    return "\n".join(lines) + "\n"
