"""VBench: generates its videos, runs its scores, and prints them beside published results.

    python scripts/vbench.py generate --config_path configs/wan2.1_t2v_1.3b.yaml --prompts VBench_full_info.json
    torchrun --nproc_per_node=8 scripts/vbench.py generate ...                 # shared out over GPUs
    python scripts/vbench.py score --prompts VBench_full_info.json --python path/to/vbench_env/bin/python
    python scripts/vbench.py table

`generate` can be stopped and started again. The `vbench` package needs versions of numpy and transformers that do not
go with ours: install it into an environment of its own, as docs/evaluation.md says, and name its Python.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits

exits.guard(__name__)

from configs.errors import UserError
from configs.load import load_config, to_dict
from model.weights.load import check_weights
from pipeline.provenance import fingerprint
from scripts.quality.vbench import DIMENSIONS, SAMPLES, VBenchPrompt, read_result, read_results, read_suite, totals
from utils.distributed import Ranks
from utils.files import check_writable, short_hash, write_json_atomic
from utils.logs import console
from utils.progress import progress_bar
from utils.seeds import stable_hash
from utils.video import VideoWriter

# Total, Quality, Semantic in percent, as their authors published them.
PUBLISHED = (("Self-Forcing, chunk-wise (arXiv 2506.08009)", 84.31, 85.07, 81.28),)
NOTES = """\
Not alike in every respect: published rows use prompts rewritten by a language model (give yours with --extended), their
authors' samples and seeds, and the vbench release of their day. Only rows of equal prompts and release compare; to be
sure, score the other model's weights here too. The row of Diagonal Distillation's own paper is not stated here."""
RUNNER = """
import sys
sys.path = [path for path in sys.path if path]  # not the working folder: it may hold a vbench or a utils of its own
import torch
from vbench import VBench
info, videos, out, name, *dimensions = sys.argv[1:]
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VBench(device, info, out).evaluate(videos_path=videos, name=name, dimension_list=dimensions)
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = exits.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    generate, score, table = (commands.add_parser(name) for name in ("generate", "score", "table"))
    for command in (generate, score, table):
        command.add_argument("--out", default="videos/vbench", metavar="DIR", help="(default: %(default)s)")
    for command in (generate, score):
        command.add_argument("--prompts", required=True, metavar="FILE", help="VBench_full_info.json")
        command.add_argument("--dimensions", nargs="+", choices=tuple(DIMENSIONS), metavar="NAME", help="only these")
    generate.add_argument("--config_path", default="configs/wan2.1_t2v_1.3b.yaml")
    generate.add_argument("--extended", metavar="FILE", help="rewritten prompts, one a line, that the model is given")
    generate.add_argument("--num_samples", type="positive", default=SAMPLES, help="videos a prompt (%(default)s)")
    generate.add_argument("--flicker_samples", type="positive", help="videos of temporal_flickering, which filters")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("overrides", nargs="*", metavar="key.sub=value")
    score.add_argument("--python", default=sys.executable, help="of the environment that has vbench")
    return parser.parse_args(arguments)


def jobs_of(suite: list[VBenchPrompt], args: argparse.Namespace) -> list[tuple[VBenchPrompt, int]]:
    """(prompt, sample) of all videos, those of the wanted dimensions only."""
    jobs = []
    for prompt in suite:
        if args.dimensions and not set(args.dimensions) & set(prompt.dimensions):
            continue
        flicker = args.flicker_samples if "temporal_flickering" in prompt.dimensions else None
        jobs += [(prompt, sample) for sample in range(flicker or args.num_samples)]
    if not jobs:
        raise UserError(f"dimensions={' '.join(args.dimensions)} has no prompt in {args.prompts}; give the JSON file")
    return jobs


def generate(args: argparse.Namespace) -> None:
    config, ranks = load_config(args.config_path, args.overrides), Ranks.from_env()
    suite = read_suite(Path(args.prompts), Path(args.extended) if args.extended else None)
    out = check_writable(Path(args.out), "out")
    settings = fingerprint(config, tuple(check_weights(config.model)))
    todo = []
    for prompt, sample in ranks.share(jobs_of(suite, args)):
        seed = stable_hash(args.seed, "vbench", prompt.text, sample) % 2**31  # whatever the order or number of GPUs
        digest = short_hash(prompt.extended, seed, settings)
        # vbench takes everything in its folder for a video, so records have one of their own
        record = out / "records" / f"{short_hash(prompt.text, sample)}.json"
        video = out / "videos" / prompt.file_name(sample)
        if not (video.exists() and record.exists() and digest in record.read_text(encoding="utf-8")):
            todo.append((prompt, sample, seed, digest, video, record))
    print(f"{len(todo)} videos to make in {out / 'videos'} by process {ranks.rank} of {ranks.world}", flush=True)
    if not todo:
        return
    from pipeline.diagonal import DiagonalPipeline

    pipe = DiagonalPipeline.from_config(config, local_rank=ranks.local_rank)
    with progress_bar("vbench", len(todo), "video", ranks.local_rank) as bar:
        for prompt, sample, seed, digest, video, record in todo:
            with VideoWriter(video, config.video.fps, (config.video.height, config.video.width)) as file:
                for frames in pipe.stream(prompt.extended, seed=seed):
                    file.write(frames)
            facts = {"prompt": prompt.text, "given": prompt.extended, "sample": sample, "seed": seed, "digest": digest}
            write_json_atomic(record, facts | {"video": video.name, "config": to_dict(config)})
            bar.update(1)


def score(args: argparse.Namespace) -> int:
    """Score each dimension in a process of its own; one that fails is named, and the others are scored."""
    out, info, faults = Path(args.out), Path(args.prompts), exits.Faults()
    if info.suffix != ".json":
        raise UserError(f"prompts={info} says nothing of dimensions; give VBench_full_info.json to score")
    suite = read_suite(info)
    wanted = args.dimensions or [name for name in DIMENSIONS if any(name in p.dimensions for p in suite)]
    by_dimension = {name: videos_of(name, [p for p in suite if name in p.dimensions], out) for name in wanted}
    if shutil.which(args.python) is None:
        raise UserError(f"python={args.python} cannot be started (no such program); give its path")
    for name, videos in by_dimension.items():
        with faults.noted():
            score_dimension(args.python, info, name, videos, out / "results" / f"{name}_eval_results.json")
    return faults.code


def score_dimension(python: str, info: Path, name: str, videos: list[Path], result: Path) -> None:
    """Write `result`, unless it is of these videos already. UserError where the package fails."""
    if is_scored(result, videos):
        print(f"{name}: already scored")
        return
    result.parent.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    log = result.with_name(f"{name}.log")  # the package's progress too, which takes hours
    paths = [str(path.resolve()) for path in (info, videos[0].parent, result.parent)]
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run([python, "-c", RUNNER, *paths, name, name], stderr=file)
    if done.returncode:
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"python={python} could not score {name} ({last}); see {log}: vbench and what {name} imports must "
            "be installed there, and its weights in VBENCH_CACHE_DIR, or a network to fetch them"
        )
    print(f"{name}: {read_result(result)[name]:.4f}", flush=True)


def videos_of(name: str, prompts: list[VBenchPrompt], out: Path) -> list[Path]:
    """Videos to score, in one folder; for temporal_flickering those that `vbench static_filter` kept, if it was run."""
    videos, kept = (out / "videos").resolve(), (out / "filtered_videos").resolve()
    lacking, files = 0, []
    for prompt in prompts:
        own = [videos / prompt.file_name(sample) for sample in range(SAMPLES)]  # the package reads no others
        lacking += not all(file.exists() for file in own)
        files += own
    if lacking or not files:
        raise UserError(
            f"dimensions={name} lacks videos of {lacking or 'all'} prompts in {videos}; run generate with this --out"
        )
    if name != "temporal_flickering" or not kept.is_dir():
        return files
    static = [kept / file.name for file in files if (kept / file.name).exists()]
    if not static or _newest(static) < _newest(files):
        raise UserError(f"{kept} holds no static video, or older ones than {videos}; remove it, or filter again")
    print(f"{name}: {len(static)} static videos of {kept}, of {len(files)} at most")
    return static


def is_scored(result: Path, videos: list[Path]) -> bool:
    """Whether `result` is of these videos as they are; the package writes beside it which ones it read."""
    read = result.with_name(result.name.replace("_eval_results", "_full_info"))
    if not (result.exists() and read.exists()) or result.stat().st_mtime < _newest(videos):
        return False
    try:
        read_result(result)
        entries = json.loads(read.read_text(encoding="utf-8"))
        return {file for entry in entries for file in entry["video_list"]} == {str(file) for file in videos}
    except (ValueError, KeyError, TypeError):  # left half-written by a process that was killed
        return False


def _newest(files: list[Path]) -> float:
    return max(file.stat().st_mtime for file in files)


def table(args: argparse.Namespace, faults: exits.Faults) -> str:
    """Markdown: our dimensions, then totals beside published ones. Files that cannot be read go to `faults`."""
    scores = read_results(Path(args.out) / "results", faults)
    scores_of_totals = totals(scores)
    lines = ["| dimension | score | |", "| --- | --- | --- |"]
    for name in DIMENSIONS:
        value = f"{100 * scores[name]:.2f}" if name in scores else "-"
        lines.append(f"| {name} | {value} | {'' if name in scores else 'not scored'} |")
    lines += ["", "| | Total | Quality | Semantic |", "| --- | --- | --- | --- |"]
    ours = (f"{100 * value:.2f}" if value is not None else "-" for value in scores_of_totals.values())
    lines.append(f"| this run, {args.out} | {' | '.join(ours)} |")
    lines += [f"| {name} | {' | '.join(f'{v:.2f}' for v in values)} |" for name, *values in PUBLISHED]
    if None in scores_of_totals.values():
        lines += ["", "- : a dimension is missing, and a total without it would be another figure."]
    return "\n".join([*lines, "", NOTES])


def main(arguments: list[str] | None = None) -> int:
    console()
    args = parse_arguments(arguments)
    if args.command == "table":
        faults = exits.Faults()
        print(table(args, faults))
        return faults.code
    if args.command == "score":
        return score(args)
    generate(args)
    return 0


if __name__ == "__main__":
    exits.run(main)
