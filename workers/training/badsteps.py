"""Steps whose loss or gradient was not finite: named, counted, and too many at some point.

The step itself has left them out already, see `train_step`; here the host learns of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from workers.config import RunConfig
from workers.data.mixture import Source
from workers.errors import ConfigError
from workers.training.meter import StepResult
from workers.training.metrics import EventWriter
from workers.training.step_samples import name_samples

MAX_SHARE = 0.01
"""Of a run's steps that may be bad in all, where that is more than `train.max_bad_steps`."""
SHOWN = 3
"""Bad steps that an error lists."""


@dataclass
class BadSteps:
    """Of one run's lineage; every manifest has `steps`, so that a restart forgets none."""

    config: RunConfig
    sources: Sequence[Source]
    steps: list[int] = field(default_factory=list)
    """Ascending."""
    _last: list[StepResult] = field(default_factory=list)

    def settle(self, results: Sequence[StepResult], events: EventWriter | None) -> None:
        """Enter the bad ones of these, the newest steps; ConfigError, on all ranks alike, if they are too
        many now."""
        bad = [result for result in results if result.bad]
        batch_size = self.config.train.global_batch_size
        for result in bad:
            self.steps.append(result.step)
            if events:
                events.write(
                    "bad_step",
                    (result.step + 1) * batch_size,
                    step=result.step,
                    loss=str(result.loss),
                    gradient_norm=str(result.gradient_norm),
                    count=len(self.steps),
                    samples=name_samples(self.sources, range(result.step, result.step + 1)),
                )
        if bad:
            self._last = [*self._last, *bad][-SHOWN:]
            self._check()

    def _check(self) -> None:
        train = self.config.train
        limit = max(train.max_bad_steps, int(MAX_SHARE * self.config.num_steps))
        if longest_row(self.steps) <= train.max_bad_steps and len(self.steps) <= limit:
            return
        last = "; ".join(
            f"step {result.step}: loss {result.loss}, gradient norm {result.gradient_norm}"
            for result in self._last
        )
        raise ConfigError(
            f"optim.learning_rate: {self.config.run} diverged before image "
            f"{(self.steps[-1] + 1) * train.global_batch_size}: {len(self.steps)} of its steps were not "
            f"finite ({last}); train.max_bad_steps {train.max_bad_steps} allows so many in a row, and "
            f"{limit} in all; choose less than {self.config.optim.learning_rate}, or a longer "
            "optim.warmup_images"
        )


def longest_row(steps: Sequence[int]) -> int:
    """Of consecutive numbers among ascending ones."""
    longest = row = 0
    for at, step in enumerate(steps):
        row = row + 1 if at and steps[at - 1] == step - 1 else 1
        longest = max(longest, row)
    return longest
