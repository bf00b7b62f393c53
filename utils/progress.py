"""Progress bars on terminals, removed when they are finished; nothing without a terminal."""

from typing import Any

from tqdm import tqdm


def progress_bar(description: str, total: int | None, unit: str = "it", position: int = 0, **settings: Any) -> tqdm:
    """A bar over `total` units on stderr. `position`: its line, for several processes on one terminal.

    settings: of tqdm, which go before those that are set here.
    """
    short = " ".join(description.split())  # a line break would make the bar scroll
    short = short if len(short) <= 40 else short[:39] + "…"
    # disable=None: only where stderr is a terminal
    look = {"desc": short, "unit": unit, "position": position, "leave": False, "dynamic_ncols": True, "disable": None}
    return tqdm(total=total, **(look | settings))
