"""Properties of this machine, without importing torch, which takes seconds."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError, shown

MIB = 1 << 20
DRIVER_FIX = "restart the machine or install the driver again, or set CUDA_VISIBLE_DEVICES= to do without"
# attention kernel -> modules that provide it; torch's own need none
KERNELS = {"fa2": ("flash_attn",), "fa3": ("flash_attn_interface", "fa3_fwd_interface")}
CUDA_DRIVERS = {11: 450, 12: 525, 13: 580}  # oldest driver of each CUDA, on Linux


@dataclass(frozen=True)
class Gpu:
    """One GPU, as described by its driver; sizes in bytes."""

    name: str
    memory: int | None  # None: it shares the host's memory
    free: int
    driver: str
    capability: str  # compute capability, "9.0"


def gpus() -> list[Gpu]:
    """GPUs that are visible to a new process; [] without a driver. Raises UserError if the driver does not work."""
    tool = shutil.which("nvidia-smi")
    if tool is None or os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return []
    query = "--query-gpu=name,memory.total,memory.free,driver_version,compute_cap"
    try:
        run = subprocess.run([tool, query, "--format=csv,noheader,nounits"], capture_output=True, timeout=5)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"nvidia-smi does not answer within {error.timeout:.0f} s; {DRIVER_FIX}") from error
    except OSError as error:
        raise UserError(f"nvidia-smi cannot be started ({error.strerror}); {DRIVER_FIX}") from error
    lines = run.stdout.decode(errors="replace").strip().splitlines()
    if run.returncode and any("No devices were found" in line for line in lines):
        return []
    rows = [[part.strip() for part in line.rsplit(",", 4)] for line in lines]
    if run.returncode or any(len(row) != 5 for row in rows):
        output = lines or run.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise UserError(f"nvidia-smi says: {shown(output[0])}; {DRIVER_FIX}")
    return _visible([_gpu(*row) for row in rows])


def _gpu(name: str, memory: str, free: str, driver: str, capability: str) -> Gpu:
    """From a row of nvidia-smi; a GPU that shares the host's memory has no numbers for memory."""
    known = memory.isdecimal() and free.isdecimal()
    return Gpu(name, int(memory) * MIB if known else None, int(free) * MIB if known else 0, driver, capability)


def _visible(all_gpus: list[Gpu]) -> list[Gpu]:
    """The GPUs in CUDA_VISIBLE_DEVICES, if it lists them by number."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return all_gpus
    numbers = [name.strip() for name in names.split(",") if name.strip()]
    if not all(number.isdecimal() for number in numbers):
        return [] if numbers == ["-1"] else all_gpus[: len(numbers)]
    return [all_gpus[int(number)] for number in numbers if int(number) < len(all_gpus)]


def torch_build() -> tuple[str, str | None]:
    """Version of torch and of the CUDA that it was built with (None = CPU only); ("", None) without torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "", None
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    cuda = re.search(r"^cuda\s*(?::[^=]*)?=\s*'([\d.]+)'", text, re.MULTILINE)
    return importlib.metadata.version("torch"), cuda.group(1) if cuda else None


def kernels() -> list[str]:
    """Attention kernels that are installed, torch's own first."""
    return ["sdpa", "cudnn", *(n for n, parts in KERNELS.items() if any(importlib.util.find_spec(p) for p in parts))]


def driver_is_old(driver: str, cuda: str) -> bool:
    """Whether a driver is too old for this version of CUDA; False if its version is unknown."""
    major = int(cuda.split(".")[0])
    own = driver.split(".")[0]
    return own.isdecimal() and int(own) < CUDA_DRIVERS.get(major, 0)


def size_text(size: float) -> str:
    """Bytes as text with a suitable unit: `31.6 GiB`, `7.2 MiB`, `0.5 KiB`."""
    unit, power = next(u for u in (("GiB", 30), ("MiB", 20), ("KiB", 10)) if size >= 0.1 * (1 << u[1]) or u[1] == 10)
    return f"{size / (1 << power):.1f} {unit}"


def host_memory() -> int:
    """Bytes of the machine's memory; 0 if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemTotal:")), 0)


def free_space(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())).free


def python_version() -> str:
    return platform.python_version()
