"""The diagonal schedule: the timesteps of each chunk, and the context mode.

Before the shift, timesteps are evenly spaced from `first` to `last`; the shift warps them (100 -> 357.1, 550 -> 859.4
at shift 5). Later chunks have fewer steps, and the last row holds for all chunks after it (Diagonal Distillation, arXiv
2603.09488). The context mode says which keys and values of a chunk stay in the cache for later chunks:

    last_step   those of the last denoising step, at its timestep; no extra pass (diagonal forcing)
    clean       those of an extra pass over the final x0 at t = 0 (Self-Forcing)
    renoise     those of an extra pass over the final x0, noised again to `renoise_timestep`
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from configs.errors import UserError, shown
from configs.geometry import Geometry
from configs.schema import CONTEXT_OF, DATED, Config, ScheduleConfig, StreamConfig
from model.timesteps import TIME, warp
from utils.tables import aligned

MAX_STEPS, MAX_ROWS = 1000, 1000  # steps of a chunk; chunks with their own row of timesteps
EVEN = {"first": 1000.0, "last": 100.0, "shift": 5.0}
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # the paper's table of schedules and its figure; the context mode is that of stream.context
        "paper_5432222": {"steps": "5432222", **EVEN},
        "paper_4322222": {"steps": "4322222", **EVEN},
        "paper_4222222": {"steps": "4222222", **EVEN},
        "paper_5333333": {"steps": "5333333", **EVEN},
        # diagdistill's timesteps as its network receives them, after the shift. Its noise levels are those of the
        # nearest of 1,000 points (933 -> .93306, 733 -> .73262, 357 -> .35714); here they are t / 1000.
        "release_2026_03": {  # commit 4ea418d: 357 is cut to an integer in the first two chunks only
            "timesteps": [[1000, 933, 733, 357], [1000, 933, 357], [1000, 357.142857]],
        },
        "release_2026_11": {  # commit 24ef1c9: 1000 750 500 100 before the warp; `release` means this one
            "timesteps": [[1000, 937.5, 833.333333, 357.142857], [1000, 937.5, 357.142857], [1000, 357.142857]],
        },
        # Self-Forcing's four steps, 1000 750 500 250 before the warp
        "self_forcing": {"steps": "4", **EVEN, "last": 250.0},
    }
)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Timesteps of each chunk, and the context mode. The last row of timesteps holds for all later chunks."""

    timesteps_by_chunk: tuple[tuple[float, ...], ...]  # in (0, 1000], falling; the last repeats
    context: str = "last_step"  # the context mode
    renoise_timestep: float = 0.0

    @classmethod
    def from_config(cls, schedule: ScheduleConfig, stream: StreamConfig) -> "Schedule":
        """The schedule of a config. The context mode of a preset takes precedence over stream.context.

        Raises UserError for values that are no schedule.
        """
        schedule, context = _spelled_out(schedule, stream.context)
        rows = _given_rows(schedule.timesteps) if schedule.timesteps is not None else _even_rows(schedule)
        return cls(timesteps_by_chunk=rows, context=context, renoise_timestep=float(stream.context_timestep))

    def timesteps(self, chunk: int) -> tuple[float, ...]:
        """Timesteps of `chunk`."""
        return self.timesteps_by_chunk[min(chunk, len(self.timesteps_by_chunk) - 1)]

    @property
    def context_timestep(self) -> float | None:
        """Timestep of the extra pass that writes the context of a chunk; None if there is no extra pass."""
        return {"last_step": None, "clean": 0.0, "renoise": self.renoise_timestep}[self.context]

    def kv_timestep(self, chunk: int) -> float:
        """Timestep of the keys and values of `chunk` that later chunks attend to."""
        return self.timesteps(chunk)[-1] if self.context_timestep is None else self.context_timestep

    def nfe(self, num_chunks: int) -> int:
        """Number of evaluations of the student for `num_chunks` chunks, context passes included."""
        return sum(len(self.timesteps(k)) + (self.context_timestep is not None) for k in range(num_chunks))

    def table(self, num_chunks: int | None = None, geometry: Geometry | None = None) -> str:
        """The schedule as text: one line for each run of equal chunks, then the total number of evaluations.

        `2+` means chunk 2 and all later ones. geometry: adds a column with the latent frames that a chunk attends to.
        Without `num_chunks` there is no total, and chunks beyond the last that differs are not shown.
        """
        settled = len(self.timesteps_by_chunk)
        shown = settled if num_chunks is None else num_chunks
        horizon = max(settled, shown + 1)  # one more than shown, to see whether the number of keys still grows
        width = max(len(_short(t)) for row in self.timesteps_by_chunk for t in row)
        cells = [self._cells(k, geometry, width) for k in range(horizon)]
        lines = [["chunk", "steps", "timesteps", "context", "level", *(["KV frames"] if geometry else [])]]
        start = 0
        while start < shown:
            end = start
            while end + 1 < horizon and cells[end + 1] == cells[start]:
                end += 1
            last = min(end, shown - 1)
            label = f"{start}+" if end == horizon - 1 else str(start) if last == start else f"{start}-{last}"
            lines.append([label, *cells[start]])
            start = end + 1
        text = aligned(lines, left=len(lines[0]))
        if num_chunks is None:
            return text
        return f"{text}\ntotal: {self.nfe(num_chunks)} NFE for {num_chunks} chunk{'s' * (num_chunks != 1)}"

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """The schedule as lists, strings and numbers for JSON; `from_dict` is the inverse."""
        return {
            "rows": [list(row) for row in self.timesteps_by_chunk],
            "policy": self.context,
            "renoise_timestep": self.renoise_timestep,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Schedule":
        """The inverse of `to_dict`. Raises UserError for values that are no schedule, since they come from files."""
        for name in ("restart_every", "exceptions"):
            if values.get(name):
                raise UserError(f"{name}={shown(values[name])} of a stored schedule is not played any more; remove it")
        stream = StreamConfig(context=values["policy"], context_timestep=float(values["renoise_timestep"]))
        return cls.from_config(ScheduleConfig(timesteps=[[float(t) for t in row] for row in values["rows"]]), stream)

    def _cells(self, chunk: int, geometry: Geometry | None, width: int) -> list[str]:
        """What the table says of a chunk, its number apart; `width` characters a timestep."""
        row = self.timesteps(chunk)
        cells = [str(len(row)), "  ".join(_short(t).ljust(width) for t in row).rstrip()]
        cells += [self.context, _short(self.kv_timestep(chunk))]
        return cells + ([str(geometry.kv_frames(chunk))] if geometry else [])


def with_steps(config: Config, steps: Sequence[int], context: str | None = None) -> Config:
    """`config` with `steps[k]` denoising steps in chunk k and an otherwise unchanged schedule.

    If the schedule is given by numbers of steps, first, last and shift are kept, also those of a preset. If it
    lists timesteps, a chunk gets the row with that number of steps (of the nearest chunk, if there are several); if
    there is none, the timesteps of the longest row, interpolated linearly, or for one step its first timestep.
    context: replaces the context mode. Raises UserError if `steps` are no counts, or if no row has two steps to
    interpolate between.
    """
    schedule, configured = _spelled_out(config.schedule, config.stream.context)
    if schedule.timesteps is None:
        schedule = replace(schedule, steps=list(steps))
    else:
        rows = _given_rows(schedule.timesteps)
        changed = [list(_row_of(rows, k, n)) for k, n in enumerate(_counts(steps))]
        schedule = replace(schedule, timesteps=changed)
    return replace(config, schedule=schedule, stream=replace(config.stream, context=context or configured))


def as_schedule(given: Any, config: Config) -> Schedule:
    """The schedule that `given` asks for, where `config` says all else of it.

    given: a Schedule; the name of a preset; steps a chunk, as digits ("4322222") or numbers ([4, 3, 2]); or a list of
    timesteps a chunk ([[1000, 769.2, 357.1], [1000, 357.1]]). UserError for anything else.
    """
    if isinstance(given, Schedule):
        return given
    if isinstance(given, str) and not given.isdecimal():
        named = replace(config, schedule=ScheduleConfig(preset=given))
        return Schedule.from_config(named.schedule, named.stream)
    if isinstance(given, list | tuple) and given and all(isinstance(row, list | tuple) for row in given):
        _, context = _spelled_out(config.schedule, config.stream.context)
        listed = ScheduleConfig(timesteps=[list(row) for row in given])
        return Schedule.from_config(listed, replace(config.stream, context=context))
    if not isinstance(given, str | list | tuple):
        raise UserError(
            f"schedule={shown(given)} is no schedule; give a preset ({', '.join([*PRESETS, *DATED])}), steps a chunk "
            f'("4322222" or [4, 3, 2]), a list of timesteps a chunk, or a Schedule'
        )
    changed = with_steps(config, _counts(given))
    return Schedule.from_config(changed.schedule, changed.stream)


def _row_of(rows: Sequence[tuple[float, ...]], chunk: int, steps: int) -> tuple[float, ...]:
    """Timesteps of `chunk` with `steps` steps, taken from `rows` as `with_steps` says."""
    place = min(chunk, len(rows) - 1)
    same = [k for k, row in enumerate(rows) if len(row) == steps]
    if same:
        return rows[min(same, key=lambda k: abs(k - place))]
    if steps == 1:
        return rows[place][:1]
    longest = max(rows, key=len)
    if len(longest) == 1:
        raise UserError(
            f"schedule.timesteps={shown([list(row) for row in rows])} has one step in each row, which does not say "
            f"where {steps} steps would end; list a longer row, or give schedule.steps"
        )
    row = []
    for i in range(steps):
        whole, part = divmod(i * (len(longest) - 1), steps - 1)
        ahead = longest[min(whole + 1, len(longest) - 1)]
        row.append(longest[whole] + (ahead - longest[whole]) * part / (steps - 1))
    return tuple(row)


def _short(t: float) -> str:
    """t with one decimal, or none if it is zero."""
    return f"{t:.1f}".removesuffix(".0")


def _spelled_out(schedule: ScheduleConfig, context: str) -> tuple[ScheduleConfig, str]:
    """`schedule` with its preset replaced by the preset's fields, and the context mode: the preset's if it has one."""
    if schedule.preset is None:
        return schedule, context
    return ScheduleConfig(**_preset(schedule)), CONTEXT_OF.get(schedule.preset, context)


def _preset(schedule: ScheduleConfig) -> Mapping[str, Any]:
    """Fields of the preset. Raises UserError for an unknown name and for other fields beside a preset."""
    name = schedule.preset
    if name not in PRESETS:
        raise UserError(f"schedule.preset={shown(name)} is unknown; use one of {', '.join([*PRESETS, *DATED])}")
    default = asdict(ScheduleConfig())
    for field in fields(schedule):
        value = vars(schedule)[field.name]
        if field.name != "preset" and value != default[field.name]:
            raise UserError(
                f"schedule.{field.name}={shown(value)} has no effect beside schedule.preset={name}; "
                f"leave out one of the two (schedule.preset=null)"
            )
    return PRESETS[name]


def _even_rows(schedule: ScheduleConfig) -> tuple[tuple[float, ...], ...]:
    """Timesteps from the number of steps of each chunk: evenly spaced, then shifted. A single step is at `first`."""
    first, last = (_timestep(f"schedule.{name}", vars(schedule)[name]) for name in ("first", "last"))
    if last >= first:
        raise UserError(f"schedule.last={last:g} is not below schedule.first={first:g}; timesteps fall within a chunk")
    rows = []
    for steps in _counts(schedule.steps):
        row = [first + (last - first) * i / max(steps - 1, 1) for i in range(steps)]
        rows.append(tuple(warp(t / TIME, schedule.shift) for t in row))
    return tuple(rows)


def _counts(steps: Any) -> list[int]:
    """schedule.steps as integers: "4322", the number 4322 that YAML makes of it, or [4, 3, 2, 2]."""
    digits = steps if isinstance(steps, list | tuple) else [int(x) if x in "123456789" else 0 for x in str(steps)]
    good = all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= MAX_STEPS for n in digits)
    if isinstance(steps, bool) or not good or not 1 <= len(digits) <= MAX_ROWS:
        raise UserError(
            f"schedule.steps={shown(steps)} is not a count of steps a chunk; give digits 1-9, one a chunk "
            f'("4322222"), or a list of whole numbers of 1 to {MAX_STEPS} ([4, 3, 2]), for {MAX_ROWS} chunks at most'
        )
    return list(digits)


def _given_rows(timesteps: Any) -> tuple[tuple[float, ...], ...]:
    """schedule.timesteps, checked."""
    if not isinstance(timesteps, list | tuple) or not timesteps:
        raise UserError(f"schedule.timesteps={shown(timesteps)} names no chunk; give a list of timesteps a chunk")
    if len(timesteps) > MAX_ROWS:
        raise UserError(f"schedule.timesteps has {len(timesteps):,} rows; give {MAX_ROWS} at most, the last repeats")
    rows = []
    for k, given in enumerate(timesteps):
        name = f"schedule.timesteps.{k}"
        if not isinstance(given, list | tuple) or not given:
            raise UserError(f"{name}={shown(given)} has no step; give at least one timestep, [1000]")
        row = tuple(_timestep(name, t) for t in given)
        if any(a <= b for a, b in zip(row, row[1:], strict=False)):
            raise UserError(f"{name}={shown(given)} does not fall; list timesteps from noisy to clean, [1000, 357.1]")
        rows.append(row)
    return tuple(rows)


def _timestep(name: str, value: Any) -> float:
    """`value` as a timestep."""
    if not _is_number(value) or not 0 < value <= TIME:
        raise UserError(f"{name}={shown(value)} is not a timestep; it must be above 0 and at most {TIME:g}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
