"""What a study is to run on, as far as its time and price depend on it."""

from pydantic import Field

from orchestrator.speed import Speed, model_label, speed_at
from workers.config import RunConfig
from workers.part import Part


class Hardware(Part):
    """Stated in the study's file, so that a budget means the same wherever it is read."""

    devices: int = Field(default=1, gt=0)
    """Workers that the cluster has room for at a time."""
    price_per_device_hour: float | None = Field(default=None, ge=0)
    """In whatever currency."""
    images_per_second: dict[str, float] = Field(default_factory=dict)
    """Of one worker that trains, by family and size: {"vit ti": 1200}; `--measure` tells them."""
    mfu: float | None = Field(default=None, gt=0, le=1)
    """For models without such a figure: the share of a device's peak that training reaches."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Of a device, dense, in the precision of the runs."""
    start_seconds: float = Field(default=10.0, ge=0)
    """What a trial takes before its first step."""

    def speed(self, config: RunConfig) -> Speed | None:
        """None if nothing says it."""
        found = self.images_per_second.get(model_label(config))
        if found is not None:
            return Speed(found, "given as images/s")
        if self.mfu is None or self.peak_tflops is None:
            return None
        return speed_at(self.mfu, self.peak_tflops * 1e12, config)
