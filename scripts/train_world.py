"""Make the model of the moving world from nothing: its stages one after the other, in one process.

    python scripts/train_world.py [--stages text vae ...] [--minutes 22] [key=value ...]
    python scripts/train_world.py --stages vae --warm --logdir logs/more seed=1 training.steps=6000    # trains it on
    torchrun --standalone --nproc_per_node=2 scripts/train_world.py [...]      # on two GPUs, with the same batches

Each stage is `train.py --config_path configs/world/<file>.yaml` and starts from what the ones before it wrote. The same
command continues where a stopped run was; with --minutes it stops by itself, after a checkpoint. Settings go to every
stage, or to one: `long:training.steps=1200`. With --warm a stage starts from the weights that it exported, with a fresh
optimizer, where checkpoints are gone or its settings change. Give it another seed too, and so other clips.
"""

import math
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import exits  # noqa: E402

exits.guard(__name__)

from configs.errors import UserError  # noqa: E402
from configs.load import load_config  # noqa: E402
from configs.schema import Config  # noqa: E402
from model.weights.files import resolve_path  # noqa: E402
from model.weights.inspection import required_weights  # noqa: E402
from trainer.cli import parse  # noqa: E402
from trainer.command import train  # noqa: E402
from trainer.parallel.control_group import ControlGroup  # noqa: E402
from trainer.world.scene import World, training_caption  # noqa: E402
from utils.device import pick_device  # noqa: E402
from utils.distributed import Ranks, process_group  # noqa: E402
from utils.files import atomic_path, check_writable  # noqa: E402
from utils.seeds import stable_hash  # noqa: E402

STAGES = ("text", "vae", "teacher", "causal", "four", "diagonal", "long")
FILES = {"four": "distill", "diagonal": "distill"}  # in configs/world/, where it is not the stage's name
TRAINED = {"vae": "vae", "teacher": "transformer"}  # in training.init, where it is not the student
PROMPTS = 16384
LEAST_S = 60.0  # of the time left with which a further stage is begun: networks are loaded and compiled first


def written(output: str, logdir: str) -> dict[str, str]:
    """The folder that each stage writes its network to."""
    to = {"text": f"{output}/text_encoder", "vae": f"{output}/vae", "teacher": f"{output}/teacher"}
    to |= {"causal": f"{logdir}/causal_start", "four": f"{logdir}/four/export", "diagonal": f"{logdir}/diagonal/export"}
    return to | {"long": f"{output}/student"}


def settings_of(stage: str, output: str, logdir: str, warm: bool = False) -> list[str]:
    """Where a stage's networks come from and go to, and what the run of it changes in its file.

    warm: what it trains comes from where an earlier run of it has put that.
    """
    to = written(output, logdir)
    start = {"causal": to["teacher"], "four": to["causal"], "diagonal": to["four"], "long": to["diagonal"]}
    settings = [f"model.{name}={output}/{name}" for name in ("student", "vae", "text_encoder")]
    settings.append(f"model.tokenizer={output}/text_encoder")
    if stage not in ("four", "diagonal"):  # whose own folder has their export
        settings.append(f"training.export={to[stage]}")
    if warm or stage in start:
        settings.append(f"training.init.{TRAINED.get(stage, 'student')}={to[stage] if warm else start[stage]}")
    if stage in ("four", "diagonal", "long"):
        settings += [f"training.init.teacher={to['teacher']}", f"training.distill.prompts={logdir}/prompts.txt"]
    return settings + ["schedule.steps=4"] * (stage == "four")


def given_to(stage: str, settings: Sequence[str]) -> list[str]:
    """Of the command's settings those of a stage: what names no stage, and `<stage>:key=value`, the more particular."""
    named = [s.partition(":")[::2] for s in settings if s.partition(":")[0] in STAGES]
    return [s for s in settings if s.partition(":")[0] not in STAGES] + [own for name, own in named if name == stage]


def shared_out(file: str, settings: Sequence[str], world: int) -> list[str]:
    """Settings that share a stage's batches out over `world` ranks, so that a step sees as much as on one."""
    t = load_config(file, settings).training
    micro = min(t.micro_batch, max(1, t.global_batch // world))
    first = max(1, t.flow.first_chunk_batch * micro // t.micro_batch)
    return [f"training.micro_batch={micro}", f"training.flow.first_chunk_batch={first}"]


def check_starts(stage: str, config: Config, to: Mapping[str, str], before: Collection[str], warm: bool) -> None:
    """UserError where a network that `stage` reads is missing, and no stage `before` it makes it. to: see `written`."""
    reads = {path: field for _, path, field in required_weights(config, training=True)}
    reads |= {path: f"training.init.{network}" for network, path in config.training.init.items()}
    for maker, path in to.items():
        if path in reads and maker not in before and not resolve_path(path).exists():
            fix = f"name that one, too: --stages {maker} {stage}"
            if warm:  # which starts no stage from nothing
                fix = "leave --warm out" if maker == stage else f"make it first, without --warm: --stages {maker}"
            raise UserError(f"{reads[path]}={path} does not exist, and stage {maker} makes it; {fix}")


@contextmanager
def named(stage: str) -> Iterator[None]:
    """UserErrors inside the block begin with the stage."""
    try:
        yield
    except UserError as error:
        raise UserError(f"stage {stage}: {error}") from error


def write_prompts(file: Path, count: int) -> None:
    """Captions for distillation, which needs no clips: as people type them, one a line."""
    scenes = World().trained_scenes(stable_hash(0, "prompts"), count)
    text = "".join(training_caption(scene) + "\n" for scene in scenes)
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as aside:
            aside.write_text(text, encoding="utf-8")


def main() -> int:
    parser = exits.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--logdir", default="logs/world", help="folder of the runs, one folder a stage (%(default)s)")
    parser.add_argument("--output", default="assets/world", help="folder of the networks (%(default)s)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help="some of them")
    parser.add_argument("--warm", action="store_true", help="start these stages from what they exported before")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="captions that distillation sees (%(default)s)")
    parser.add_argument("--minutes", type=float, metavar="N", help="stop after so long, as Ctrl-C does")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. training.validation_clips=256")
    args = parser.parse_intermixed_args()
    if args.minutes is not None and args.minutes <= 0:
        raise UserError(f"--minutes {args.minutes} is no time; give more than 0")
    if args.prompts < 1:
        raise UserError(f"--prompts {args.prompts} is too little; give at least 1")
    if args.warm and "text" in args.stages:
        raise UserError("--warm: stage text always starts from nothing; name the others, e.g. --stages vae")
    for text in args.settings:
        if (name := text.partition(":")[0]) in STAGES and name not in args.stages:
            raise UserError(f"{text} is for stage {name}, which --stages does not name; name it there")
    logdir, output = (check_writable(v, flag) for v, flag in ((args.logdir, "--logdir"), (args.output, "--output")))
    until = math.inf if args.minutes is None else time.monotonic() + 60 * args.minutes
    ranks, rows = Ranks.from_env(), [f"{'stage':<10} {'seconds':>8}"]
    device = pick_device(load_config("configs/world/world.yaml", given_to("", args.settings)).device, ranks.local_rank)
    runs = {}  # what is wrong with a later stage's settings is said before the first one is trained
    for stage in args.stages:
        file = f"configs/world/{FILES.get(stage, stage)}.yaml"
        settings = [*settings_of(stage, str(output), str(logdir), args.warm), *given_to(stage, args.settings)]
        with named(stage):
            check_starts(stage, load_config(file, settings), written(str(output), str(logdir)), runs, args.warm)
            runs[stage] = ["--config_path", file, *settings, *shared_out(file, settings, ranks.world)]
    with process_group(ranks, device):  # one for all stages
        if ranks.first:
            write_prompts(logdir / "prompts.txt", args.prompts)
        control = ControlGroup()
        control.wait()
        for stage, run in runs.items():
            if control.any(len(rows) > 1 and time.monotonic() > until - LEAST_S):
                break
            start = time.monotonic()
            if ranks.first:
                print(f"stage {stage}: {logdir}/{stage}", flush=True)
            with named(stage):
                ended = train(parse([*run, "--logdir", f"{logdir}/{stage}"]), until)
            rows.append(f"{stage:<10} {time.monotonic() - start:>8.1f}{'' if ended else '  stopped'}")
            if control.any(not ended):
                break
    if ranks.first:
        print("\n".join(rows))
    return 0


if __name__ == "__main__":
    exits.run(main)
