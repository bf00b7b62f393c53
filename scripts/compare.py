"""Compare this repository with another program on the same prompts and seeds: speed ratio and clip measures.

    python scripts/compare.py --ours configs/tiny.yaml --data_path prompts.txt \\
        --theirs 'python other.py --text {prompt} --seed {seed} --save {out}'

`{prompt}`, `{seed}` and `{out}` (the .mp4 to write) are replaced and need no quotes; no shell is involved. Times are
those of whole processes, loading included. The two programs alternate, and so does the one that runs first. Writes
report.html and report.json (first theirs, then ours) and compare.json.
"""

import argparse
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits

exits.guard(__name__)

import torch

from configs.errors import UserError
from configs.load import CHECKOUT, load_config
from scripts.quality.clip_folder import measure_video, read_record
from scripts.quality.report_page import report_data, report_page
from utils.clip_measures import MEASURES
from utils.files import atomic_path, check_writable, write_json_atomic
from utils.intervals import Interval, paired_interval
from utils.prompts import check_prompt, read_prompts

SIDES = ("theirs", "ours")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = exits.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", required=True, metavar="CONFIG", help="YAML file of inference.py")
    parser.add_argument("--theirs", required=True, metavar="COMMAND", help="with {prompt}, {seed} and {out}")
    parser.add_argument("--prompt", action="append", help="may be repeated")
    parser.add_argument("--data_path", help="prompts, one a line")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--timeout", type=float, default=3600, metavar="S", help="seconds that one clip may take")
    parser.add_argument("--out", default="videos/compare", metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of ours")
    args = parser.parse_intermixed_args(arguments)
    if bool(args.prompt) == bool(args.data_path):
        raise UserError("prompts are missing or doubled; give either --prompt or --data_path")
    given = args.prompt or []
    args.prompts = read_prompts(args.data_path) if args.data_path else [check_prompt(p, "--prompt") for p in given]
    for name in ("{prompt}", "{out}"):
        if name not in args.theirs:
            raise UserError(f"theirs={args.theirs} lacks {name}; add it where the value belongs")
    return args


def their_command(template: str, prompt: str, seed: int, out: Path) -> list[str]:
    """The arguments of the command. Values are filled in after splitting, so a prompt stays one argument."""
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise UserError(f"theirs={template} cannot be read ({error}); close its quotes") from error
    values = {"{prompt}": prompt, "{seed}": str(seed), "{out}": str(out)}
    return [_filled(word, values) for word in words]


def _filled(word: str, values: dict[str, str]) -> str:
    """`word` with each placeholder replaced once, from left to right; a prompt that contains {seed} keeps it."""
    placeholders = [(word.find(name), name) for name in values if name in word]
    if not placeholders:
        return word
    at, name = min(placeholders)
    return word[:at] + values[name] + _filled(word[at + len(name) :], values)


def our_command(config: str, overrides: Sequence[str], prompt: str, seed: int, folder: Path) -> list[str]:
    program = [sys.executable, str(CHECKOUT / "inference.py"), "--config_path", config, "--overwrite"]
    return [*program, f"--prompt={prompt}", f"--seed={seed}", f"--output_folder={folder}", *overrides]


def timed(command: list[str], timeout: float, side: str) -> float:
    """Seconds that a command takes. Raises UserError with the last line of its output if it fails."""
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{side}={shlex.join(command)[:200]} did not run ({error}); run it by hand") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        message = f"ended with {done.returncode} ({lines[-1]})"
        raise UserError(f"{side}={shlex.join(command)[:200]} {message}; run it by hand")
    return time.perf_counter() - begin


def run_theirs(args: argparse.Namespace, prompt: str, seed: int, video: Path) -> float:
    seconds = timed(their_command(args.theirs, prompt, seed, video), args.timeout, "theirs")
    if not video.is_file():
        raise UserError(f"theirs={args.theirs} did not write {video}; make it write its video to {{out}}")
    return seconds


def run_ours(args: argparse.Namespace, prompt: str, seed: int, video: Path) -> float:
    with tempfile.TemporaryDirectory(dir=video.parent, prefix=".partial-") as between:
        folder = Path(between) / "clip"
        seconds = timed(our_command(args.ours, args.overrides, prompt, seed, folder), args.timeout, "ours")
        (made,) = folder.glob("*.mp4")
        made.replace(video)
        made.with_suffix(".json").replace(video.with_suffix(".run.json"))
    return seconds


def play(args: argparse.Namespace, out: Path) -> list[dict]:
    """All clips of both, in turns: a row each with its prompt, seed and both times."""
    rows = []
    runners = {"theirs": run_theirs, "ours": run_ours}
    jobs = [(prompt, seed) for prompt in args.prompts for seed in args.seeds]
    for i, (prompt, seed) in enumerate(jobs):
        row: dict = {"prompt": prompt, "seed": seed}
        for side in SIDES if i % 2 == 0 else SIDES[::-1]:
            video = out / side / f"{i:04d}.mp4"
            if video.exists() and "timings_s" not in read_record(video):
                raise UserError(f"out={out} holds {side}/{video.name}, which is not of a comparison; choose another")
            video.parent.mkdir(parents=True, exist_ok=True)
            video.unlink(missing_ok=True)
            row[side] = runners[side](args, prompt, seed, video)
            extra = read_record(video.with_suffix(".run.mp4"))  # what inference.py said of its own clip
            times = extra.get("timings_s", {}) | {"total": row[side]}
            record = extra | {"prompt": prompt, "seed": seed, "timings_s": times}
            write_json_atomic(video.with_suffix(".json"), record)
            video.with_suffix(".run.json").unlink(missing_ok=True)
        rows.append(row)
        print(f"{i + 1}/{len(jobs)}  theirs {row['theirs']:.2f} s  ours {row['ours']:.2f} s  {prompt[:50]}", flush=True)
    return rows


def speed_ratio(rows: Sequence[dict]) -> Interval:
    """Theirs over ours, above 1 = ours is faster: geometric mean over clips, Student's interval of the logarithms."""
    times = {side: torch.tensor([row[side] for row in rows], dtype=torch.float64).log() for side in SIDES}
    log = paired_interval(times["ours"], times["theirs"])
    return Interval(math.exp(log.value), math.exp(log.low), math.exp(log.high), log.n)


def summary(ratio: Interval, data: dict) -> str:
    spread = f" [{ratio.low:.2f}, {ratio.high:.2f}]" if math.isfinite(ratio.high) else ""
    lines = [f"ours is {ratio.value:.2f}{spread} times as fast over {ratio.n} clips, start-up included", ""]
    lines.append(f"{'measure':<17} {'theirs':>10} {'ours':>10} {'ours - theirs':>28}")
    for name in MEASURES:
        first, second = (folder["averages"][name]["value"] for folder in data["folders"])
        gap = data["differences"][name]
        spread = "" if gap["low"] is None else f" [{gap['low']:.3g}, {gap['high']:.3g}]"
        cells = ("-" if value is None else f"{value:.3g}" for value in (first, second, gap["value"]))
        a, b, c = cells
        lines.append(f"{name:<17} {a:>10} {b:>10} {c + spread:>28}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    config = load_config(args.ours, args.overrides)
    out = check_writable(Path(args.out), "out")
    rows = play(args, out)
    names = sorted(path.name for path in (out / "ours").glob("*.mp4"))[: len(rows)]
    chunk = config.stream.chunk_frames
    folders = [(side, [measure_video(out / side / name, chunk) for name in names]) for side in SIDES]
    data, ratio = report_data(folders), speed_ratio(rows)
    write_json_atomic(out / "report.json", data)
    with atomic_path(out / "report.html") as temporary:
        temporary.write_text(report_page(folders, out), encoding="utf-8")
    write_json_atomic(out / "compare.json", {"theirs": args.theirs, "speed_ratio": ratio.to_dict(), "clips": rows})
    print(f"\n{summary(ratio, data)}\n\n{out / 'report.html'}")
    return 0


if __name__ == "__main__":
    exits.run(main)
