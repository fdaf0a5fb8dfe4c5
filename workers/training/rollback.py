"""A step back behind a spike: told, and refused when there were too many."""

from collections.abc import Sequence

from workers.config import RunConfig
from workers.data.mixture import Source
from workers.errors import ConfigError
from workers.training.commits import Window
from workers.training.metrics import EventWriter
from workers.training.spikes import Spike
from workers.training.step_samples import name_samples

SHOWN = 64
"""Losses that the event lists."""


def announce(
    spike: Spike,
    config: RunConfig,
    sources: Sequence[Source],
    skipped: Sequence[Window],
    events: EventWriter | None,
) -> None:
    """Rank 0 writes a `roll_back` event; ConfigError, on all ranks alike, if there may not be
    more of them than `skipped`."""
    first, last = spike.window
    if len(skipped) >= config.train.max_rollbacks:
        before = ", ".join(str(window) for window in (*skipped, spike.window))
        raise ConfigError(
            f"train.max_rollbacks: the loss of {config.run} rose from {spike.median:.4g} to "
            f"{max(spike.losses):.4g} in step {spike.window}, and {len(skipped)} times before "
            f"it went back behind such a rise ({before}); look at the samples that the run's `roll_back` "
            f"events name, choose an optim.learning_rate below {config.optim.learning_rate}, or allow more"
        )
    if events:
        events.write(
            "roll_back",
            (last + 1) * config.train.global_batch_size,
            first_step=first,
            last_step=last,
            losses=spike.losses[:SHOWN],
            median=spike.median,
            samples=name_samples(sources, range(first, last + 1)),
        )
        events.flush()
