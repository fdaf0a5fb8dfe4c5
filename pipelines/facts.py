"""What a recipe has to know of a data set, and the parts of a `RunConfig` that follow from it."""

import math
from dataclasses import dataclass

from workers.config import AugmentConfig, DataConfig, TrainConfig
from workers.data.index import DatasetIndex
from workers.errors import ConfigError
from workers.storage import join_url


@dataclass(frozen=True)
class DataFacts:
    url: str
    validation_url: str
    fingerprint: str
    validation_fingerprint: str
    num_images: int
    """For training."""
    classes: tuple[str, ...]

    def images(self, epochs: float) -> int:
        """So many passes over the training images, at least one image."""
        if not 0 < epochs < math.inf:
            raise ConfigError(f"epochs: expected a number above 0, got {epochs}")
        return max(1, round(epochs * self.num_images))

    def config(self, augment: AugmentConfig, *, lanes: int = 8) -> DataConfig:
        return DataConfig(
            url=self.url,
            validation_url=self.validation_url,
            fingerprint=self.fingerprint,
            validation_fingerprint=self.validation_fingerprint,
            augment=augment,
            lanes=lanes,
        )

    def training(
        self, images: int, *, global_batch_size: int, eval_epochs: int, checkpoint_epochs: int
    ) -> TrainConfig:
        return TrainConfig(
            images=images,
            global_batch_size=global_batch_size,
            eval_every_images=eval_epochs * self.num_images,
            checkpoint_every_images=checkpoint_epochs * self.num_images,
            log_every_images=max(global_batch_size, min(50 * global_batch_size, self.num_images // 2)),
        )


def read_facts(root: str) -> DataFacts:
    """Of a data set as `vitscale ingest` leaves it: `root/train` and `root/val`, each with its index."""
    return facts_at(join_url(root, "train"), join_url(root, "val"))


def facts_at(url: str, validation_url: str) -> DataFacts:
    train, validation = DatasetIndex.open(url), DatasetIndex.open(validation_url)
    if train.classes != validation.classes:
        raise ConfigError(f"{url} and {validation_url} name different classes; index both with the same ones")
    return DataFacts(
        url=train.source,
        validation_url=validation.source,
        fingerprint=train.fingerprint,
        validation_fingerprint=validation.fingerprint,
        num_images=train.num_samples,
        classes=train.classes,
    )
