"""The images that models are probed with."""

from torch import Tensor

from workers.data.quarantine import Ledger
from workers.data.samples import Samples
from workers.data.stream import validation_batches
from workers.errors import DataError
from workers.model_config import ModelConfig


def first_images(data: Samples, model: ModelConfig, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` images of a data set as the model sees them, uint8 (B, C, H, W), and their labels.

    Damaged ones are left out; B is less where there are fewer. DataError if none is left.
    """
    batch = next(
        validation_batches(
            data,
            batch_size=min(count, data.num_samples),
            rank=0,
            world_size=1,
            image_size=model.image_size,
            channels=model.channels,
            ledger=Ledger(data.num_samples, max_fraction=1.0),
            prefetch=1,
        )
    )
    used = batch.weights > 0
    if not used.any():
        raise DataError(f"none of the first {len(used)} images can be read")
    return batch.images[used], batch.labels[used]
