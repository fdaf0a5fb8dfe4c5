"""The most floating-point operations per second of a device: what MFU is measured against."""

import time

import torch

from workers.gpus import find_gpu

MEASURED_SIDE = 1024
MEASURED_SECONDS = 0.1


def peak_flops(device: torch.device, dtype: torch.dtype, given_tflops: float | None) -> float:
    """Per second, of one device: as given, by its name, or measured by a product of matrices."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type == "cuda":
        gpu = find_gpu(torch.cuda.get_device_name(device))
        peak = gpu.peak_flops("bfloat16" if dtype == torch.bfloat16 else "float32") if gpu else None
        if peak is not None:
            return peak
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
