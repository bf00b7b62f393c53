"""Speed reports as text: one report in full, a suite as rows."""

from collections.abc import Mapping
from typing import Any

from utils.tables import aligned

GB = 1e9


def ms(seconds: float | None) -> str:
    """Milliseconds as text; empty for None."""
    return "" if seconds is None else f"{1000 * seconds:.1f}"


def table(report: Mapping[str, Any]) -> str:
    """A whole report."""
    machine, settings = report["machine"], report["settings"]
    lines = [
        f"{report['config']} on {machine['device']}, torch {machine.get('torch')}, weights: {report['weights']}",
        ", ".join(f"{key} {value}" for key, value in settings.items() if key != "schedule"),
        "",
        aligned(_chunk_rows(report)),
        "",
        aligned(_figures(report)),
    ]
    if "fp8_layer_errors" in report:
        lines += ["", aligned([[name, f"{error:.4f}"] for name, error in report["fp8_layer_errors"].items()])]
    return "\n".join(lines)


def _chunk_rows(report: Mapping[str, Any]) -> list[list[str]]:
    names = list(dict.fromkeys(name for chunk in report["chunks"] for name in chunk if name != "arrives_s"))
    rows = [["chunk", "key frames", *(f"{name} ms" for name in names), "arrives ms", "TFLOP", "of sustained peak"]]
    for k, (chunk, step) in enumerate(zip(report["chunks"], report["steps"], strict=True)):
        cells = [ms(chunk.get(name)) for name in names]
        cost = [f"{step['flops'] / 1e12:.3g}", f"{step['matrix_share']:.0%}"]
        rows.append([str(k), str(step["key_frames"]), *cells, ms(chunk["arrives_s"]), *cost])
    return rows


def _figures(report: Mapping[str, Any]) -> list[list[str]]:
    rates, peaks, last = report["rates_fps"], report["ceilings"], report["steps"][-1]
    rows = [
        ["clip", f"{report['clip_s']:.3f} s"],
        ["clip, fastest to slowest", " to ".join(f"{x:.3f} s" for x in report["clip_spread_s"])],
        ["first frames", f"{report['first_frames_s']:.3f} s"],
        ["rate: clip", f"{rates['clip']:.1f} FPS"],
        *([["rate: steady stream", f"{rates['steady']:.1f} FPS"]] if "steady" in rates else []),
        ["rate: denoising alone", f"{rates['denoising']:.1f} FPS"],
        ["decoding a chunk, alone", f"{ms(report['decode_s'])} ms"],
        ["transferring a chunk, alone", f"{ms(report['transfer_s'])} ms"],
        ["text encoding", f"{ms(text)} ms" if (text := report["text_encoding_s"]) is not None else "not measured"],
        ["building the networks", f"{report['build_s']:.1f} s"],
        ["first clip, with compilation", f"{report['first_clip_s']:.1f} s"],
        ["process start to first clip", f"{report['since_start_s']:.1f} s"],
        ["last step", f"{ms(last['step_s'])} ms; floor {ms(last['floor_s'])} ms"],
    ]
    rows += [[f"memory: {name}", f"{size / GB:.2f} GB"] for name, size in report["memory_bytes"].items()]
    rows += [[f"ceiling: {n}", f"{r / 1e12:.3g} {'TB/s' if n == 'copy' else 'TFLOP/s'}"] for n, r in peaks.items()]
    return rows


def suite_table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """A row per variant."""
    head = ["setting", "clip s", "first s", "step ms", "of sustained peak", "FPS clip", "steady", "decode ms"]
    head += ["peak GB", "error", "first clip s", "notes"]
    rows, failed = [head], []
    for name, report in reports.items():
        if "failed" in report:
            failed.append(f"{name}: {report['failed']}")
            continue
        rates, last = report["rates_fps"], report["steps"][-1]
        error, notes = report.get("error_to_plain"), []
        if report["text_encoding_s"] is not None:
            notes.append(f"text {ms(report['text_encoding_s'])} ms")
        cells = [f"{report['clip_s']:.3f}", f"{report['first_frames_s']:.3f}", ms(last["step_s"])]
        cells += [f"{last['matrix_share']:.0%}", f"{rates['clip']:.1f}", f"{rates.get('steady', 0):.1f}"]
        cells += [ms(report["decode_s"]), f"{report['memory_bytes'].get('peak', 0) / GB:.2f}"]
        cells += ["" if error is None else f"{error:.1e}", f"{report['first_clip_s']:.1f}", "; ".join(notes)]
        rows.append([name, *cells])
    return "\n".join([aligned(rows), *failed])
