"""The most floating-point operations per second of a device: what MFU is measured against."""

import time

import torch

# Dense, by the vendors' data sheets, TFLOP/s: float32 without tensor cores, bfloat16 with them.
PEAK_TFLOPS = {
    "B200": (75.0, 2250.0),
    "H200": (67.0, 989.0),
    "H100 PCIe": (51.0, 756.0),
    "H100": (67.0, 989.0),
    "A100": (19.5, 312.0),
    "L40S": (91.6, 362.0),
    "L4": (30.3, 121.0),
    "A10": (31.2, 125.0),
    "V100": (15.7, 0.0),
}
MEASURED_SIDE = 1024
MEASURED_SECONDS = 0.1


def peak_flops(device: torch.device, dtype: torch.dtype, given_tflops: float | None) -> float:
    """Per second, of one device: as given, by its name, or measured by a product of matrices."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, (single, half) in PEAK_TFLOPS.items():
            peak = half if dtype == torch.bfloat16 else single
            if known in name and peak:
                return peak * 1e12
    return measured_flops(device, dtype)


def measured_flops(device: torch.device, dtype: torch.dtype, side: int = MEASURED_SIDE) -> float:
    """Of the fastest product of two square matrices, within a tenth of a second: as a linear layer's, for
    which torch has the fastest kernels (50 times faster in bfloat16 on a CPU without AVX-512)."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    best, deadline = float("inf"), time.perf_counter() + MEASURED_SECONDS
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        _ = left @ right.T
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
