"""One cell of `train.py`: training steps of all contenders, in turn, in a process of its own.

    python -m tests.benchmarks.train_cell '{"image_size": 64, "batch": 32, ...}'

Prints one line of JSON last.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks import steps
from workers.training.collectives import worker_group
from workers.training.parallel import DTYPES
from workers.training.peak import measured_flops

CPU = torch.device("cpu")
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05}
"""Between ours and timm's at the first step; bfloat16 rounds in other places."""
MIN_ROUNDS, MAX_ROUNDS = 5, 25


@dataclass(frozen=True)
class Cell:
    size: str
    image_size: int
    batch: int
    precision: str
    compiled: bool
    threads: int
    contenders: tuple[str, ...]
    seconds: float
    """Of measuring, if that is more than the fewest rounds take."""


def main() -> None:
    values = json.loads(sys.argv[1])
    cell = Cell(**{**values, "contenders": tuple(values["contenders"])})
    torch.set_num_threads(cell.threads)
    with worker_group(CPU):
        print(json.dumps(measure(cell)))


def measure(cell: Cell) -> dict[str, Any]:
    """Wall and CPU seconds of every step, by contender and round; FLOP/s of a matrix product, by round."""
    contenders = {name: _step(cell, name) for name in cell.contenders}
    batch = steps.random_batch(cell.batch, cell.image_size, CPU)
    losses, warm_up = {}, {}
    for name, step in contenders.items():
        start = time.perf_counter()
        losses[name] = float(step(*batch))
        step(*batch)
        warm_up[name] = time.perf_counter() - start
    _check(losses, cell.precision)
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    ceiling: list[float] = []
    deadline = time.perf_counter() + cell.seconds
    while len(ceiling) < MIN_ROUNDS or (len(ceiling) < MAX_ROUNDS and time.perf_counter() < deadline):
        ceiling.append(measured_flops(CPU, DTYPES[cell.precision]))
        for name, step in contenders.items():
            _time(step, batch, wall[name], cpu[name])
    flops = 3 * _config(cell).model.flops * cell.batch
    return {
        "wall": wall,
        "cpu": cpu,
        "ceiling": ceiling,
        "flops": flops,
        "losses": losses,
        "warm_up": warm_up,
    }


def _time(step: steps.Step, batch: tuple[Tensor, Tensor], wall: list[float], cpu: list[float]) -> None:
    start, used = time.perf_counter(), time.process_time()
    step(*batch)
    wall.append(time.perf_counter() - start)
    cpu.append(time.process_time() - used)


def _step(cell: Cell, name: str) -> steps.Step:
    torch.manual_seed(0)
    if name.startswith("hf-"):
        model = steps.hf_model(cell.size, cell.image_size, name.removeprefix("hf-"))
        return steps.plain_step(model, cell.precision, CPU, compiled=cell.compiled)
    model = steps.timm_model(cell.size, cell.image_size)
    if name == "timm":
        return steps.plain_step(model, cell.precision, CPU, compiled=cell.compiled)
    config = _config(cell)
    ours = steps.our_model(config, model.state_dict())
    return steps.our_step(ours, config, CPU)


def _config(cell: Cell) -> steps.RunConfig:
    return steps.run_config(cell.size, cell.image_size, cell.batch, cell.precision, compiled=cell.compiled)


def _check(losses: Mapping[str, float], precision: str) -> None:
    difference = abs(losses["ours"] - losses["timm"])
    if not difference <= LOSS_TOLERANCE[precision]:
        raise ValueError(f"losses from the same weights differ by {difference}: {losses}")


def as_argument(cell: Cell) -> str:
    return json.dumps(asdict(cell))


if __name__ == "__main__":
    main()
