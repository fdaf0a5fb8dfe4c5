"""What a study may take, in FLOPs, hours or money; what becomes of one that would take more."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from workers.errors import ConfigError
from workers.part import Part

if TYPE_CHECKING:
    from pipelines.scaling.cost import Total
    from pipelines.scaling.rungs import Rung


class Budget(Part):
    flops: float | None = Field(default=None, gt=0)
    """Of training."""
    hours: float | None = Field(default=None, gt=0)
    """Until all is done, on the devices of the study's hardware."""
    device_hours: float | None = Field(default=None, gt=0)
    money: float | None = Field(default=None, gt=0)
    """Device-hours at the hardware's price."""
    over: Literal["refuse", "trim"] = "refuse"
    """Of a study that would take more: refuse it, or leave out its most expensive rungs."""

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if not any((self.flops, self.hours, self.device_hours, self.money)):
            raise ValueError("a budget needs flops, hours, device_hours or money")
        return self

    def excess(self, total: "Total") -> str:
        """What is too much, in words; "" if nothing is. ConfigError if it cannot be told."""
        limits = {"flops": self.flops, "hours": self.hours, "device_hours": self.device_hours}
        taken = {"flops": float(total.flops), "hours": total.hours, "device_hours": total.device_hours}
        limits["money"], taken["money"] = self.money, total.price
        for name, limit in limits.items():
            value = taken[name]
            if limit is None:
                continue
            if value is None:
                if name == "money" and total.hours is not None:
                    raise ConfigError("budget.money: needs hardware.price_per_device_hour")
                raise ConfigError(
                    f"budget.{name}: needs a speed of every model: hardware.images_per_second, or "
                    "hardware.mfu with hardware.peak_tflops"
                )
            if value > limit:
                return f"{_number(value)} {name} of budget.{name} {_number(limit)}"
        return ""


@dataclass(frozen=True)
class Verdict:
    kept: "list[Rung]"
    left_out: "list[Rung]"
    text: str
    """What was decided, for people; "" without a budget."""


def settle(budget: Budget | None, rungs: "Sequence[Rung]", total: "Callable[[list[Rung]], Total]") -> Verdict:
    """The rungs within the budget. ConfigError if it is to refuse, or if nothing would be left."""
    kept = list(rungs)
    if budget is None:
        return Verdict(kept, [], "")
    whole = excess = budget.excess(total(kept))
    if excess and budget.over == "refuse":
        raise ConfigError(f"the study would take {excess}; ask for less, or say budget.over: trim")
    by_price = sorted(
        {rung.unit for rung in rungs},
        key=lambda unit: _flops(total, kept, unit),
        reverse=True,
    )
    for unit in by_price:
        if not excess:
            break
        kept = [rung for rung in kept if rung.unit != unit]
        excess = budget.excess(total(kept)) if kept else ""
    if not kept:
        raise ConfigError(f"budget: not one rung fits; the study would take {whole}")
    left_out = [rung for rung in rungs if rung not in kept]
    if not left_out:
        return Verdict(kept, [], "the study is within its budget")
    return Verdict(
        kept,
        left_out,
        f"trimmed: the study would take {whole}; {len(left_out)} of its {len(rungs)} rungs are left out, "
        "those of the most FLOPs",
    )


def _flops(total: "Callable[[list[Rung]], Total]", rungs: "list[Rung]", unit: str) -> int:
    return total([rung for rung in rungs if rung.unit == unit]).flops


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.3e}"
