"""A table of settings: the paper, diagdistill (commit 24ef1c9) and this repository, with keys and reasons to differ.

    python scripts/paper_table.py            # print the table
    python scripts/paper_table.py --write    # insert it into docs/paper-settings.md, between two marks

Our values are read from the YAML files.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits

exits.guard(__name__)

from configs.errors import UserError
from configs.load import CHECKOUT, load_config, to_dict
from utils.files import atomic_path
from utils.tables import markdown

PRESET = "configs/train_wan2.1_t2v_1.3b.yaml"  # starts from configs/wan2.1_t2v_1.3b.yaml, so it has both
STAGES = tuple(f"configs/train_wan2.1_t2v_1.3b_stage{n}.yaml" for n in (1, 2))
BEGIN, END = "<!-- paper table: scripts/paper_table.py --write -->", "<!-- end of paper table -->"


@dataclass(frozen=True)
class Setting:
    """One row. Tuples are the values of stage 1 and stage 2."""

    what: str
    paper: Any  # None = not stated
    release: Any  # diagdistill's, commit 24ef1c9
    key: str
    code: str  # the file that uses it
    why: str = ""  # reason if ours differs, or a note


LONG = "the value is Self-Forcing's, for rollouts longer than a clip, which no stage here or in 24ef1c9 makes. Ours: "
SETTINGS = (
    Setting("resolution, height", 480, 480, "video.height", "configs/geometry.py"),
    Setting("resolution, width", 832, 832, "video.width", "configs/geometry.py"),
    Setting("latent frames of a clip", 21, 21, "video.num_latent_frames", "pipeline/diagonal.py"),
    Setting("latent frames of a chunk", 3, 3, "stream.chunk_frames", "configs/geometry.py"),
    Setting("steps of chunk 0, 1, ...; else a preset or timesteps", "4322222", "4322222", "schedule.steps",
            "model/schedule.py"),
    Setting("the same as a preset, instead", None, (None, "release_2026_11"), "schedule.preset", "model/schedule.py"),
    Setting("the same written out, instead", None, ([[1000.0, 937.5, 833.333333, 357.142857]], None),
            "schedule.timesteps", "model/schedule.py", "stage 1: four steps a chunk, 1000 750 500 100 un-warped"),
    Setting("first timestep, un-warped", 1000.0, 1000.0, "schedule.first", "model/schedule.py"),
    Setting("last timestep, un-warped", None, 100.0, "schedule.last", "model/schedule.py"),
    Setting("shift of the timesteps", None, 5.0, "schedule.shift", "model/timesteps.py"),
    Setting("context mode: keys for later chunks", "last_step", "last_step", "stream.context", "pipeline/chunk.py"),
    Setting("attention window, latent frames", None, 12, "stream.window_frames", "configs/geometry.py"),
    Setting("sink, latent frames", None, 3, "stream.sink_frames", "configs/geometry.py"),
    Setting("training starts from", None, ("checkpoints/ode_init.pt", f"logs/{Path(STAGES[0]).stem}"),
            "training.init.student",
            "trainer/build.py", "or Causal-Forcing's chunk-wise file; stage 2 reads the export in stage 1's folder"),
    Setting("teacher", "wan_models/Wan2.1-T2V-14B", "wan_models/Wan2.1-T2V-14B", "training.init.teacher",
            "trainer/build.py"),
    Setting("critic starts from", None, "wan_models/Wan2.1-T2V-1.3B", "training.init.critic",
            "trainer/distill/networks.py"),
    Setting("clips a step, all GPUs", 64, 64, "training.global_batch", "trainer/stage.py"),
    Setting("training steps", 600, (1000, 2000), "training.steps", "trainer/loop.py",
            "critic updates, a fifth as many of the generator; the README of 24ef1c9 still says 600"),
    Setting("steps between checkpoints", None, 500, "training.checkpoint_every", "trainer/loop.py",
            "the single run is 600 steps long"),
    Setting("steps between lines of the log", None, 500, "training.log_every", "trainer/loop.py",
            "warnings about a run that goes wrong use these lines"),
    Setting("critic updates a generator update", None, 5, "training.distill.dfake_gen_update_ratio",
            "trainer/distill/stage.py"),
    Setting("learning rate, generator", 2e-6, 2e-6, "training.optimizer.lr", "trainer/optim/train_state.py"),
    Setting("learning rate, critic", 4e-7, 4e-7, "training.distill.critic_optimizer.lr", "trainer/distill/networks.py"),
    Setting("Adam betas", None, [0.0, 0.999], "training.optimizer.betas", "trainer/optim/train_state.py"),
    Setting("gradient norm, at most", None, 10.0, "training.optimizer.max_grad_norm", "trainer/optim/train_state.py"),
    Setting("decay of the EMA", None, 0.99, "training.ema_decay", "trainer/optim/train_state.py"),
    Setting("EMA from step", None, 200, "training.ema_start_step", "trainer/optim/train_state.py",
            "ours counts generator updates, 24ef1c9 critic updates too: 200 / 5"),
    Setting("weight of the spatial loss", 4.0, 4.0, "training.distill.spatial_weight", "trainer/distill/losses.py"),
    Setting("weight of the flow loss", 4.0, 4.0, "training.distill.flow.weight", "trainer/distill/losses.py"),
    Setting("its factor 1/2", None, False, "training.distill.flow.half", "trainer/distill/losses.py",
            "without it the motion loss counts twice as much, which the stages keep; the single run has the paper's "
            "equal weights"),
    Setting("its frame weights go by", None, "release", "training.distill.flow.frame_error",
            "trainer/distill/losses.py", "theirs is the loss's gradient minus a latent, in which we find no meaning; "
            "ours is the error of the critic's motion"),
    Setting("flow loss without a gradient", None, False, "training.distill.flow.gradient_cut",
            "trainer/distill/losses.py", "it was until commit 4ea418d, and had no effect"),
    Setting("weight of motion against space, gamma", 1.0, 1.0, "training.distill.gamma", "trainer/distill/losses.py"),
    Setting("weight of the regression of motion on the frozen start", None, 1.0,
            "training.distill.motion_regression.weight", "trainer/distill/losses.py",
            "the paper's regression is on teacher's pairs (training.distill.pairs)"),
    Setting("steps of the frozen start, un-warped", None, [1000.0, 750.0, 500.0, 250.0],
            "training.distill.motion_regression.timesteps", "trainer/distill/stage.py"),
    Setting("layers of its head", None, 2, "training.distill.motion_regression.layers",
            "trainer/distill/motion_head.py"),
    Setting("hidden channels of its head", None, 64, "training.distill.motion_regression.hidden",
            "trainer/distill/motion_head.py"),
    Setting("kernel of its head", None, 1, "training.distill.motion_regression.kernel",
            "trainer/distill/motion_head.py"),
    Setting("decay of the head's EMA", None, 0.95, "training.distill.motion_regression.decay",
            "trainer/distill/networks.py", "ours has an optimizer; whether that of 24ef1c9 has one we could not see"),
    Setting("guidance of the teacher", None, 3.0, "training.distill.guidance", "model/denoiser.py",
            "s of cond + s (cond - uncond)"),
    Setting("guidance of the critic", None, 0.0, "training.distill.fake_guidance", "trainer/distill/stage.py"),
    Setting("shift of the timesteps of teacher and critic", None, 5.0, "training.distill.shift",
            "trainer/distill/stage.py", "drawn alike (mean 746); in 24ef1c9 the x0 of teacher and critic then takes "
            "sigma from a grid of shift 8 at the same t, more than 1% off for 3.4% of draws; ours is t / 1000"),
    Setting("context in training", None, "release", "training.distill.rollout_context", "trainer/distill/stage.py",
            "theirs stops at the drawn step and re-noises its result; ours leaves what inference leaves"),
    Setting("timestep of that noise, not warped", None, 100.0, "training.distill.context_noise",
            "trainer/distill/stage.py", "of rollout_context=release alone"),
    Setting("step with the gradient", None, "release", "training.distill.exit", "trainer/distill/long_tuning.py",
            "theirs is one of the last row's steps, so that the last two of chunk 0 and the last of chunk 1 are never "
            "trained in stage 2; ours is one share of every row"),
    Setting("loss reaches earlier chunks", None, True, "training.distill.context_grad", "pipeline/rollout.py"),
    Setting("long rollouts: chunks before the window stop at their drawn step", None, "release",
            "training.distill.long.rollout", "trainer/distill/long_tuning.py", LONG + "they run to their last, as a "
            "stream's do"),
    Setting("long rollouts: the window's first chunk has a graph", None, "release", "training.distill.long.rollout",
            "trainer/distill/long_tuning.py", LONG + "none, for the loss leaves it out"),
    Setting("long rollouts: the critic learns from all of the window", None, "release",
            "training.distill.long.rollout", "trainer/distill/long_tuning.py", LONG + "it leaves out what the "
            "generator's loss does, as the streaming trainer of 4ea418d"),
    Setting("long rollouts: latent frames decoded for the window's first image, 0 = all", None, 0,
            "training.distill.long.decode_frames", "trainer/distill/long_tuning.py", LONG + "the last six, so that the "
            "cost does not grow with the rollout"),
)


def value_of(values: dict[str, Any], key: str) -> Any:
    """`a.b.c` of a nested dict."""
    for part in key.split("."):
        values = values[part]
    return values


def same(paper: Any, ours: Any) -> bool:
    """Equal as settings are: 4322222 the text is 4322222 the number, and 3 is 3.0."""
    return str(paper) == str(ours) or (not isinstance(paper, str) and paper == ours)


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " / ".join(shown(part) or "none" for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def departures(row: Setting, single: Any, stages: tuple[Any, ...]) -> list[str]:
    """Of what ours are not: "the paper", "the release"."""
    theirs = row.release if isinstance(row.release, tuple) else (row.release,) * len(stages)
    sources = [] if row.paper is None or same(row.paper, single) else ["the paper"]
    if row.paper is None and not isinstance(row.release, tuple) and not same(row.release, single):
        sources = ["the release"]
    if not all(same(a, b) for a, b in zip(theirs, stages, strict=True)):
        sources = sorted({*sources, "the release"})
    return sources


def table() -> str:
    """The table as Markdown."""
    values, *staged = (to_dict(load_config(path)) for path in (PRESET, *STAGES))
    rows = [["setting", "paper", "release (24ef1c9)", "ours", "key", "code", "departs, and why"]]
    for row in SETTINGS:
        single, stages = value_of(values, row.key), tuple(value_of(stage, row.key) for stage in staged)
        ours = shown(single if all(same(single, stage) for stage in stages) else (single, *stages))
        departs = departures(row, single, stages)
        note = f"**departs** from {' and '.join(departs)}: {row.why}" if departs else row.why
        rows.append([row.what, shown(row.paper), shown(row.release), ours, f"`{row.key}`", f"`{row.code}`", note])
    return markdown(rows)


def inserted(text: str) -> str:
    """`text` with the table between the two marks. Raises UserError if they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        missing = BEGIN if not begin else END
        raise UserError(f"docs/paper-settings.md lacks the line {missing}; add it where the table belongs")
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = exits.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/paper-settings.md")
    args = parser.parse_args(arguments)
    if not args.write:
        print(table())
        return 0
    page = CHECKOUT / "docs" / "paper-settings.md"
    text = inserted(page.read_text(encoding="utf-8"))
    with atomic_path(page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    exits.run(main)
