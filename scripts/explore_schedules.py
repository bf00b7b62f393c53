"""Compare schedules by latency and quality on the same prompts and seeds.

    python scripts/explore_schedules.py --config_path configs/tiny.yaml --schedules 4322222 2222222 4444444+clean

A schedule is written as in `schedule.steps`, one digit a chunk, with the context mode after a plus.

Writes front.md, points.json and the YAML of each schedule on the Pareto front. Latency is denoising plus
decoding: the median over --rounds in which schedules alternate, so a slower machine affects all of them. Quality is the
share of stated attributes that are measured correctly (--quality tiny, for the tiny world), or the PSNR in dB to a
schedule of many steps from the same noise (--quality reference). A schedule that differs from the reference is not
necessarily worse.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits

exits.guard(__name__)

import numpy as np
import torch

from configs.errors import UserError
from configs.geometry import Geometry
from configs.load import load_config, to_yaml
from configs.schema import CONTEXTS, Config
from model.schedule import Schedule, with_steps
from model.weights.files import resolve_path
from pipeline.diagonal import DiagonalPipeline
from scripts.quality.clip_folder import chunk_borders
from scripts.studies.vocabulary import check_world
from trainer.tiny.captions import ATTRIBUTES, parse_caption
from trainer.tiny.measures import score
from trainer.tiny.world import TinyWorld
from utils.clip_measures import MEASURES, as_clip, series, summary
from utils.device import set_threads
from utils.files import atomic_path, check_writable, finite, write_json_atomic
from utils.intervals import Interval, mean_interval
from utils.logs import console
from utils.progress import progress_bar
from utils.prompts import read_prompts
from utils.seeds import sample_seed
from utils.tables import markdown, number

GRID = ("1", "2", "21", "3", "32", "322", "432", "422", "43", "4", "5432", "5333", "4+clean", "432+clean")
COLUMNS = {"tiny": "attributes right", "reference": "PSNR to the reference, dB"}


@dataclass(frozen=True)
class Candidate:
    """Denoising steps of each chunk, and the context mode."""

    steps: tuple[int, ...]
    context: str = "last_step"

    @classmethod
    def parse(cls, text: str, chunks: int) -> "Candidate":
        """Parse `4322` or `4322+clean`. The last digit repeats up to `chunks`; further digits are dropped."""
        digits, plus, context = text.partition("+")
        if not digits.isascii() or not digits.isdecimal() or "0" in digits:
            raise UserError(f"schedules={text} is no schedule; write digits 1-9, one a chunk: 4322222 or 4322+clean")
        if plus and context not in CONTEXTS:
            raise UserError(f"schedules={text}: the context {context} is unknown; use one of {', '.join(CONTEXTS)}")
        steps = [int(digit) for digit in digits]
        steps += [steps[-1]] * (chunks - len(steps))
        return cls(tuple(steps[:chunks]), context or "last_step")

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
class Run:
    """Results of a schedule on all prompts."""

    candidate: Candidate
    nfe: int  # evaluations of the student for a clip
    quality: Interval
    measures: dict[str, float]
    timings: list[list[dict[str, float]]]  # a clip, a chunk: seconds by part

    @property
    def latency_ms(self) -> float:
        return float(np.median([1000 * sum(_work(chunk) for chunk in clip) for clip in self.timings]))

    @property
    def first_ms(self) -> float:
        """Milliseconds until the frames of the first chunk."""
        return float(np.median([1000 * _work(clip[0]) for clip in self.timings]))


def front(runs: Sequence[Run]) -> list[Run]:
    """The Pareto front, fastest first: each run is better than all faster ones."""
    best: list[Run] = []
    for run in sorted(runs, key=lambda r: (r.latency_ms, -r.quality.value)):
        if not best or run.quality.value > best[-1].quality.value:
            best.append(run)
    return best


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = exits.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/tiny.yaml")
    parser.add_argument("--schedules", nargs="+", default=list(GRID), metavar="STEPS[+CONTEXT]", help="to run")
    parser.add_argument("--num_prompts", type="positive", default=16)
    parser.add_argument("--rounds", type="positive", default=8, help="timed clips of each schedule")
    parser.add_argument("--data_path", help="prompts, one a line (default: of the tiny world, or the configured file)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--quality", choices=tuple(COLUMNS), help="(default: tiny for 64x96 clips, else reference)")
    parser.add_argument("--reference", default="8+clean", help="schedule for --quality reference")
    parser.add_argument("--out", default="videos/schedules", metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    args = parser.parse_intermixed_args(arguments)
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} is too little; give 0 or more")
    return args


def prompts_of(args: argparse.Namespace, config: Config, quality: str) -> list[str]:
    if args.data_path:
        return read_prompts(args.data_path, "data_path")[: args.num_prompts]
    if quality == "tiny":
        return TinyWorld(config.video.height, config.video.width).prompts(args.seed, args.num_prompts)
    return read_prompts(resolve_path(config.inference.prompts))[: args.num_prompts]


class Benchmark:
    """Networks, prompts and seeds on which schedules are run."""

    def __init__(self, config: Config, prompts: Sequence[str], seed: int, quality: str, reference: str):
        self.config, self.prompts, self.quality = config, prompts, quality
        self.seeds = [sample_seed(seed, i) for i in range(len(prompts))]
        self.pipe = DiagonalPipeline.from_config(config)
        self.chunks = Geometry.from_config(config).num_chunks(config.video.num_latent_frames)
        self.reference: list[np.ndarray] | None = None
        self._clips(Candidate((1,) * self.chunks), prompts[:1])  # warm-up: kernels, caches
        if quality == "reference":
            self.reference, _ = self._clips(Candidate.parse(reference, self.chunks), prompts)

    def run(self, candidate: Candidate) -> Run:
        clips, timings = self._clips(candidate, self.prompts)
        borders = chunk_borders(len(clips[0]), self.config.stream.chunk_frames)
        measures = [summary(series(as_clip(clip)), borders) for clip in clips]
        return Run(
            candidate,
            candidate.schedule(self.config).nfe(self.chunks),
            self._interval(clips),
            {name: float(np.mean([values[name] for values in measures])) for name in MEASURES},
            timings,
        )

    def in_turns(self, runs: Sequence[Run], rounds: int) -> list[Run]:
        """The runs with the times of `rounds` alternating clips each, after a warm-up clip each."""
        timings = [[] for _ in runs]
        with progress_bar("times, in turns", rounds * len(runs), "schedule") as bar:
            for i in range(rounds):
                prompt, seed = self.prompts[i % len(self.prompts)], self.seeds[i % len(self.prompts)]
                for run, times in zip(runs, timings, strict=True):
                    pipe = self._pipe(run.candidate)  # freed, with its cache, after each clip
                    pipe(prompt, seed=seed)
                    times.append(pipe(prompt, seed=seed).videos[0].timings)
                    bar.update()
        return [replace(run, timings=times) for run, times in zip(runs, timings, strict=True)]

    def _pipe(self, candidate: Candidate) -> DiagonalPipeline:
        networks = self.pipe.session
        return DiagonalPipeline(candidate.apply(self.config), networks.student, networks.codec, networks.text_encoder)

    def _clips(self, candidate: Candidate, prompts: Sequence[str]):
        """Frames and timings of one clip per prompt, generated one by one."""
        pipe = self._pipe(candidate)
        videos = [pipe(prompt, seed=seed).videos[0] for prompt, seed in zip(prompts, self.seeds, strict=False)]
        return [video.frames for video in videos], [video.timings for video in videos]

    def _interval(self, clips: list[np.ndarray]) -> Interval:
        interval = mean_interval(self._qualities(clips))
        if self.quality == "tiny" and interval.n > 1:  # a share: clip the normal interval
            interval = replace(interval, low=max(0.0, interval.low), high=min(1.0, interval.high))
        return interval

    def _qualities(self, clips: list[np.ndarray]) -> torch.Tensor:
        """[clips], higher is better."""
        if self.reference is not None:
            return torch.tensor([psnr(a, b) for a, b in zip(clips, self.reference, strict=True)])
        scores = score(self.prompts, torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3))
        return torch.stack([scores.correct[name] for name in ATTRIBUTES]).double().nanmean(0)


def _work(spans: dict[str, float]) -> float:
    """Seconds of one chunk's denoising, context pass and decoding."""
    return sum(value for name, value in spans.items() if name != "text")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB between uint8 frames, at most 100."""
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return min(100.0, 10 * float(np.log10(255**2 / max(error, 1e-9))))


def explore(bench: Benchmark, schedules: Sequence[str]) -> list[Run]:
    """Run the given schedules."""
    candidates = dict.fromkeys(Candidate.parse(text, bench.chunks) for text in schedules)
    for candidate in candidates:
        candidate.schedule(bench.config)  # raises UserError before anything runs
    runs = []
    for candidate in candidates:
        runs.append(bench.run(candidate))
        run = runs[-1]
        print(f"{candidate.name:<18} {run.nfe:>3} NFE {run.latency_ms:>8.0f} ms  {run.quality.value:.4g}", flush=True)
    return runs


def table(runs: Sequence[Run], best: Sequence[Run], quality: str) -> str:
    """All runs as Markdown, fastest first; those on the front are marked."""
    extra = ("seam", "flicker", "motion", "colour_drift", "sharpness")
    head = ["schedule", "front", "NFE", "clip ms", "first frames ms", COLUMNS[quality], "95% interval", *extra]
    rows = [head]
    for run in sorted(runs, key=lambda r: r.latency_ms):
        q = run.quality
        cells = [run.candidate.name, "*" if run in best else "", str(run.nfe)]
        cells += [f"{run.latency_ms:.0f}", f"{run.first_ms:.0f}", number(q.value, ".4g")]
        cells.append(f"{number(q.low, '.4g')} .. {number(q.high, '.4g')}")
        rows.append([*cells, *(number(run.measures[name], ".3g") for name in extra)])
    return markdown(rows)


def write(runs: Sequence[Run], bench: Benchmark, out: Path) -> None:
    best = front(runs)
    text = table(runs, best, bench.quality)
    for run in best:
        with atomic_path(out / "front" / f"{run.candidate.name}.yaml") as temporary:
            temporary.write_text(to_yaml(run.candidate.apply(bench.config)), encoding="utf-8")
    with atomic_path(out / "front.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    rows = [
        {"name": r.candidate.name, "nfe": r.nfe, "latency_ms": r.latency_ms, "first_ms": r.first_ms}
        | {"quality": r.quality.to_dict(), "on_front": r in best}
        | {"measures": {name: finite(value) for name, value in r.measures.items()}}
        for r in runs
    ]
    kept = {"quality": bench.quality, "prompts": list(bench.prompts), "seeds": bench.seeds}
    write_json_atomic(out / "points.json", {**kept, "device": str(bench.pipe.session.device), "runs": rows})
    print(f"\n{text}\n\nin {out}: front.md, points.json, front/*.yaml")


def main(arguments: list[str] | None = None) -> int:
    console()
    args = parse_arguments(arguments)
    config = load_config(args.config_path, args.overrides)
    tiny = (config.video.height, config.video.width) == (64, 96)
    quality = args.quality or ("tiny" if tiny else "reference")
    out = check_writable(Path(args.out), "out")
    prompts = prompts_of(args, config, quality)
    if quality == "tiny":
        check_world(config, "tiny")
        if not all(any(parse_caption(prompt).values()) for prompt in prompts):
            raise UserError("quality=tiny needs prompts of the tiny world; take --quality reference for others")
    set_threads(config.cpu_threads)
    bench = Benchmark(config, prompts, args.seed, quality, args.reference)
    write(bench.in_turns(explore(bench, args.schedules), args.rounds), bench, out)
    return 0


if __name__ == "__main__":
    exits.run(main)
