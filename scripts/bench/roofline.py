"""Measured peak rates of this machine for matrix products and copies."""

import functools
import os
import platform
import time
from collections.abc import Callable
from importlib import metadata
from statistics import median
from typing import Any

import torch
from torch import Tensor

PACKAGES = ("torch", "triton", "diffusers", "transformers", "flash-attn", "flash-attn-3", "fa3-fwd")
E4M3 = torch.float8_e4m3fn
HEAT_S = 1.0  # seconds of load after which a GPU's clock has settled


def timed(work: Callable[[], Any], device: torch.device, repeats: int = 10, warm_up: int = 3) -> float:
    """Median seconds of `work`; on a GPU measured by events."""
    for _ in range(warm_up):
        work()
    if device.type != "cuda":
        spans = []
        for _ in range(repeats):
            begin = time.perf_counter()
            work()
            spans.append(time.perf_counter() - begin)
        return median(spans)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in marks:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return median(begin.elapsed_time(end) / 1000 for begin, end in marks)


def matrix_rate(
    device: torch.device, dtype: torch.dtype, m: int, n: int, k: int, *, by_row: bool = True, heat_s: float = 0.0
) -> float:
    """FLOPs per second of [m, k] x [k, n] with random values. by_row: scales of float8, otherwise one for all.

    heat_s: seconds of this product before it is timed. A GPU under load lowers its clock to stay within its power
    limit, so a few products are faster than those of a step that runs on and on.
    """
    g = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, generator=g, device=device).to(dtype) for size in ((m, k), (n, k)))
    if dtype == E4M3:
        scales = [torch.ones(size if by_row else (), device=device) for size in ((m, 1), (1, n))]

        def work() -> Tensor:
            return torch._scaled_mm(a, b.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)
    else:

        def work() -> Tensor:
            return a @ b.t()

    end = time.perf_counter() + heat_s
    while time.perf_counter() < end:
        timed(work, device)
    return 2 * m * n * k / timed(work, device, repeats=200 if heat_s else 10)


@functools.cache
def sustained_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large matrix product after HEAT_S seconds of it."""
    gpu = device.type == "cuda"
    edge = 8192 if gpu else 512
    return matrix_rate(device, dtype, edge, edge, edge, heat_s=HEAT_S if gpu else 0.0)


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes per second, read and written, of a copy of `size` bytes in the memory of the device."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source), device)


def roofline(device: torch.device, tokens: int, dim: int, ffn: int) -> dict[str, float]:
    """Sustained peak FLOPs and bytes per second of the machine, and FLOPs per second of a few products with the
    network's shapes."""
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    shapes = {"qkv": (tokens, 3 * dim, dim), "out": (tokens, dim, dim)}
    shapes |= {"ffn 1": (tokens, ffn, dim), "ffn 2": (tokens, dim, ffn)}
    rates = {"sustained matrix peak": sustained_peak(device, dtype)}
    rates |= {f"matrix {name}": matrix_rate(device, dtype, *shape) for name, shape in shapes.items()}
    if gpu and torch.cuda.get_device_capability(device) >= (8, 9):
        rates["sustained fp8 peak"] = sustained_peak(device, E4M3)
        for name, shape in shapes.items():
            rates[f"fp8 {name}"] = matrix_rate(device, E4M3, *shape)
            rates[f"fp8 {name}, one scale"] = matrix_rate(device, E4M3, *shape, by_row=False)
    rates["copy"] = copy_rate(device, 1 << (31 if gpu else 24))
    return rates


def machine_of(device: torch.device) -> dict[str, Any]:
    """Hardware and software of a measurement."""
    facts: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform(terse=True)}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    facts["device"] = f"{platform.machine()} CPU, {os.cpu_count()} cores"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def nbytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages of `tensors`, each counted once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
