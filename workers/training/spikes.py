"""Losses that rise all at once and stay high: found at a report, so that the run goes back behind them.

A step is suspect if its loss is far above those of the steps before: by so many robust standard deviations
(1.4826 times the median absolute deviation from the median), and by half of the median. The anchor is
OLMo-core's StabilityMonitor (6 standard deviations over 128 steps), which counts such steps and does
nothing; where a step back is at stake, one batch with wrong labels is not to be enough. So several suspect
steps in a row make a spike. Median and deviation do not move for what is suspect, and a rise below half of
the median is none: late in training deviations are small, and so are 8 of them.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from workers.config import TrainConfig
from workers.training.commits import Window
from workers.training.meter import StepResult

HISTORY = 128
"""Good steps with which one is compared; before there are so many, none is suspect."""
RISE = 1.5
"""Times the median: the least loss that is suspect."""
NORMAL = 1.4826
"""Standard deviations of a normal distribution in one median absolute deviation."""


@dataclass(frozen=True)
class Spike:
    window: Window
    losses: list[float]
    """Of its steps, as far as they were finite."""
    median: float
    """Of the steps before."""


@dataclass
class LossHistory:
    """What decides of the next steps; every manifest has it, so that a restart changes no decision."""

    losses: list[float] = field(default_factory=list)
    """Of the last good steps, the newest last."""
    suspects: list[tuple[int, float]] = field(default_factory=list)
    """Step and loss of the suspect ones since."""

    def to_json(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "suspects": list(self.suspects)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        suspects = [(int(step), float(loss)) for step, loss in values.get("suspects", ())]
        return cls(list(values.get("losses", ())), suspects)

    def find(self, results: Sequence[StepResult], train: TrainConfig) -> Spike | None:
        """Enter the newest steps; the first spike among them, if there is one. It need not be over yet."""
        if train.spike_sigmas is None:
            return None
        for result in results:
            if result.bad:
                continue  # it has changed nothing: neither a sign of a spike nor of its end
            if self._is_suspect(result.loss, train.spike_sigmas):
                self.suspects.append((result.step, result.loss))
                continue
            if spike := self._spike(train.spike_steps):
                return spike
            passed = [loss for _, loss in self.suspects]
            self.losses = [*self.losses, *passed, result.loss][-HISTORY:]
            self.suspects = []
        return self._spike(train.spike_steps)

    def _is_suspect(self, loss: float, sigmas: float) -> bool:
        if len(self.losses) < HISTORY:
            return False
        median = statistics.median(self.losses)
        if loss <= RISE * median:
            return False
        deviation = statistics.median(abs(other - median) for other in self.losses)
        return loss > median + sigmas * NORMAL * deviation

    def _spike(self, least: int) -> Spike | None:
        if len(self.suspects) < least:
            return None
        window = Window(self.suspects[0][0], self.suspects[-1][0])
        return Spike(window, [loss for _, loss in self.suspects], statistics.median(self.losses))
