"""Images to WebDataset shards with their index: `train/` and `val/` below a destination.

    vitscale ingest digits file:///data/digits
    vitscale ingest photos/ s3://data/photos

The same images and options give byte-identical shards, so the same fingerprints. Every image is decoded
before the first shard is written; image bytes are copied unmodified.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.sources import Examined, Item, Source, digest_of, examine, open_source
from workers.data.index import DatasetIndex
from workers.data.indexing import build_index
from workers.errors import ConfigError, DataError
from workers.storage import NotFound, Store, join_url, open_store

FORMAT = 1
MARKER = "_vitscale/ingest.json"
"""Says first that all below the destination is ours to redo, and last that it is complete."""
MIN_SHARDS = 4
"""Of a split that has as many images: readers share out shards."""
SHOWN = 10
"""Unreadable images that an error lists."""


@dataclass(frozen=True)
class IngestReport:
    destination: str
    num_train: int
    num_validation: int
    classes: tuple[str, ...]
    num_shards: int
    bytes: int
    """Of all shards."""
    train_fingerprint: str
    validation_fingerprint: str
    num_duplicates: int
    """Images whose bytes occur under another name too; they lie on the same side of the split."""
    conflicts: tuple[str, ...]
    """Those among them that have another label."""
    skipped: tuple[str, ...]
    """Unreadable images, with the reasons."""

    @property
    def train_url(self) -> str:
        return join_url(self.destination, "train")

    @property
    def validation_url(self) -> str:
        return join_url(self.destination, "val")


def ingest(
    source: str | Path,
    destination: str,
    *,
    validation: float = 0.2,
    shard_bytes: int = 64 << 20,
    limit: int | None = None,
    skip_unreadable: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> IngestReport:
    """Shards of a folder per class, a tar of `<name>_<label>.jpg` members, or the built-in `"digits"`.

    `validation` is the share held out; the digest of an image's bytes decides, so the same image is
    always on the same side. `limit` takes that many images, spread over all classes. A destination that
    is complete is recognised and left alone; an interrupted one is begun anew; any other is refused.
    `progress(done, total)` counts each image twice: examined and written.
    """
    if not 0 < validation < 1:
        raise ConfigError(f"validation: expected a share between 0 and 1, got {validation}")
    if shard_bytes <= 0 or (limit is not None and limit <= 0):
        raise ConfigError(f"shard_bytes and limit: expected positive numbers, got {shard_bytes} and {limit}")
    store = open_store(destination)
    marker = _read_marker(store)
    opened = _limited(open_source(source), limit)
    complete = marker is not None and marker["report"] is not None
    examined = examine(opened.items, decode=not complete, progress=progress)
    options = {"validation": validation, "shard_bytes": shard_bytes, "skip_unreadable": skip_unreadable}
    identity = {"format": FORMAT, "source": _source_digest(examined, opened.classes), **options}
    if marker and complete:
        if marker["identity"] != identity:
            raise ConfigError(
                f"{destination} already holds another data set, or this one with other options; "
                f"choose another destination"
            )
        return _finished(destination, marker["report"])

    readable, skipped = _readable(examined, skip_unreadable)
    splits = _split(readable, opened.classes, validation)
    _begin(store, identity)
    done, total = len(examined), 2 * len(examined)
    indices: dict[str, DatasetIndex] = {}
    for split, images in splits.items():
        names = []
        for number, shard in enumerate(_shards(images, shard_bytes)):
            names.append(f"{split}-{number:06d}.tar")
            _write_shard(store, f"{split}/{names[-1]}", shard, number)
            done += len(shard)
            if progress:
                progress(done, total)
        indices[split] = build_index(join_url(destination, split), classes=opened.classes)
        if [shard.name for shard in indices[split].shards] != names:
            raise DataError(f"{destination}: something else writes there at the same time; ingest again")
    report = _report(destination, indices, readable, skipped)
    values = {name: value for name, value in asdict(report).items() if name != "destination"}
    store.write(MARKER, json.dumps({"identity": identity, "report": values}, indent=1).encode())
    if progress:
        progress(total, total)
    return report


def _read_marker(store: Store) -> dict[str, Any] | None:
    """None if nothing is there; ConfigError if something is that no ingest left."""
    try:
        marker = json.loads(store.read(MARKER))
        return {"identity": marker["identity"], "report": marker["report"]}
    except NotFound:
        if found := next(iter(store.list()), None):
            raise ConfigError(
                f"{store.url} is not empty (it holds {found.key}) and no ingest wrote it; "
                f"choose another destination"
            ) from None
        return None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{join_url(store.url, MARKER)} is damaged; choose another destination") from None


def _begin(store: Store, identity: dict[str, Any]) -> None:
    """From here on all below the destination is ours; what an interrupted ingest left is removed."""
    store.write(MARKER, json.dumps({"identity": identity, "report": None}).encode())
    for info in list(store.list()):
        if info.key != MARKER:
            store.delete(info.key)


def _finished(destination: str, values: dict[str, Any]) -> IngestReport:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    report = IngestReport(destination=destination, **fields)
    expected = {
        report.train_url: report.train_fingerprint,
        report.validation_url: report.validation_fingerprint,
    }
    for url, fingerprint in expected.items():
        if DatasetIndex.open(url).fingerprint != fingerprint:
            raise DataError(f"{url} has changed since it was ingested; choose another destination")
    return report


def _limited(source: Source, limit: int | None) -> Source:
    """The first so many by the digest of their names: the same ones each time, from all classes."""
    if limit is None:
        return source
    items = sorted(source.items, key=lambda item: hashlib.blake2b(os.fsencode(item.name)).digest())
    return Source(items[:limit], source.classes)


def _source_digest(examined: Sequence[Examined], classes: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps(classes).encode())
    for image in examined:
        digest.update(json.dumps([image.item.name, image.item.label, image.digest.hex()]).encode())
    return digest.hexdigest()


def _readable(examined: Sequence[Examined], skip: bool) -> tuple[list[Examined], tuple[str, ...]]:
    problems = tuple(sorted(f"{image.item.name}: {image.problem}" for image in examined if image.problem))
    if problems and not skip:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise DataError(
            "\n  ".join(
                [
                    f"{len(problems)} of {len(examined)} images cannot be read; repair or remove them, "
                    f"or leave them out with --skip-unreadable:",
                    *problems[:SHOWN],
                    *more,
                ]
            )
        )
    return [image for image in examined if not image.problem], problems


def _split(
    images: Sequence[Examined], classes: Sequence[str], validation: float
) -> dict[str, list[Examined]]:
    """`train` and `val`, in the order in which they are written."""
    threshold = int(validation * 2**64)
    splits: dict[str, list[Examined]] = {"train": [], "val": []}
    for image in images:
        held_out = int.from_bytes(image.digest[:8], "little") < threshold
        splits["val" if held_out else "train"].append(image)
    labels = {split: {image.item.label for image in chosen} for split, chosen in splits.items()}
    if len(labels["train"] | labels["val"]) < 2:
        found = ", ".join(classes[label] for label in labels["train"] | labels["val"]) or "none"
        raise DataError(f"a classifier needs images of at least two classes, found: {found}")
    for label in sorted(labels["val"] - labels["train"]):
        raise DataError(
            f"class {classes[label]!r} (label {label}) has images for validation only; "
            f"add images of it, or lower the validation share ({validation})"
        )
    if not splits["val"]:
        raise DataError(f"no image falls to validation; add images, or raise its share ({validation})")
    return splits


def _shards(images: Sequence[Examined], shard_bytes: int) -> Iterator[list[Examined]]:
    most = -(-len(images) // MIN_SHARDS)
    shard: list[Examined] = []
    size = 0
    for image in images:
        # Two headers of 512 bytes, the label's block, and the image padded to whole blocks.
        record = 3 * 512 + -(-image.size // 512) * 512
        if shard and (len(shard) == most or size + record > shard_bytes):
            yield shard
            shard, size = [], 0
        shard.append(image)
        size += record
    yield shard


def _write_shard(store: Store, key: str, images: Sequence[Examined], number: int) -> None:
    with tempfile.TemporaryDirectory(prefix="vitscale-ingest-") as directory:
        path = Path(directory) / "shard.tar"
        try:
            _fill_shard(path, images, number)
        except OSError as error:
            raise DataError(f"cannot write {key} by way of {path}: {error}") from error
        store.upload(key, path)


def _fill_shard(path: Path, images: Sequence[Examined], number: int) -> None:
    from webdataset import TarWriter

    owner = {"user": "vitscale", "group": "vitscale", "mtime": 0}
    with path.open("wb") as file, TarWriter(file, encoder=False, **owner) as writer:
        for place, image in enumerate(images):
            data = image.item.read()
            if digest_of(data) != image.digest:
                raise DataError(f"{image.item.name} changed while it was ingested; ingest again")
            label = str(image.item.label).encode()
            writer.write({"__key__": f"{number:06d}-{place:06d}", image.extension: data, "cls": label})


def _report(
    destination: str,
    indices: dict[str, DatasetIndex],
    images: Sequence[Examined],
    skipped: tuple[str, ...],
) -> IngestReport:
    first: dict[bytes, Item] = {}
    duplicates = [
        (image.item, first[image.digest])
        for image in images
        if first.setdefault(image.digest, image.item) is not image.item
    ]
    shards = [shard for index in indices.values() for shard in index.shards]
    return IngestReport(
        destination=destination,
        num_train=indices["train"].num_samples,
        num_validation=indices["val"].num_samples,
        classes=indices["train"].classes,
        num_shards=len(shards),
        bytes=sum(shard.size for shard in shards),
        train_fingerprint=indices["train"].fingerprint,
        validation_fingerprint=indices["val"].fingerprint,
        num_duplicates=len(duplicates),
        conflicts=tuple(
            f"{item.name} is {other.name}" for item, other in duplicates if item.label != other.label
        ),
        skipped=skipped,
    )
