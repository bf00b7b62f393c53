"""Tables of the results of scripts/benchmark_training.py."""

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.bench.training_cost import BACKWARD
from utils.tables import aligned

GB = 1e9
Result = Mapping[str, Any]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def overview(results: Sequence[Result], card_gb: float) -> str:
    """A row for each layout that ran."""
    head = ["layout", "batch", "generator s", "critic s", "cycle s", "samples/s", "MFU", "peak GB", "reserved GB"]
    head += ["on card GB", "exposed comm. s", "idle s", "build s", "warm-up s", "timed"]
    rows = [head]
    for one in (one for one in results if "updates" in one):
        memory, talk = one["memory"], one.get("communication")
        most = [max((m.get(key, 0) for m in memory), default=0) / GB for key in ("peak", "reserved", "taken")]
        cells = [str(one["global_batch"]), f"{one['totals']['generator']['s']:.3f}"]
        cells += [f"{one['totals']['critic']['s']:.3f}", f"{one['cycle_s']:.3f}", f"{one['samples_per_s']:.3f}"]
        cells += [_percent(one["mfu"]), *(f"{x:.1f}" if x else "" for x in most)]
        cells += [f"{talk['exposed_s']:.3f} of {talk['kernels_s']:.3f}", f"{talk['idle_s']:.3f}"] if talk else ["", ""]
        cells += [f"{one['build_s']:.0f}", f"{one['warm_up_s']:.0f}"]
        cells += [f"{one['timed']['generator']}+{one['timed']['critic']}" + ("" if one["whole"] else ", cut off")]
        rows.append([one["layout"], *cells])
    first = next((one for one in results if "updates" in one), None)
    about = [f"allocator limited to {card_gb:g} GB per GPU unless the layout says otherwise" if card_gb else "no limit"]
    if first and not first["peak_bytes"]:
        about = ["no GPU"]
    if first:
        machine = first["machine"]
        about.insert(0, f"{machine['device']}, torch {machine['torch']}, weights: random, sustained matrix "
                        f"peak measured {first['sustained_peak'] / 1e12:.3g} TFLOP/s")  # fmt: skip
    note = "exposed comm.: communication kernels during which nothing else ran, in a step with both updates; "
    note += "idle: time without kernels (profiled, which slows the host)"
    return "\n".join(["; ".join(about), aligned(rows) if len(rows) > 1 else "", note])


def left_out(results: Sequence[Result], checks: Sequence[Result]) -> str:
    """Reasons for layouts and checks that are missing in the tables; empty if there are none."""
    lines = [f"{one['layout']}: {one['why']}" for one in results if "updates" not in one]
    lines += [f"{one['layout']}: {one['ended']}" for one in results if "updates" in one and not one["whole"]]
    lines += [f"check of {one['layout']}: {one['why']}" for one in checks if "why" in one]
    return "\n".join(["MISSING below:", *lines]) if lines else ""


def phase_table(one: Result) -> str:
    """A row for each phase of a layout."""
    rows = [["", "s", "share of cycle", "TFLOP", "MFU", "with recomputation", "peak GB"]]
    for who, phases in one["updates"].items():
        times = one["ratio"] if who == "critic" else 1
        for name, phase in phases.items():
            peaks = [m["phases"].get(f"{who}/{name}", 0) for m in one["memory"] if "phases" in m]
            again = phase.get("with_recomputation") if name == BACKWARD and one["checkpointing"] else None
            cells = [f"{phase['s']:.4f}", _percent(times * phase["s"] / one["cycle_s"])]
            cells += [f"{phase['flops'] / 1e12:.4g}" if "flops" in phase else "", _percent(phase.get("mfu"))]
            rows.append([f"{who}: {name}", *cells, _percent(again), f"{max(peaks) / GB:.1f}" if peaks else ""])
    head = f"{one['layout']}: global batch {one['global_batch']}, {one['ratio']} critic updates a cycle"
    return "\n".join([head, aligned(rows), *error_text(one), *saving_text(one)])


def error_text(one: Result) -> list[str]:
    """The error of a teacher in float8."""
    errors = one["teacher_errors"].items()
    return [f"teacher in float8: v off by {', '.join(f'{e:.1%} at t={t}' for t, e in errors)}"] if errors else []


def saving_text(one: Result) -> list[str]:
    """Time and size of a checkpoint, if one was written."""
    if "saving" not in one:
        return []
    made = one["saving"]
    if "why" in made:
        return [f"checkpoint: {made['why']}"]
    disk, gpu, host = (made[key] / GB for key in ("bytes", "gpu_bytes", "host_bytes"))
    return [
        f"checkpoint, with checksums and export: {made['s']:.1f} s for {disk:.3g} GB; at most {gpu:.2g} GB more on "
        f"the first GPU and {host:.2g} GB more of the host's memory for its process"
    ]


def scaling(results: Sequence[Result]) -> str:
    """Ratios of samples per second between layouts."""
    ran = [one for one in results if "updates" in one]
    if len(ran) < 2:
        return ""
    rows = [["measured", *(f"to {one['layout']}" for one in ran)]]
    for one in ran:
        rows.append([one["layout"], *(f"x{one['samples_per_s'] / other['samples_per_s']:.2f}" for other in ran)])
    return "samples per second, row / column\n" + aligned(rows)


def projection_table(rows: Sequence[Result], steps: int, global_batch: int, network_gb_s: float) -> str:
    """Hours of a training by number of GPUs."""
    table = [["GPUs", "from layout", "accumulated", "generator s", "critic s", "hours", "basis"]]
    for row in rows:
        basis = "measured cycle, repeated" if row["measured_gpus"] else "projected"
        seconds = [f"{row['generator_s']:.1f}", f"{row['critic_s']:.1f}", f"{row['hours']:.2f}"]
        table.append([str(row["gpus"]), row["from"], str(row["accumulated"]), *seconds, basis])
    return (
        f"{steps} critic updates at global batch {global_batch}, PROJECTED: measured phases x accumulated batches; "
        f"between machines of 8 GPUs, gradients at {network_gb_s:g} GB/s per GPU, exposed. No validation, no saving.\n"
        f"{aligned(table)}\ndiagdistill (24ef1c9) states: under 2 hours on 64 H100, under 16 hours on 8"
    )


def plan_text(rows: Sequence[Result], world: int, card_gb: float) -> str:
    """A row for each planned layout."""
    phases = list(next(row["phases"] for row in rows if "phases" in row))
    table = [["layout", "shards", "accumulated", *(f"{name} GB" for name in phases), f"fits {card_gb:g} GB"]]
    refused = [f"{row['layout']}: {row['refused']}" for row in rows if "refused" in row]
    for row in rows:
        if "phases" in row:
            memory = [f"{row['phases'][name] / GB:.1f}" for name in phases]
            rounds = "not divisible" if row["accumulated"] is None else str(row["accumulated"])
            table.append([row["layout"], str(row["shards"]), rounds, *memory, "yes" if row["fits"] else "no"])
    head = f"memory plan for {world} GPUs (model/memory.py), with precomputed prompts"
    return "\n".join([head, aligned(table), *refused])


def advice_text(rows: Sequence[tuple[int, str, str | None, float]], card_gb: float) -> str:
    """Recommended settings for few GPUs."""
    table = [["GPUs", "trained", "layout that fits", "planned peak GB"]]
    for gpus, trained, layout, peak in rows:
        table.append([str(gpus), trained, layout or "none", f"{peak / GB:.1f}" if layout else ""])
    return f"smallest change that fits {card_gb:g} GB per GPU, by plan, with precomputed prompts\n{aligned(table)}"


def check_text(rows: Sequence[Result]) -> str:
    """Differences between N ranks and one."""
    table = [["layout", "losses", "bound", "gradient norms", "bound", "change of weights", "bound", ""]]
    for row in (row for row in rows if "why" not in row):
        cells = [f"{row[key][i]:.2e}" for key in ("losses", "norms", "weights") for i in (0, 1)]
        table.append([row["layout"], *cells, "equal" if row["passed"] else "DIFFERS"])
    head = "relative differences of N ranks to 1, same global batch, after 5 critic and 3 generator updates"
    return "\n".join([head, aligned(table)]) if len(table) > 1 else head
