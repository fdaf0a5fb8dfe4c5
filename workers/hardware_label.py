"""What a worker computes on, by a name that is the same for all machines of a kind."""

import platform
from pathlib import Path

from workers.gpus import find_gpu


def gpu_label(name: str) -> str:
    """Of a GPU as torch or Ray names it."""
    gpu = find_gpu(name)
    return gpu.name if gpu else name


def cpu_label(cores: int) -> str:
    """Of so many cores of this machine."""
    return f"{cores} x {_cpu_name()}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
