"""What a model's head sees of images, of a few of each class or of a whole data set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from workers.data.index import DatasetIndex
from workers.data.quarantine import Ledger
from workers.data.samples import Samples
from workers.data.shards import Shard
from workers.data.stream import validation_batches
from workers.evaluation.fewshot import draw
from workers.model_config import ModelConfig
from workers.storage import Store
from workers.training.evaluate import PREFETCH_BATCHES, normalize, to_device

LABEL_ROWS = 1 << 18
"""Of the index, read at a time: 16 MB."""


@torch.no_grad()
def extract_features(
    model: nn.Module,
    config: ModelConfig,
    data: Samples,
    *,
    batch_size: int,
    max_bad_fraction: float,
    device: torch.device,
    decode_threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """float32 (n, D), what `model.head` is given of each image, and labels, int64 (n,); on the device.

    By one process, in the order of the data, without damaged images.
    """
    seen: list[Tensor] = []
    head = model.get_submodule("head")
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].float()))
    training = model.training
    model.eval()
    features, labels, kept = [], [], []
    batches = validation_batches(
        data,
        batch_size=batch_size,
        rank=0,
        world_size=1,
        image_size=config.image_size,
        channels=config.channels,
        ledger=Ledger(data.num_samples, max_bad_fraction),
        prefetch=PREFETCH_BATCHES,
        decode_threads=decode_threads,
    )
    try:
        for number, batch in enumerate(batches, start=1):
            model(normalize(to_device(batch.images, device)))
            features.append(seen.pop())
            labels.append(batch.labels)
            kept.append(batch.weights > 0)
            if progress:
                progress(min(number * batch_size, data.num_samples), data.num_samples)
    finally:
        hook.remove()
        model.train(training)
    used = torch.cat(kept)
    return torch.cat(features)[used.to(device)], torch.cat(labels)[used].to(device)


def some_of_each_class(index: DatasetIndex, count: int, seed: int) -> "Chosen":
    """Up to `count` samples of each class, drawn from all.

    Reads the labels of all samples, 64 bytes of the index for each, and nothing else.
    """
    labels = np.empty(index.num_samples, np.int64)
    for start in range(0, index.num_samples, LABEL_ROWS):
        part = slice(start, min(start + LABEL_ROWS, index.num_samples))
        labels[part] = index.records(part.start, part.stop - part.start)[1]["label"]
    return Chosen(index, draw(labels, count, seed))


@dataclass(frozen=True, eq=False)
class Chosen:
    """Some samples of a data set, as a data set."""

    index: DatasetIndex
    ordinals: npt.NDArray[np.int64]
    """Ascending."""

    @property
    def url(self) -> str:
        return self.index.url

    @property
    def fingerprint(self) -> str:
        return self.index.fingerprint

    @property
    def num_samples(self) -> int:
        return len(self.ordinals)

    @property
    def num_bytes(self) -> int:
        return self.index.num_bytes * len(self.ordinals) // self.index.num_samples

    @property
    def id_sum(self) -> int:
        raise NotImplementedError("no epoch of these is proved")

    @property
    def shards(self) -> Sequence[Shard]:
        return self.index.shards

    def fetch_rows(
        self, ordinals: npt.NDArray[np.int64], store: Store | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        return self.index.fetch_rows(self.ordinals[ordinals], store)
