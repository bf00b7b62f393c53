"""Device, precision and CPU threads, and what `auto` means on this machine."""

import ctypes
import functools
import math
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from configs.errors import UserError
from configs.schema import FP8

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device `name`; `auto` is CUDA if available, else the CPU. `cuda` without an index is that of `local_rank`.

    Raises UserError for a device that does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name} is not a device; use auto, cpu, cuda or cuda:<index>") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UserError(f"device={name} is none that this runs on; use auto, cpu, cuda or cuda:<index>")
    if not torch.cuda.is_available():
        raise UserError(f"device={name} but torch {torch.__version__} finds no CUDA device; use device=cpu or auto")
    index = int(name.partition(":")[2] or local_rank)  # torch's own index wraps at 256
    visible = torch.cuda.device_count()
    if index >= visible:
        raise UserError(
            f"device={name} is CUDA device {index} for local rank {local_rank} but {visible} are visible; "
            f"start at most {visible} processes on this machine"
        )
    return torch.device("cuda", index)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of weights and activations. `auto`: bfloat16 on a GPU that supports it, else float32; one of `FP8`:
    bfloat16, the dtype of all that is not float8; otherwise one of `DTYPES`."""
    if name in FP8:
        return torch.bfloat16
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if name not in DTYPES:
        raise UserError(f"precision={name} is unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


@functools.cache
def side_stream(device: torch.device, use: str) -> torch.cuda.Stream:
    """The one stream of this process for `use` beside the current stream of `device`, a GPU.

    torch's allocator keeps what is freed for the stream that had it: with a new stream each time, each would leave its
    memory behind.
    """
    return torch.cuda.Stream(device)


_side_threads: dict[int, ThreadPoolExecutor] = {}  # by their identifiers


@functools.cache
def side_thread(use: str) -> ThreadPoolExecutor:
    """The one thread of this process for `use`: what it is given it does in order.

    Ask for it each time: a fork does not copy threads, so a forked child has one of its own. A fork waits until what
    the thread was given is done, so that the child has it, too.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix=use)
    _side_threads[thread.submit(threading.get_ident).result()] = thread
    return thread


def _finish_side_work() -> None:
    for number, thread in list(_side_threads.items()):
        if number != threading.get_ident():  # which may fork, too
            with suppress(RuntimeError):  # as the program ends it takes no more work, and has none
                thread.submit(int).result()


def _forget_side_threads() -> None:
    side_thread.cache_clear()
    _side_threads.clear()


os.register_at_fork(before=_finish_side_work, after_in_child=_forget_side_threads)


def release_memory() -> None:
    """Give back to the GPU and to the system what torch's allocator and the C library keep of freed memory.

    For after a phase whose tensors have other sizes than those of the steps around it.
    """
    torch.cuda.empty_cache()  # nothing where CUDA is not in use
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def gpu_memory(device: torch.device) -> int | None:
    """Total bytes of a GPU's memory; None for a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def set_threads(threads: int, *, training: bool = False) -> None:
    """Set torch's number of CPU threads.

    0: for videos one, since sums, and thus the last bits of a video, depend on the number; for training that of
    OMP_NUM_THREADS, which torchrun sets, else this rank's share of the available CPUs. torch's own default is one per
    core of the machine, even in a container with fewer CPUs.
    """
    if not threads and training:
        if "OMP_NUM_THREADS" in os.environ:
            return
        threads = max(1, available_cpus() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    torch.set_num_threads(threads or 1)


def available_cpus() -> int:
    """Number of CPUs that this process may use: its affinity, limited by the quotas of its control groups (Linux)."""
    cpus = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min([cpus, *(math.ceil(quota) for quota in cpu_quotas())]))


def cpu_quotas(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[float]:
    """CPU quotas of this process's control group and its parents, for cgroups versions 2 and 1."""
    quotas = []
    try:
        groups = [line.split(":", 2) for line in own.read_text().splitlines()]
        names = [Path(path.strip("/")) for _, kinds, path in groups if kinds == "" or "cpu" in kinds.split(",")]
    except (OSError, ValueError):
        names = []
    for name in {parent for path in (*names, Path()) for parent in (path, *path.parents)}:
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (root / name / "cpu.max").read_text().split()  # "max" where there is none
            quotas.append(int(quota) / int(period))
        with suppress(OSError, ValueError, ZeroDivisionError):
            folder = root / "cpu" / name
            quota, period = (int((folder / f"cpu.cfs_{part}_us").read_text()) for part in ("quota", "period"))
            quotas += [quota / period] * (quota > 0)  # -1 where there is none
    return quotas
