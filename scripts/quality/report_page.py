"""The clip report as one HTML page that needs no network, and no other file but for the videos that it plays."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from scripts.quality.clip_folder import ClipReport, averages, differences, pair
from utils.clip_measures import MEASURES

TEMPLATE = Path(__file__).with_suffix(".html")


def report_data(folders: Sequence[tuple[str, Sequence[ClipReport]]], unread: Sequence[str] = ()) -> dict[str, Any]:
    """Contents of report.json: of one folder, or of two with the differences of their pairs (second minus first).

    unread: a sentence for each clip that cannot be read.
    """
    data: dict[str, Any] = {
        "measures": {name: asdict(measure) for name, measure in MEASURES.items()},
        "folders": [
            {
                "name": name,
                "averages": {key: value.to_dict() for key, value in averages(clips).items()},
                "clips": [clip.to_dict() for clip in clips],
            }
            for name, clips in folders
        ],
        "unread": list(unread),
    }
    if len(folders) == 2:
        first, second = (list(clips) for _, clips in folders)
        pairs = pair(first, second)
        data["differences"] = {name: value.to_dict() for name, value in differences(pairs).items()}
        data["pairs"] = [[_index(first, a), _index(second, b)] for a, b in pairs]
    return data


def _index(clips: list[ClipReport], clip: ClipReport) -> int:
    return next(i for i, other in enumerate(clips) if other is clip)


def report_page(
    folders: Sequence[tuple[str, Sequence[ClipReport]]], home: Path | None = None, unread: Sequence[str] = ()
) -> str:
    """The page. Prompts and file names are data in it, never markup.

    home: the folder that it is to lie in, from where it plays the videos; None = it plays none.
    unread: a sentence for each clip that cannot be read.
    """
    data = report_data(folders, unread)
    for folder, (_, clips) in zip(data["folders"], folders, strict=True):
        for shown, clip in zip(folder["clips"], clips, strict=True):
            shown["strip"] = clip.strip
            shown["address"] = home and quote(os.path.relpath(clip.path.absolute(), home.absolute()))
            shown["schedule_text"] = schedule_text(clip.schedule)
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")  # no </script> from a prompt
    return TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text)


def schedule_text(schedule: dict[str, Any] | None) -> str | None:
    """A record's schedule on one line: timesteps of each row, and what is left for later chunks."""
    if not schedule or "rows" not in schedule:
        return None
    rows = " / ".join(" ".join(f"{t:.4g}" for t in row) for row in schedule["rows"])
    return f"{rows}, context {schedule.get('policy', 'unknown')}"
