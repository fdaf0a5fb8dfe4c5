"""The data sets of the quality experiments, from the folder that `VITSCALE_TEST_DATA` names.

`grocery`: photographs as they are (shorter side 348 px), for fine-tuning; `grocery-192`: the same pictures
with a shorter side of 192 px, which decode twice as fast, for pretraining at 96 px; `cifar`: 32 px.

A command of its own, because every process that ingests imports its main module, and torch takes seconds.
"""

import argparse
import gzip
import io
import shutil
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipelines.facts import DataFacts, facts_at
from pipelines.ingest import ingest

PACKED_QUALITY = 50
SHARD_BYTES = 16 << 20


@dataclass(frozen=True)
class Recipe:
    """How a data set is made: from which folder, and what `vitscale ingest` is told."""

    folder: str
    tested_on: str
    """Split."""
    options: dict[str, object]


# Quality 75 is what the photographs have, so that doing it again changes next to nothing; packed ones need
# it, since WebP takes several times as long to decode.
RECIPES = {
    "grocery": Recipe("grocery", "test", {"reencode": "jpeg", "quality": 75}),
    "grocery-192": Recipe("grocery", "test", {"reencode": "jpeg", "quality": 85, "resize": 192}),
    "cifar": Recipe("cifar10", "val", {"test_as_validation": True}),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="quality_data", description="Data of the quality experiments.")
    parser.add_argument("source", type=Path, help="folder with grocery/ and cifar10/")
    parser.add_argument("destination", type=Path)
    parser.add_argument("--pack", action="store_true", help="write a small copy, instead of shards")
    parser.add_argument("--limit", type=int, help="images of each data set")
    parser.add_argument("names", nargs="*", help=", ".join(RECIPES))
    options = parser.parse_args(arguments)
    if options.pack:
        pack(options.source, options.destination)
    for name in options.names:
        prepare(name, options.source, options.destination, limit=options.limit)


def prepare(name: str, source: Path, work: Path, *, limit: int | None) -> None:
    """Shards and index below `work`, unless they are there."""
    recipe = RECIPES[name]
    folder = source / recipe.folder
    ingest(folder, _root(name, work), format="tar", shard_bytes=SHARD_BYTES, limit=limit, **recipe.options)


def facts(name: str, work: Path) -> DataFacts:
    """Of what `prepare` has left; it is the test images that accuracies are of."""
    return facts_at(f"{_root(name, work)}/train", f"{_root(name, work)}/{RECIPES[name].tested_on}")


def pack(source: Path, destination: Path) -> None:
    """A copy of 47 MB instead of 114 to carry to another machine: photographs as WebP, CIFAR's tars gzipped.

    That compresses CIFAR's JPEGs fivefold, most of whose bytes are the same tables.
    """
    for path in sorted(source.glob("grocery/*.tar")):
        target = destination / "grocery" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path) as old, tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as new:
            for member in old:
                _add(new, member, old.extractfile(member))
    for path in sorted(source.glob("cifar10/*.tar")):
        target = destination / "cifar10" / f"{path.name}.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as old, gzip.open(target, "wb", compresslevel=9) as new:
            shutil.copyfileobj(old, new)
    for path in (*source.glob("grocery/LICENSE*"), source / "cifar10" / "classes.txt"):
        shutil.copy(path, destination / path.parent.name / path.name)


def _add(tar: tarfile.TarFile, member: tarfile.TarInfo, content: io.BufferedIOBase | None) -> None:
    if content is None:
        return
    buffer = io.BytesIO()
    Image.open(content).convert("RGB").save(buffer, "WEBP", quality=PACKED_QUALITY)
    packed = tarfile.TarInfo(str(Path(member.name).with_suffix(".webp")))
    packed.size = buffer.tell()
    buffer.seek(0)
    tar.addfile(packed, buffer)


def _root(name: str, work: Path) -> str:
    return (work / "data" / name).resolve().as_uri()


if __name__ == "__main__":
    main()
