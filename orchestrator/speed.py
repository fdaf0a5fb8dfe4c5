"""How fast a worker trains, and how long a run takes at that speed."""

from dataclasses import dataclass

from workers.config import RunConfig

FORWARD_SHARE = 3
"""A training step costs three forward passes; an evaluation one."""


@dataclass(frozen=True)
class Speed:
    """Of one worker, while it trains."""

    images_per_second: float
    source: str
    """How it is known: measured here, by past runs, given as images/s, or given as MFU."""
    with_data: bool = False
    """A real loop had it, which waited for its data, too."""


def training_flops_per_image(config: RunConfig) -> int:
    """That are computed."""
    return FORWARD_SHARE * config.model.computed_flops


def speed_at(mfu: float, peak_flops: float, config: RunConfig) -> Speed:
    """At that share of a device's peak per second."""
    rate = float(f"{mfu * peak_flops / training_flops_per_image(config):.4g}")
    return Speed(rate, f"given as {mfu:.0%} MFU")


def num_evaluations(config: RunConfig, images: int) -> int:
    return max(1, images // config.train.eval_every_images)


def work_seconds(
    images: int, evaluations: int, num_validation: int, images_per_second: float, workers: int
) -> float:
    """Of training and evaluations alone."""
    return (images + evaluations * num_validation / FORWARD_SHARE) / (images_per_second * workers)


def model_label(config: RunConfig) -> str:
    return f"{config.model.family} {config.model.size}"
