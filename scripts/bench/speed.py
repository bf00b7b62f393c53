"""The speed report: times of a clip and its parts, their cost, and the ratio to the peak rates of the machine.

Times are medians over repeats after warm-up. There are three rates in pixel frames per second:

    clip       frames of a clip / seconds from the call to its last frame in host memory
    steady     frames of a chunk / seconds between two chunks of a stream that is under way
    denoising  frames of a chunk / seconds of its denoising steps alone; neither decoding nor transfer

They include the keys of the prompt but not its encoding, which is timed by itself.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from model.fast.student import FastPlan
from model.fp8 import UNQUANTIZED_BLOCKS
from model.sizes import TransformerSize
from pipeline.async_decoder import prefetch, to_frames, to_host
from pipeline.stream import ChunkResult, StreamSession
from scripts.bench.cost import clip_flops, step_cost
from scripts.bench.roofline import nbytes, timed

PROMPT = "a red circle moves right"
WARM_UPS = 2  # the first runs each cache state, the second captures the remaining ones


@dataclass
class Playback:
    """One run of a stream: arrival times of its chunks in host memory, in seconds, and times of their parts."""

    arrivals: list[float] = field(default_factory=list)
    spans: list[dict[str, float]] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)  # of each chunk, of one stream
    latents: Tensor | None = None  # of the last chunk, on the host


def play(session: StreamSession, chunks: int, batch: int = 1, prompt: str = PROMPT) -> Playback:
    """Generate `chunks` chunks as the pipeline does, which queues the next one before it waits where it can."""
    out, last = Playback(), None
    begin = time.perf_counter()
    results = session.play([prompt] * batch, list(range(batch)), chunks)
    for result in prefetch(results, int(session.async_decoder.overlap)):
        result.wait()
        out.arrivals.append(time.perf_counter() - begin)
        out.frames.append(result.frames.shape[1])
        out.spans.append(result.timings)
        last = result
    assert isinstance(last, ChunkResult), "a stream of no chunks"
    out.latents = last.latents.float().cpu()
    return out


def report(
    session: StreamSession,
    network: TransformerSize,
    *,
    chunks: int,
    batch: int,
    repeats: int,
    fps: int,
    text_tokens: int,
) -> dict[str, Any]:
    """The report of a session, without the peak rates of the machine. Rates are sums over streams."""
    device, gpu = session.device, session.device.type == "cuda"
    began = time.perf_counter()
    for _ in range(WARM_UPS):
        play(session, chunks, batch)
    warm_up = time.perf_counter() - began
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    runs = [play(session, chunks, batch) for _ in range(repeats)]
    clip, first = (median(run.arrivals[i] for run in runs) for i in (-1, 0))
    frames = batch * sum(runs[0].frames)
    steps = [{name: median(run.spans[k][name] for run in runs) for name in runs[0].spans[k]} for k in range(chunks)]
    rates = {"clip": frames / clip}
    if chunks > 1:
        k = max(1, chunks - 2)  # not the last, which is decoded while nothing is denoised
        gaps = [run.arrivals[k] - run.arrivals[k - 1] for run in runs]
        rates["steady"] = batch * runs[0].frames[k] / median(gaps)
    denoising = sum(s for name, s in steps[-1].items() if name.startswith("step") or name == "context")
    rates["denoising"] = batch * runs[0].frames[-1] / denoising
    return {
        "warm_up_s": warm_up,
        "clip_s": clip,
        "clip_spread_s": [min(run.arrivals[-1] for run in runs), max(run.arrivals[-1] for run in runs)],
        "first_frames_s": first,
        "frames": frames,
        "rates_fps": rates,
        "chunks": [{"arrives_s": median(run.arrivals[k] for run in runs), **steps[k]} for k in range(chunks)],
        "realtime_at_fps": fps,
        "clip_flops": clip_flops(
            network, session.geometry, session.schedule, chunks, text_tokens=text_tokens, batch=batch
        ),
        "memory_bytes": _memory(session),
        "latents": runs[-1].latents,
    }


def _memory(session: StreamSession) -> dict[str, int]:
    """Bytes by part. `peak` and `reserved` are of the whole process since the warm-up."""
    gpu, model = session.device.type == "cuda", session.student.model
    sizes = {
        "student": nbytes([*model.parameters(), *model.buffers()]),
        "KV cache": session._cache.bytes,
        "text keys": nbytes([x for kv in session._prompt_track.state.kv for x in kv]),
    }
    if gpu:
        sizes["peak"] = torch.cuda.max_memory_allocated(session.device)
        sizes["reserved"] = torch.cuda.memory_reserved(session.device)
    return sizes


# --- parts by themselves ----------------------------------------------------------------------------------------------


@torch.no_grad()
def parts(session: StreamSession, batch: int) -> dict[str, float]:
    """Seconds of decoding and of transferring one chunk (not the first), each measured alone."""
    geometry, device = session.geometry, session.device
    decoder = session.codec.stream()
    latents = torch.randn(geometry.latent_shape(batch, geometry.chunk_frames), device=device)
    decoder.decode(latents)
    frames = to_frames(decoder.decode(latents))
    return {
        "decode_s": timed(lambda: to_frames(decoder.decode(latents)), device, repeats=10),
        "transfer_s": timed(lambda: to_host(frames), device, repeats=10),
    }


@torch.no_grad()
def text_seconds(encode: Callable[[list[str]], Tensor], device: torch.device) -> float:
    """Seconds of encoding one prompt, tokens to embedding."""
    return timed(lambda: encode([PROMPT]), device, repeats=5, warm_up=2)


def efficiency(
    session: StreamSession,
    network: TransformerSize,
    report: dict[str, Any],
    rates: dict[str, float],
    *,
    batch: int,
    plan: FastPlan,
    gpus: int = 1,
) -> list[dict[str, Any]]:
    """The last step of each chunk compared with the sustained rates of `gpus`: FLOPs, bytes, and shares of both rates.

    matrix_share: time of the products at the sustained peak of the precision that each is computed in, per time of the
    step.
    """
    rows, text = [], session._prompt_track.state.kv[0][0].shape[1]
    half, copy = gpus * rates["sustained matrix peak"], gpus * rates["copy"]
    fp8 = gpus * rates.get("sustained fp8 peak", rates["sustained matrix peak"])
    linears = plan.fp8 * max(0, network.layers - len(UNQUANTIZED_BLOCKS)) / network.layers
    for k, chunk in enumerate(report["chunks"]):
        visible = len(session.geometry.visible_chunks(k))
        cost = step_cost(
            network, session.geometry, visible=visible, text_tokens=text, batch=batch, fp8=plan.fp8,
            key_bytes=session._cache.dtype.itemsize,
        )  # fmt: skip
        products = cost.matrix_seconds(half, fp8, linears=linears, attention=plan.fp8_cache)
        seconds = chunk[max(name for name in chunk if name.startswith("step"))]
        rows.append(
            {
                "chunk": k,
                "key_frames": visible * session.geometry.chunk_frames,
                "step_s": seconds,
                "flops": cost.flops,
                "bytes": cost.total_bytes,
                "matrix_share": products / seconds,
                "copy_share": cost.total_bytes / seconds / copy,
                "floor_s": max(products, cost.total_bytes / copy),
            }
        )
    return rows
