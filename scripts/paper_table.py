"""The paper's settings, the keys that hold them, what the presets use, and where ours departs and why.

    python scripts/paper_table.py            # print the table
    python scripts/paper_table.py --write    # put it into docs/paper-settings.md, between its two marks

Values come from the YAML files, so that the table cannot say one thing and the presets do another.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits  # noqa: E402

exits.guard(__name__)

from configs.errors import UserError  # noqa: E402
from configs.load import CHECKOUT, load_config, to_dict  # noqa: E402
from utils.files import atomic_path  # noqa: E402

PRESET = "configs/train_wan2.1_t2v_1.3b.yaml"  # starts from configs/wan2.1_t2v_1.3b.yaml, so it has both
BEGIN, END = "<!-- paper table: scripts/paper_table.py --write -->", "<!-- end of paper table -->"


@dataclass(frozen=True)
class Setting:
    """One row. paper: as the paper has it, or as its release does where the paper is silent (`source`)."""

    what: str
    paper: Any
    key: str
    code: str  # the file that acts on it
    source: str = "paper"
    why: str = ""  # where ours differs, and where something has to be said


SETTINGS = (
    Setting("resolution, height", 480, "video.height", "configs/geometry.py"),
    Setting("resolution, width", 832, "video.width", "configs/geometry.py"),
    Setting("latent frames of a clip", 21, "video.num_latent_frames", "pipeline/diagonal.py"),
    Setting("latent frames of a chunk", 3, "stream.chunk_frames", "configs/geometry.py"),
    Setting("steps of chunk 0, 1, ...", "4322222", "schedule.steps", "model/schedule.py"),
    Setting("first timestep, un-warped", 1000.0, "schedule.first", "model/schedule.py"),
    Setting("last timestep, un-warped", 100.0, "schedule.last", "model/schedule.py", "release"),
    Setting("shift of the timesteps", 5.0, "schedule.shift", "model/timesteps.py", "release"),
    Setting("keys left for later chunks", "last_step", "stream.context", "pipeline/chunk.py"),
    Setting("attention window, latent frames", 12, "stream.window_frames", "configs/geometry.py", "release"),
    Setting("sink, latent frames", 3, "stream.sink_frames", "configs/geometry.py", "release"),
    Setting("clips a step, all GPUs", 64, "training.global_batch", "trainer/stage.py"),
    Setting("training steps", 600, "training.steps", "trainer/loop.py", why="critic updates; 120 of the generator"),
    Setting("critic updates a generator update", 5, "training.distill.dfake_gen_update_ratio",
            "trainer/distill/stage.py", "release"),
    Setting("learning rate, generator", 2e-6, "training.optimizer.lr", "trainer/optim/train_state.py"),
    Setting("learning rate, critic", 4e-7, "training.distill.critic_optimizer.lr", "trainer/distill/networks.py"),
    Setting("Adam betas", [0.0, 0.999], "training.optimizer.betas", "trainer/optim/train_state.py", "release"),
    Setting("gradient norm, at most", 10.0, "training.optimizer.max_grad_norm", "trainer/optim/train_state.py",
            "release"),
    Setting("decay of the averaged weights", 0.99, "training.ema_decay", "trainer/optim/train_state.py", "release"),
    Setting("average from step", 200, "training.ema_start_step", "trainer/optim/train_state.py", "release",
            "ours counts generator updates, the release critic updates too: 200 / 5"),
    Setting("weight of the spatial loss", 4.0, "training.distill.spatial_weight", "trainer/distill/stage.py"),
    Setting("weight of the flow loss", 4.0, "training.distill.flow.weight", "trainer/distill/stage.py"),
    Setting("weight of motion against space, gamma", 1.0, "training.distill.gamma", "trainer/distill/stage.py"),
    Setting("flow loss without a gradient", True, "training.distill.flow.gradient_cut", "trainer/distill/losses.py",
            "release", "the releases compute it without a graph, so that it moves nothing; ours moves the student"),
    Setting("guidance of the teacher", 3.0, "training.distill.guidance", "model/denoiser.py", "release",
            "s of cond + s (cond - uncond)"),
    Setting("guidance of the critic", 0.0, "training.distill.fake_guidance", "trainer/distill/stage.py", "release"),
    Setting("shift of the timesteps of teacher and critic", 5.0, "training.distill.shift", "trainer/distill/stage.py",
            "release", "drawn alike (mean 746); the releases' x0 of teacher and critic then takes sigma from a grid of "
            "shift 8 at the same t, more than 1% off for 3.4% of draws; ours is t / 1000"),
    Setting("context in training", "release", "training.distill.rollout_context", "trainer/distill/stage.py", "release",
            "theirs re-noises the exit's result; ours leaves what inference leaves"),
    Setting("step with the gradient", "random", "training.distill.exit", "pipeline/rollout.py", "release"),
    Setting("loss reaches earlier chunks", True, "training.distill.context_grad", "pipeline/rollout.py", "release"),
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
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def table() -> str:
    """The table as Markdown."""
    values = to_dict(load_config(PRESET))
    lines = ["| setting | paper | key | preset | code | departs, and why |", "| --- | --- | --- | --- | --- | --- |"]
    for row in SETTINGS:
        ours = value_of(values, row.key)
        theirs = shown(row.paper) + (" (release)" if row.source == "release" else "")
        note = row.why if same(row.paper, ours) else f"**departs**: {row.why}"
        lines.append(f"| {row.what} | {theirs} | `{row.key}` | {shown(ours)} | `{row.code}` | {note} |")
    return "\n".join(lines)


def inserted(text: str) -> str:
    """`text` with the table between the two marks. UserError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        missing = BEGIN if not begin else END
        raise UserError(f"docs/paper-settings.md lacks the line {missing}; put it back where the table belongs")
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
