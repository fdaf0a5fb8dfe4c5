"""Training steps on one GPU, ours and timm's, and what would make ours faster: a table, and JSON in `--out`.

    python -m tests.benchmarks.train_gpu --seconds 200 --out results.json
    python -m tests.benchmarks.train_gpu --tiny           # on a CPU: does everything run?

The most important variants come first, and none is begun after `--seconds`; one that fails, or takes longer
than its limit, is a line in the table. All are at 224 px in bfloat16; see README.md beside this file.
"""

import argparse
import contextlib
import faulthandler
import gc
import itertools
import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.benchmarks import results, steps
from workers.gpus import GPUS
from workers.training.collectives import worker_group
from workers.training.evaluate import normalize
from workers.training.parallel import DTYPES

H100_TFLOPS = next(gpu.half_tflops for gpu in GPUS if gpu.name == "H100")
WARM_UP, TIMED, TRACED = 5, 30, 3
STOCK = "timm, stock"
GRACE = 60.0
"""Seconds after the last variant's limit until the process ends itself, whatever hangs."""
KINDS = {
    "attention": ("flash", "fmha", "sdpa", "attention", "cudnn_generated"),
    "matrix products": ("gemm", "cutlass", "nvjet", "sm90_xmma", "splitk"),
    "optimiser, clipping, copies of parameters": ("multi_tensor", "chunk_cat", "split_with_sizes", "nccl"),
    "fused by the compiler": ("triton",),
    "copies": ("memcpy", "memset", "copy"),
}
"""Kinds of kernels by parts of their names, first match first."""


@dataclass(frozen=True)
class Variant:
    name: str
    size: str
    batch: int
    build: Callable[["Variant", "Place"], steps.Step]
    attention: str = ""
    """The one kernel that attention may use: cudnn or flash."""
    limit: float = 90.0
    """Seconds in all."""
    trace: bool = False
    """Also: where the time goes, by kind of kernel."""


@dataclass(frozen=True)
class Place:
    device: torch.device
    image_size: int
    precision: str


class OutOfTime(Exception):
    pass


def stock(variant: Variant, place: Place) -> steps.Step:
    """timm as its users train it: autocast, the whole model compiled, fused AdamW."""
    model = steps.timm_model(variant.size, place.image_size)
    return steps.plain_step(model, place.precision, place.device, compiled=True)


def timm_like_ours(variant: Variant, place: Place) -> steps.Step:
    """timm's model with all that is ours: blocks compiled, bfloat16 copies of float32 shards, our step."""
    model = steps.timm_model(variant.size, place.image_size)
    return steps.our_step(model, _config(variant, place, compiled=True), place.device)


def ours(variant: Variant, place: Place) -> steps.Step:
    return _ours(variant, place, compiled=True)


def ours_eager(variant: Variant, place: Place) -> steps.Step:
    return _ours(variant, place, compiled=False)


def unsharded(variant: Variant, place: Place) -> steps.Step:
    """Ours without FSDP: blocks compiled, weights cast by autograd in each forward."""
    config = _config(variant, place)
    model = steps.our_model(config, steps.timm_model(variant.size, place.image_size).state_dict())
    for block in model.get_submodule("blocks").children():
        block.compile()
    return steps.plain_step(Cast(model, DTYPES[place.precision]), "float32", place.device)


class Cast(nn.Module):
    """Computes with copies of the weights in another dtype; outputs are float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, images: Tensor) -> Tensor:
        values = {name: value.to(self.dtype) for name, value in self.model.named_parameters()}
        return functional_call(self.model, values, (images.to(self.dtype),)).float()


def lean(variant: Variant, place: Place) -> steps.Step:
    """Our model with nothing around it, compiled whole: what sharding and compiling by block cost."""
    return _lean(variant, place, None)


def lean_graphs(variant: Variant, place: Place) -> steps.Step:
    """The same, replayed as CUDA graphs: what launching kernels costs."""
    return _lean(variant, place, "reduce-overhead")


VARIANTS = (
    Variant("ours", "b", 256, ours, trace=True),
    Variant(STOCK, "b", 256, stock, trace=True),
    Variant("ours", "l", 128, ours, trace=True),
    Variant(STOCK, "l", 128, stock, limit=120),
    Variant("ours, not compiled", "b", 256, ours_eager, limit=30),
    Variant("ours, cuDNN's attention", "b", 256, ours, attention="cudnn", limit=45),
    Variant("ours, flash attention", "b", 256, ours, attention="flash", limit=45),
    Variant("timm, all that is ours", "b", 256, timm_like_ours, limit=60),
    Variant("ours, without FSDP", "b", 256, unsharded, limit=45),
    Variant("ours, without FSDP", "l", 128, unsharded, limit=60),
    Variant("lean, compiled whole", "b", 256, lean, trace=True),
    Variant("ours", "s", 64, ours, limit=45),
    Variant("ours, without FSDP", "s", 64, unsharded, limit=45),
    Variant("lean, CUDA graphs", "s", 64, lean_graphs, limit=60),
    Variant(STOCK, "s", 64, stock, limit=60),
    Variant("ours", "ti", 64, ours, limit=45),
    Variant("ours, without FSDP", "ti", 64, unsharded, limit=45),
    Variant("lean, CUDA graphs", "ti", 64, lean_graphs, limit=60),
    Variant("ours, batch of 128", "b", 128, ours, limit=45),
    Variant("ours, cuDNN's attention", "l", 128, ours, attention="cudnn", limit=60),
    Variant("ours, again", "b", 256, ours, limit=45),
    Variant("timm, all that is ours", "l", 128, timm_like_ours, limit=60),
    Variant("lean, compiled whole", "l", 128, lean, limit=120),
)


def main(arguments: Sequence[str] | None = None) -> None:
    args = _arguments(arguments)
    begin = time.monotonic()
    device = torch.device("cpu" if args.tiny else "cuda")
    place = Place(device, 32, "float32") if args.tiny else Place(device, 224, "bfloat16")
    ceiling = matrix_flops(device, 256 if args.tiny else 8192)
    about = {"device": _device_name(device), "torch": torch.__version__, "ceiling": ceiling, "copy": None}
    if device.type == "cuda":
        about["copy"] = copy_rate(device)
    print(json.dumps(about), flush=True)
    rows: list[dict[str, Any]] = []
    with worker_group(device):
        for variant in VARIANTS:
            left = args.seconds - (time.monotonic() - begin)
            if args.only and f"{variant.size} {variant.name}" not in args.only:
                continue
            rows.append(measured(variant, place, left, args) if left > 0 else _unmeasured(variant))
            print(json.dumps({**rows[-1], "seconds": round(time.monotonic() - begin)}), flush=True)
            if args.out:
                args.out.write_text(json.dumps({**about, "rows": rows}, indent=1))
    print(f"\n{report(about, rows)}")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=200, help="after which no variant is begun")
    parser.add_argument("--out", type=Path, help="JSON of all that was measured")
    parser.add_argument("--only", nargs="*", help="these variants, as 'b ours'")
    parser.add_argument("--tiny", action="store_true", help="ViT-Ti, 32 px, batches of 2, on the CPU")
    args = parser.parse_args(arguments)
    if args.tiny:
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compilers take a minute for each
    return args


def measured(variant: Variant, place: Place, left: float, args: argparse.Namespace) -> dict[str, Any]:
    if args.tiny:
        variant = Variant(variant.name, "ti", 2, variant.build, variant.attention, variant.limit)
    row: dict[str, Any] = _unmeasured(variant)
    del row["error"]
    limit = min(variant.limit, left + GRACE / 2)
    faulthandler.dump_traceback_later(limit + GRACE, exit=True)
    try:
        with _time_limit(limit), _attention(variant.attention):
            row |= time_steps(
                variant, place, warm_up=1 if args.tiny else WARM_UP, timed=2 if args.tiny else TIMED
            )
    except Exception as error:  # noqa: BLE001 - the other variants are still worth measuring
        row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    faulthandler.cancel_dump_traceback_later()
    _clean_up(place.device)
    return row


def time_steps(variant: Variant, place: Place, *, warm_up: int, timed: int) -> dict[str, Any]:
    device = place.device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(0)
    step = variant.build(variant, place)
    batch = steps.random_batch(variant.batch, place.image_size, device)
    start = time.perf_counter()
    losses = [float(step(*batch)) for _ in range(warm_up)]
    compiling = time.perf_counter() - start
    clock = _device_times if cuda else _host_times
    milliseconds, host = clock(lambda: step(*batch), timed)
    model = _config(variant, place).model
    flops = 3 * model.flops * variant.batch
    computed = 3 * (model.flops if "timm" in variant.name else model.computed_flops) * variant.batch
    row = {
        "ms": statistics.median(milliseconds),
        "ms_range": [min(milliseconds), max(milliseconds)],
        "host_ms": host,
        "images_per_second": 1000 * variant.batch / statistics.median(milliseconds),
        "tflops": flops / statistics.median(milliseconds) / 1e9,
        "computed_tflops": computed / statistics.median(milliseconds) / 1e9,
        "warm_up_seconds": compiling,
        "losses": [losses[0], float(step(*batch))],
    }
    if cuda:
        row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        if variant.trace:
            row["kernels_ms"] = traced(lambda: step(*batch))
    return row


def _device_times(step: Callable[[], Tensor], count: int) -> tuple[list[float], float]:
    """Milliseconds of each step on the device; and of the host for one, if it need not wait."""
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    start = time.perf_counter()
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    host = 1000 * (time.perf_counter() - start) / count
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(marks)], host


def _host_times(step: Callable[[], Tensor], count: int) -> tuple[list[float], float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        times.append(1000 * (time.perf_counter() - start))
    return times, statistics.fmean(times)


def traced(step: Callable[[], Tensor]) -> dict[str, float]:
    """Milliseconds of device time per step by kind of kernel, and of the ten longest kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(TRACED):
            step()
        torch.cuda.synchronize()
    kinds: dict[str, float] = {}
    kernels = []
    for event in profile.key_averages():
        milliseconds = event.self_device_time_total / 1000 / TRACED
        name = event.key.lower()
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "others")
        kinds[kind] = kinds.get(kind, 0.0) + milliseconds
        kernels.append((milliseconds, f"{event.key[:90]} x{event.count // TRACED}"))
    longest = {name: milliseconds for milliseconds, name in sorted(kernels, reverse=True)[:14]}
    return {name: round(value, 3) for name, value in {**kinds, **longest}.items()}


def matrix_flops(device: torch.device, side: int) -> float:
    """FLOP/s of a product of random matrices in bfloat16: the mean of ten after three."""
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return 2 * side**3 * 10 / _seconds_of(lambda: left @ right.T, device)


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 4 GiB on the device."""
    source = torch.empty(2**30, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * 4 * 2**30 * 10 / _seconds_of(lambda: target.copy_(source), device)


def _seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Of ten, after three."""
    for _ in range(3):
        action()
    if device.type == "cuda":
        return sum(_device_times(action, 10)[0]) / 1000  # type: ignore[arg-type]
    start = time.perf_counter()
    for _ in range(10):
        action()
    return time.perf_counter() - start


def report(about: Mapping[str, Any], rows: list[dict[str, Any]]) -> str:
    ceiling = about["ceiling"]
    stocks = {(row["size"], row["batch"]): row for row in rows if row["name"] == STOCK and "ms" in row}
    lines = []
    for row in rows:
        if "ms" not in row:
            lines.append((f"{row['size']} {row['batch']} {row['name']}", row["error"][:60], *[""] * 8))
            continue
        base = stocks.get((row["size"], row["batch"]))
        lines.append(
            (
                f"{row['size']} {row['batch']} {row['name']}",
                f"{row['ms']:.2f} ({row['ms_range'][0]:.1f}..{row['ms_range'][1]:.1f})",
                f"{row['images_per_second']:.0f}",
                f"{row['tflops']:.1f}",
                f"{1e12 * row['tflops'] / ceiling:.1%}",
                f"{1e12 * row['computed_tflops'] / ceiling:.1%}",
                f"{row['tflops'] / H100_TFLOPS:.1%}",
                f"{row.get('peak_gib', 0):.1f}" + (f" / {base.get('peak_gib', 0):.1f}" if base else ""),
                f"{base['ms'] / row['ms']:.3f}" if base else "",
                f"{row['warm_up_seconds']:.0f}",
            )
        )
    header = (
        *(
            "size batch variant",
            "ms/step",
            "images/s",
            "TFLOP/s",
            "of ceiling",
            "computed",
            "of 989",
            "GiB / timm's",
        ),
        *("x timm", "warm-up s"),
    )
    rate = f"; copies {about['copy'] / 1e12:.2f} TB/s" if about["copy"] else ""
    first = f"{about['device']}, torch {about['torch']}; ceiling {ceiling / 1e12:.0f} TFLOP/s{rate}"
    kernels = [
        f"{row['size']} {row['name']}, ms by kind: "
        + ", ".join(
            f"{kind} {row['kernels_ms'][kind]:.2f}"
            for kind in (*KINDS, "others")
            if kind in row["kernels_ms"]
        )
        for row in rows
        if "kernels_ms" in row
    ]
    return "\n".join([first, "", results.table(header, lines), "", *kernels])


def _config(variant: Variant, place: Place, *, compiled: bool = False) -> steps.RunConfig:
    return steps.run_config(variant.size, place.image_size, variant.batch, place.precision, compiled=compiled)


def _ours(variant: Variant, place: Place, *, compiled: bool) -> steps.Step:
    config = _config(variant, place, compiled=compiled)
    weights = steps.timm_model(variant.size, place.image_size).state_dict()
    return steps.our_step(steps.our_model(config, weights), config, place.device)


def _lean(variant: Variant, place: Place, mode: str | None) -> steps.Step:
    """A bfloat16 model; float32 weights, gradients and moments beside it."""
    config, device = _config(variant, place), place.device
    weights = steps.timm_model(variant.size, place.image_size).state_dict()
    model = steps.our_model(config, weights).to(device)
    masters = [nn.Parameter(value.detach().clone()) for value in model.parameters()]
    values = list(model.to(DTYPES[place.precision]).parameters())
    for master in masters:
        master.grad = torch.empty_like(master)
    optimizer = steps.adamw(masters)
    forward = torch.compile(model, mode=mode)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        if mode is not None:
            torch.compiler.cudagraph_mark_step_begin()
        loss = F.cross_entropy(forward(normalize(images).to(values[0].dtype)).float(), labels)
        loss.backward()
        with torch.no_grad():
            torch._foreach_copy_([master.grad for master in masters], [value.grad for value in values])
            nn.utils.clip_grad_norm_(masters, steps.CLIP)
            optimizer.step()
            torch._foreach_copy_(values, masters)
        for value in values:
            value.grad = None
        return loss.detach()

    return step


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def out_of_time(number: int, frame: object) -> None:
        raise OutOfTime(f"after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _attention(only: str) -> Iterator[None]:
    """For what is compiled here, too: the kernel is chosen when the compiler sees the call."""
    switches = {
        "cudnn": torch.backends.cuda.enable_cudnn_sdp,
        "flash": torch.backends.cuda.enable_flash_sdp,
        "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
        "math": torch.backends.cuda.enable_math_sdp,
    }
    if only:
        for name, switch in switches.items():
            switch(name == only)
    try:
        yield
    finally:
        for switch in switches.values():
            switch(True)


def _unmeasured(variant: Variant) -> dict[str, Any]:
    return {"name": variant.name, "size": variant.size, "batch": variant.batch, "error": "not begun"}


def _clean_up(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else results.machine()


if __name__ == "__main__":
    main()
