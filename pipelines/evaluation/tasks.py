"""What a job of an evaluation does, on any node and in any order: parts of the validation set, and extras.

Arguments are plain values, results lie in the store below the evaluation's folder. A part that is there is
not made again, so that a job that was killed goes on where it was.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence

from pipelines.evaluation.measure import Checkpoint, Subject
from workers.data.quarantine import BadSample
from workers.errors import DataError
from workers.evaluation.fewshot import FewShot
from workers.evaluation.predictions import Predictions
from workers.evaluation.table import from_parquet, to_parquet
from workers.evaluation.throughput import Throughput
from workers.part import Part
from workers.storage import NotFound, Store, join_url, open_store

EXTRAS = "extras-"
"""Prefix of the keys of all extras."""
PART_IMAGES = 2048
"""Of a task: some seconds of a GPU, and what is lost with a node."""


class Asked(Part):
    """What every task of an evaluation is told."""

    name: str
    url: str
    """Of the manifest."""
    digest: str
    data: str | None
    fingerprint: str
    """Of the validation set, as the command found it."""
    image_size: int | tuple[int, int]
    batch_size: int
    folder: str
    """URL of what the tasks write."""


class About(Part):
    """A part that is done, beside its predictions."""

    device: str
    bad_samples: tuple[BadSample, ...]


class Extras(Part):
    few_shot: tuple[FewShot, ...]
    throughput: tuple[Throughput, ...]
    device: str


def predict(asked: str, part: int, num_parts: int) -> int:
    """How many images the part has; `asked` is an Asked as JSON."""
    subject, store = _open(asked)
    total = subject.validation.num_samples
    size = (part + 1) * total // num_parts - part * total // num_parts
    with contextlib.suppress(NotFound):
        store.head(_key(part, num_parts))
        return size
    predictions, bad = subject.predict(part, num_parts)
    about = About(device=subject.device_name, bad_samples=tuple(bad))
    store.write(f"{_key(part, num_parts)}.json", about.model_dump_json().encode())
    digest, fingerprint = subject.checkpoint.digest, subject.validation.fingerprint
    store.write(_key(part, num_parts), to_parquet(predictions, digest=digest, fingerprint=fingerprint))
    return size


def measure(asked: str, shots: Sequence[int], throughput: bool) -> int:
    """Few-shot accuracies and throughput, where they are asked for."""
    subject, store = _open(asked)
    extras = Extras(
        few_shot=tuple(subject.few_shot(shots, _no_bar)) if shots else (),
        throughput=tuple(subject.throughput()) if throughput else (),
        device=subject.device_name,
    )
    store.write(extras_key(shots, throughput), extras.model_dump_json().encode())
    return 1


TASKS: dict[str, Callable[..., int]] = {"predict": predict, "measure": measure}


def read_part(asked: Asked, part: int, num_parts: int) -> tuple[Predictions, About]:
    store, key = open_store(asked.folder), _key(part, num_parts)
    predictions = from_parquet(
        store.read(key),
        where=join_url(asked.folder, key),
        digest=asked.digest,
        fingerprint=asked.fingerprint,
    )
    return predictions, About.model_validate_json(store.read(f"{key}.json"))


def extras_key(shots: Sequence[int], throughput: bool) -> str:
    """Two commands at once may ask for different ones."""
    what = hashlib.sha256(repr((list(shots), throughput)).encode()).hexdigest()
    return f"{EXTRAS}{what[:8]}.json"


def read_extras(asked: Asked, shots: Sequence[int], throughput: bool) -> Extras:
    return Extras.model_validate_json(open_store(asked.folder).read(extras_key(shots, throughput)))


@functools.lru_cache(maxsize=1)
def _open(asked: str) -> tuple[Subject, Store]:
    """A process does many parts with one model."""
    values = Asked.model_validate_json(asked)
    checkpoint = Checkpoint(values.name, values.url, values.digest)
    subject = Subject.open(
        checkpoint, data=values.data, image_size=values.image_size, batch_size=values.batch_size
    )
    if subject.validation.fingerprint != values.fingerprint:
        raise DataError(f"{subject.validation.source} was indexed again meanwhile; evaluate again")
    return subject, open_store(values.folder)


def _key(part: int, num_parts: int) -> str:
    return f"{part:05d}-of-{num_parts:05d}.parquet"


@contextlib.contextmanager
def _no_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    yield lambda done, total: None
