"""What common GPUs can do, by the vendors' data sheets; without torch."""

from typing import NamedTuple


class Gpu(NamedTuple):
    name: str
    """As torch and Ray name it, or part of that."""
    single_tflops: float
    """float32 without tensor cores."""
    half_tflops: float
    """bfloat16 with them, dense; 0 where it has none."""
    memory_gb: int
    """Of 10^9 bytes; of a model that comes with several sizes, the smallest."""

    def peak_flops(self, precision: str) -> float | None:
        """Per second; None if it does not compute in that precision."""
        tflops = self.half_tflops if precision == "bfloat16" else self.single_tflops
        return tflops * 1e12 or None


GPUS = (
    Gpu("B200", 75.0, 2250.0, 180),
    Gpu("H200", 67.0, 989.0, 141),
    Gpu("H100 PCIe", 51.0, 756.0, 80),
    Gpu("H100", 67.0, 989.0, 80),
    Gpu("A100", 19.5, 312.0, 40),
    Gpu("L40S", 91.6, 362.0, 48),
    Gpu("L4", 30.3, 121.0, 24),
    Gpu("A10", 31.2, 125.0, 24),
    Gpu("V100", 15.7, 0.0, 16),
)


def find_gpu(name: str) -> Gpu | None:
    """The first in the list above whose name is part of this one."""
    return next((gpu for gpu in GPUS if gpu.name in name), None)
