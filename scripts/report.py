"""Measure a folder of videos, and write report.html (one page, offline) and report.json into it.

    python scripts/report.py videos
    python scripts/report.py videos/a videos/b --out compare    # side by side, with differences of equal clips

The JSON that inference left beside each video gives prompt, seed, schedule, timings and chunks; a video without one is
measured all the same. Clips that cannot be read are named, also in the report, and count nowhere; the exit code is
then 2.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import exits

exits.guard(__name__)

from configs.errors import UserError
from scripts.quality.clip_folder import ClipReport, find_videos, measure_video
from scripts.quality.report_page import report_data, report_page
from utils.files import atomic_path, check_writable, write_json_atomic
from utils.progress import progress_bar


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = exits.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="one or two folders of .mp4 files")
    parser.add_argument("--out", metavar="DIR", help="where the report goes (default: the first folder)")
    parser.add_argument("--chunk_frames", type="positive", default=3, help="latent frames of a chunk, if no JSON says")
    parser.add_argument("--workers", type="positive", default=min(8, os.cpu_count() or 1), help="processes")
    args = parser.parse_args(arguments)
    if len(args.folders) > 2:
        raise UserError(f"folders={len(args.folders)} is too many; give one, or two to compare")
    return args


def read_folder(folder: Path, chunk_frames: int, workers: int, faults: exits.Faults) -> list[ClipReport]:
    """All clips of a folder, measured, in the order of their names. Those that cannot be read go to `faults`."""
    videos = find_videos(folder)
    measure = partial(_measured, chunk_frames=chunk_frames)
    clips = []
    with progress_bar(f"measuring {folder.name}", len(videos), "clip") as bar, ExitStack() as stack:
        if workers == 1 or len(videos) == 1:
            results = map(measure, videos)
        else:
            fresh = get_context("spawn")  # a fork of a process that has used torch's threads can wait forever
            pool = stack.enter_context(ProcessPoolExecutor(min(workers, len(videos)), mp_context=fresh))
            results = pool.map(measure, videos)
        for clip in results:
            if isinstance(clip, UserError):
                faults.note(clip)
            else:
                clips.append(clip)
            bar.update(1)
    return clips


def _measured(video: Path, chunk_frames: int) -> ClipReport | UserError:
    """The report of a clip, or why it cannot be read."""
    try:
        return measure_video(video, chunk_frames)
    except UserError as error:
        return error


def names_of(folders: list[Path]) -> list[str]:
    """Short names of the folders, as much of each path as tells them apart."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def table(data: dict) -> str:
    """Means with intervals, and differences where there are pairs, as text."""
    titles = [folder["name"] for folder in data["folders"]] + ["difference"] * ("differences" in data)
    lines = ["  ".join(["measure".ljust(17), *(title[-28:].rjust(28) for title in titles)])]
    for name in data["measures"]:
        columns = [folder["averages"][name] for folder in data["folders"]]
        columns += [data["differences"][name]] if "differences" in data else []
        lines.append("  ".join([name.ljust(17), *(_cell(column).rjust(28) for column in columns)]))
    return "\n".join(lines)


def _cell(interval: dict) -> str:
    if interval["value"] is None:
        return "-"
    spread = "" if interval["low"] is None else f" [{interval['low']:.3g}, {interval['high']:.3g}]"
    return f"{interval['value']:.3g}{spread}"


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    paths = [Path(folder) for folder in args.folders]
    home = paths[0] if paths[0].is_dir() else paths[0].parent
    out = check_writable(Path(args.out) if args.out else home, "out")
    faults = exits.Faults()
    clips = [read_folder(path, args.chunk_frames, args.workers, faults) for path in paths]
    if not any(clips):
        raise UserError(f"videos={' '.join(args.folders)} holds no clip that can be read; make them again")
    folders = list(zip(names_of(paths), clips, strict=True))
    data = report_data(folders, faults.sentences)
    write_json_atomic(out / "report.json", data)
    with atomic_path(out / "report.html") as temporary:
        temporary.write_text(report_page(folders, out, faults.sentences), encoding="utf-8")
    print(table(data))
    if "pairs" in data and not data["pairs"]:
        print("no clip of one folder has the prompt and seed of one of the other: nothing to pair", file=sys.stderr)
    alarms = sum(bool(clip.defects) for part in clips for clip in part)
    total = sum(map(len, clips))
    unread = f", {len(faults.sentences)} more cannot be read" if faults.sentences else ""
    print(f"{total} clip{'s' * (total != 1)}, {alarms} with something to look at{unread}: {out / 'report.html'}")
    return faults.code


if __name__ == "__main__":
    exits.run(main)
