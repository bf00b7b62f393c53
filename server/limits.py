"""What one visitor may use."""

from dataclasses import dataclass

from configs.validate import check_bounds, number

MAX_MESSAGE = 65_536  # bytes
MAX_PROMPT = 2_000  # characters
MAX_STEPS, MAX_ROWS = 8, 12  # steps of a chunk; chunks that have their own number; more where the configuration has
MAX_SEED = 2**31 - 1
MAX_UPLOAD = 8 * 2**20  # bytes of a picture
MAX_TAKES = 8  # of one stream that are kept
MAX_KEPT = 800  # chunks of them: ten minutes at 16 frames a second


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Each field is an option of the server, or fixed."""

    visitors: int = number(8, 1, 1000)  # connections at once
    streams_per_key: int = number(4, 1, 1000)  # of these, where there are keys
    max_seconds: float = number(600.0, 1, 86_400)  # of one video
    idle_seconds: float = number(600.0, 0.1, 86_400)  # without a message before the connection is closed
    ahead_seconds: float = 3.0  # of video that is made before it is shown
    rewind_bytes: int = 256 * 2**20  # of host memory for one visitor's snapshots
    silent_seconds: float = 20.0  # that a worker says nothing before it counts as hung; six times that in a chunk
    streams: int = number(0, 0, 1000)  # that a worker takes; 0 = as many as it keeps at their rate, by what it measures

    def __post_init__(self):
        check_bounds("", self)
