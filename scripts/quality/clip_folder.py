"""Measures of the videos in a folder and of their JSON files, and pairs of clips in two folders."""

import base64
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError, shown
from configs.geometry import pixel_frames
from configs.reading import ordinary_file
from scripts.quality.clip_defects import Defect, find_defects
from utils.clip_measures import MEASURES, as_clip, series, summary
from utils.files import finite, parse_json
from utils.intervals import Interval, mean_interval, paired_interval
from utils.video import contact_sheet, read_video, shrink

MAX_RECORD = 1 << 26  # bytes of a clip's JSON
STRIP_CELLS, STRIP_WIDTH = 27, 96  # frames of a contact strip, and pixels across one


@dataclass(frozen=True)
class ClipReport:
    """One measured clip. What its JSON does not say, or where there is none, is None."""

    name: str  # file name
    frames: int
    size: tuple[int, int]  # height, width
    fps: float | None
    prompt: str | None
    seed: int | None
    borders: list[int]  # first pixel frames of chunks 1, 2, ...
    schedule: dict[str, Any] | None
    nfe: int | None
    seconds: float | None  # wall-clock of the whole clip
    first_frames: float | None  # seconds until the first frames
    measures: dict[str, float]
    defects: list[Defect]
    series: dict[str, list[float]] = field(repr=False)  # levels of 255 and shares, frame by frame
    strip: str = field(repr=False)  # contact strip, a JPEG as base64
    path: Path = field(repr=False)  # of the video

    @property
    def key(self) -> tuple:
        """What pairs a clip with one of another folder: prompt and seed, else the file's name."""
        return (self.prompt, self.seed) if self.prompt is not None else (self.name,)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: no NaN, no picture, no place on this machine."""
        plain = {name: value for name, value in asdict(self).items() if name not in ("strip", "path")}
        plain["measures"] = {name: finite(value) for name, value in self.measures.items()}
        return plain


def find_videos(folder: Path) -> list[Path]:
    """The .mp4 files of a folder, or the one file that is named. UserError where there is none."""
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise UserError(f"videos={folder} does not exist; give a folder of .mp4 files")
    videos = sorted(path for path in folder.glob("*.mp4") if not path.name.startswith("."))
    if not videos:
        raise UserError(f"videos={folder} holds no .mp4 file; give the folder that inference wrote to")
    return videos


def read_record(video: Path) -> dict[str, Any]:
    """The JSON beside a video, {} where there is none. UserError where it is broken."""
    path = video.with_suffix(".json")
    if not os.path.lexists(path):
        return {}
    ordinary_file("record", path, MAX_RECORD, fix="remove it or make the video again")
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); remove it or make the video again") from error
    return record if isinstance(record, dict) else {}


def _stated(video: Path, values: dict[str, Any], name: str, check: Callable[[Any], bool]) -> Any:
    """A value of a record, None where it is missing. UserError where `check` does not hold for it."""
    value = values.get(name)
    if value is not None and (isinstance(value, bool) or not check(value)):
        where = video.with_suffix(".json")
        raise UserError(f"{where} states {name}={shown(value)}, which no clip has; remove it or make the video again")
    return value


def chunk_borders(frames: int, chunk_frames: int) -> list[int]:
    """First pixel frames of all chunks but the first: 9, 21, 33, ... for chunks of 3 latent frames."""
    borders, k = [], 1
    while (border := pixel_frames(k * chunk_frames)) < frames:
        borders.append(border)
        k += 1
    return borders


def measure_video(video: Path, chunk_frames: int = 3) -> ClipReport:
    """Read and measure one file. chunk_frames: latent frames, of clips whose JSON does not say."""
    record = read_record(video)
    config, timings, stated = _section(record, "config"), _section(record, "timings_s"), partial(_stated, video)
    chunk_frames = stated(_section(config, "stream"), "chunk_frames", _is_count) or chunk_frames
    facts = {
        "fps": stated(_section(config, "video"), "fps", _is_count),
        "prompt": stated(record, "prompt", lambda value: isinstance(value, str)),
        "seed": stated(record, "seed", lambda value: isinstance(value, int)),
        "schedule": stated(record, "schedule", _is_schedule),
        "nfe": stated(record, "nfe", _is_count),
        "seconds": stated(timings, "total", _is_time),
        "first_frames": stated(timings, "first_frames", _is_time),
    }
    ordinary_file("video", video)
    frames = read_video(video)
    borders = chunk_borders(len(frames), chunk_frames)
    measures = series(as_clip(frames))
    small = shrink(frames, STRIP_WIDTH)
    return ClipReport(
        name=video.name,
        path=video,
        frames=len(frames),
        size=frames.shape[1:3],
        borders=borders,
        **facts,
        measures=summary(measures, borders),
        defects=find_defects(measures, borders),
        series={
            "motion": _rounded(255 * measures.steps),
            "luma": _rounded(255 * measures.luma),
            "contrast": _rounded(255 * measures.contrast),
            "saturation": _rounded(255 * measures.saturation),
            "sharpness": _rounded(measures.sharpness),
        },
        strip=_strip(small, borders),
    )


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of a record, {} where it is missing or is something else."""
    part = values.get(name)
    return part if isinstance(part, dict) else {}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and value >= 0


def _is_schedule(value: Any) -> bool:
    """As `Schedule.to_dict` has it, which page and pairs need no more of than this."""
    if not isinstance(value, dict):
        return False
    rows = value.get("rows", [])
    return isinstance(rows, list) and all(isinstance(row, list) and all(map(_is_time, row)) for row in rows)


def _rounded(values) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def _strip(frames, borders: Sequence[int]) -> str:
    """Contact strip with a bar at each chunk's first frame, as a base64 JPEG."""
    sheet = contact_sheet(frames, columns=9, chunk_borders=borders, max_cells=STRIP_CELLS)
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def averages(clips: Sequence[ClipReport]) -> dict[str, Interval]:
    """Mean of each measure over clips, with its interval."""
    return {name: mean_interval(_column(clips, name)) for name in MEASURES}


def pair(ours: Sequence[ClipReport], others: Sequence[ClipReport]) -> list[tuple[ClipReport, ClipReport]]:
    """Clips of the same prompt and seed (or file name), in the order of `ours`."""
    by_key = {clip.key: clip for clip in others}
    return [(clip, by_key[clip.key]) for clip in ours if clip.key in by_key]


def differences(pairs: Sequence[tuple[ClipReport, ClipReport]]) -> dict[str, Interval]:
    """Mean of second minus first over pairs, with Student's interval."""
    first, second = ([pair[i] for pair in pairs] for i in (0, 1))
    return {name: paired_interval(_column(first, name), _column(second, name)) for name in MEASURES}


def _column(clips: Sequence[ClipReport], name: str) -> torch.Tensor:
    return torch.tensor([clip.measures[name] for clip in clips], dtype=torch.float64)
