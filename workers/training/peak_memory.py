"""The most memory that training has held: of a GPU as torch counts it, elsewhere resident."""

import contextlib
import re
import resource
from collections.abc import Iterable
from pathlib import Path

import torch

from workers.hardware_label import cpu_label, gpu_label

PROCESS = Path("/proc/self")


def reset_peak(device: torch.device) -> None:
    """Counting starts anew; where the system does not let it, it goes on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")


def peak_bytes(device: torch.device, readers: Iterable[int] = ()) -> int:
    """Since `reset_peak`; `readers`: other processes' ids, whose memory counts where it is not a GPU's."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    own = _high_water(PROCESS) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return own + sum(_high_water(PROCESS.with_name(str(pid))) for pid in readers)


def _high_water(process: Path) -> int:
    """Resident bytes; 0 where the system does not tell."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
    except OSError:
        found = None
    return int(found[1]) << 10 if found else 0


def hardware_label(device: torch.device, cores: int) -> str:
    """As plans name it."""
    return gpu_label(torch.cuda.get_device_name(device)) if device.type == "cuda" else cpu_label(cores)
