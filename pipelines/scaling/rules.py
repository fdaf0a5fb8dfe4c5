"""How a study's learning rates, batches and warm-ups follow from a model and from how long it trains.

A rule is a power law around a point where the value is known. Which power is right is an open question, so
a study states it; the sources below are the ones that people take it from.
"""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from workers.model_config import ModelConfig
from workers.models.resnet_sizes import BiTSize, resnet_size
from workers.part import Part, Positive

RATE_SOURCES = {
    "width": (
        "power 1: Yang et al. 2022 (arXiv 2203.03466, table 8), Adam's rate of hidden matrices under muP; a "
        "smaller power is the study's own choice"
    ),
    "parameters": (
        "no power is established; in Kaplan et al. 2020 (arXiv 2001.08361, appendix D.6) the rate falls with "
        "log(parameters): 0.003239 - 0.0001395 ln N"
    ),
}
BATCH_RATE_SOURCES = {
    "linear": "Goyal et al. 2017 (arXiv 1706.02677), for SGD",
    "sqrt": "Malladi et al. 2022 (arXiv 2205.10287), for Adam",
}
BATCH_SOURCES = {
    "images_seen": "power 0.47: the critical batch grows with the data that is seen, hardly with the model "
    "(Zhang et al. 2024, arXiv 2410.21676)",
    "flops": "power 0.327: Bi et al. 2024 (DeepSeek LLM, arXiv 2401.02954, equation 1), for language models",
}


class RateRule(Part):
    """rate x (x / at)^-power, where x is the model's width or its parameters."""

    rate: float = Field(gt=0)
    """At x = `at`."""
    by: Literal["width", "parameters"]
    at: float = Field(gt=0)
    power: float = Field(ge=0, le=2)
    batch: Literal["linear", "sqrt"] | None = None
    """How it follows a batch that is not `at_batch`."""
    at_batch: int | None = Field(default=None, gt=0)

    def value(self, model: ModelConfig, batch_size: int) -> float:
        x = model_width(model) if self.by == "width" else model.parameters
        rate = self.rate * (x / self.at) ** -self.power
        if self.batch is not None:
            rate *= (batch_size / (self.at_batch or batch_size)) ** (1.0 if self.batch == "linear" else 0.5)
        return round_to(rate, 4)

    def text(self) -> str:
        rule = f"{self.rate:g} x ({self.by} / {self.at:g})^-{self.power:g}"
        return f"{rule}{self._batch_text()}. {RATE_SOURCES[self.by]}{self._batch_source()}"

    def _batch_text(self) -> str:
        factors = {None: "", "linear": " x (batch / {})", "sqrt": " x sqrt(batch / {})"}
        return factors[self.batch].format(self.at_batch or "batch")

    def _batch_source(self) -> str:
        return f"; batch: {BATCH_RATE_SOURCES[self.batch]}" if self.batch else ""


class BatchRule(Part):
    """size x (x / at)^power images, rounded to whole lanes, where x is the images seen or training FLOPs."""

    size: int = Field(gt=0)
    """At x = `at`."""
    by: Literal["images_seen", "flops"]
    at: float = Field(gt=0)
    power: float = Field(ge=0, le=1)

    def value(self, images_seen: int, training_flops: float, lanes: int) -> int:
        x = images_seen if self.by == "images_seen" else training_flops
        size: float = self.size * (x / self.at) ** self.power
        return lanes * max(1, round(size / lanes))

    def text(self) -> str:
        rule = f"{self.size} x ({self.by} / {self.at:g})^{self.power:g}"
        return f"{rule}, in whole lanes. {BATCH_SOURCES[self.by]}"


Rate = Annotated[
    Annotated[float, Tag("a number"), Field(gt=0)] | Annotated[RateRule, Tag("a rule")],
    Discriminator(lambda value: "a rule" if isinstance(value, dict | RateRule) else "a number"),
]
Batch = Annotated[
    Annotated[Positive, Tag("a number")] | Annotated[BatchRule, Tag("a rule")],
    Discriminator(lambda value: "a rule" if isinstance(value, dict | BatchRule) else "a number"),
]


def model_width(model: ModelConfig) -> int:
    """Of a ViT's tokens; of a ResNet, the channels of its first stage."""
    if model.family != "resnet":
        return model.spec.size.width
    size = resnet_size(model.size)
    return 64 * size.width_factor if isinstance(size, BiTSize) else size.width


def round_to(value: float, digits: int) -> float:
    """To so many significant digits: a rate is part of a run's identity, and no machine's last bit is."""
    return float(f"{value:.{digits}g}")
