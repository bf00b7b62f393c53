"""Cards as text: one card in full, a suite as rows, two cards side by side."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

GB = 1e9


def grid(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def ms(seconds: float | None) -> str:
    """Milliseconds, or nothing."""
    return "" if seconds is None else f"{1000 * seconds:.1f}"


def table(card: Mapping[str, Any]) -> str:
    """A whole card."""
    machine, settings = card["machine"], card["settings"]
    lines = [
        f"{card['config']} on {machine['device']}, torch {machine.get('torch')}, weights: {card['weights']}",
        ", ".join(f"{key} {value}" for key, value in settings.items() if key != "schedule"),
        "",
        grid(_chunk_rows(card)),
        "",
        grid(_figures(card)),
    ]
    if "stream" in card:
        lines += ["", _stream(card["stream"])]
    if "fp8_layer_errors" in card:
        lines += ["", grid([[name, f"{error:.4f}"] for name, error in card["fp8_layer_errors"].items()])]
    return "\n".join(lines)


def _chunk_rows(card: Mapping[str, Any]) -> list[list[str]]:
    names = list(dict.fromkeys(name for chunk in card["chunks"] for name in chunk if name != "arrives_s"))
    rows = [["chunk", "key frames", *(f"{name} ms" for name in names), "arrives ms", "TFLOP", "of matrix peak"]]
    for k, (chunk, step) in enumerate(zip(card["chunks"], card["steps"], strict=True)):
        cells = [ms(chunk.get(name)) for name in names]
        cost = [f"{step['flops'] / 1e12:.3g}", f"{step['matrix_share']:.0%}"]
        rows.append([str(k), str(step["key_frames"]), *cells, ms(chunk["arrives_s"]), *cost])
    return rows


def _figures(card: Mapping[str, Any]) -> list[list[str]]:
    rates, peaks, last = card["rates_fps"], card["ceilings"], card["steps"][-1]
    rows = [
        ["clip", f"{card['clip_s']:.3f} s"],
        ["clip, quickest to slowest", " to ".join(f"{x:.3f} s" for x in card["clip_spread_s"])],
        ["first frames", f"{card['first_frames_s']:.3f} s"],
        ["rate: clip", f"{rates['clip']:.1f} FPS"],
        *([["rate: steady stream", f"{rates['steady']:.1f} FPS"]] if "steady" in rates else []),
        ["rate: denoising alone", f"{rates['denoising']:.1f} FPS"],
        ["decoding of a chunk alone", f"{ms(card['decode_s'])} ms"],
        ["transfer of a chunk alone", f"{ms(card['transfer_s'])} ms"],
        ["text encoding", "not measured" if card["text_encoding_s"] is None else f"{ms(card['text_encoding_s'])} ms"],
        ["building the networks", f"{card['build_s']:.1f} s"],
        ["first clip, compilation included", f"{card['first_clip_s']:.1f} s"],
        ["process start to first clip", f"{card['since_start_s']:.1f} s"],
        ["last step", f"{ms(last['step_s'])} ms; floor {ms(last['floor_s'])} ms"],
        ["energy", "no counter" if card["joules_a_clip"] is None else f"{card['joules_a_clip']:.0f} J a clip"],
    ]
    rows += [[f"memory: {name}", f"{size / GB:.2f} GB"] for name, size in card["memory_bytes"].items()]
    rows += [[f"ceiling: {n}", f"{r / 1e12:.3g} {'TB/s' if n == 'copy' else 'TFLOP/s'}"] for n, r in peaks.items()]
    return rows


def _stream(found: Mapping[str, Any]) -> str:
    kept = "is kept" if found["keeps_up"] else f"is not kept: {found['late_frames']} frames late"
    return (
        f"stream of {found['chunks']} chunks: a chunk each {ms(found['interval_median'])} ms (99% within "
        f"{ms(found['interval_p99'])}, longest {ms(found['interval_max'])}); {found['fps']} FPS {kept}; "
        f"slowdown x{found['slowdown']:.3f}, growth {found['growth'] / 1e6:.1f} MB"
    )


def suite_table(cards: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a setting."""
    head = ["setting", "clip s", "first s", "step ms", "of peak", "FPS clip", "steady", "decode ms", "peak GB"]
    head += ["error", "first clip s", "notes"]
    rows, failed = [head], []
    for name, card in cards.items():
        if "failed" in card:
            failed.append(f"{name}: {card['failed']}")
            continue
        rates, last = card["rates_fps"], card["steps"][-1]
        error, notes = card.get("error_to_plain"), []
        if "stream" in card:
            seen = card["stream"]
            notes.append(f"{'keeps' if seen['keeps_up'] else 'misses'} {seen['fps']} FPS, x{seen['slowdown']:.2f}")
        if card["text_encoding_s"] is not None:
            notes.append(f"text {ms(card['text_encoding_s'])} ms")
        cells = [f"{card['clip_s']:.3f}", f"{card['first_frames_s']:.3f}", ms(last["step_s"])]
        cells += [f"{last['matrix_share']:.0%}", f"{rates['clip']:.1f}", f"{rates.get('steady', 0):.1f}"]
        cells += [ms(card["decode_s"]), f"{card['memory_bytes'].get('peak', 0) / GB:.2f}"]
        cells += ["" if error is None else f"{error:.1e}", f"{card['first_clip_s']:.1f}", "; ".join(notes)]
        rows.append([name, *cells])
    return "\n".join([grid(rows), *failed])


def comparison(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Every figure that both have, and the ratio of the second to the first. Says which settings differ."""
    first, second = dict(_numbers(a)), dict(_numbers(b))
    rows = [["", "first", "second", "second / first"]]
    for name, value in first.items():
        if name in second:
            ratio = f"{second[name] / value:.3f}" if value else ""
            rows.append([name, f"{value:.6g}", f"{second[name]:.6g}", ratio])
    differ = [
        f"{part}.{key}: {a[part].get(key)} | {b[part].get(key)}"
        for part in ("machine", "settings")
        for key in dict.fromkeys([*a.get(part, {}), *b.get(part, {})])
        if a[part].get(key) != b[part].get(key)
    ]
    return "\n".join([grid(rows), "", *(differ or ["same machine and settings"])])


def _numbers(card: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in card.items():
        if key in ("machine", "settings"):
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield from _numbers({str(i): item for i, item in enumerate(value)}, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
