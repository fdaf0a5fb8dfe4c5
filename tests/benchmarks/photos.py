"""Shards of photographs for benchmarks, made again byte by byte from the same sources by the same Pillow.

Sources are the Grocery Store photographs below VITSCALE_TEST_DATA or, without that, scikit-learn's two
sample images: random crops of them, scaled to the size of the set, with the noise of a sensor, encoded at
the JPEG quality that gives the mean file size of the set.
"""

import io
import itertools
import json
import multiprocessing
import os
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image

NOISE = 8.0
"""Standard deviation of the noise, of 255. Without it, enlarged photographs need quality 98 for the bytes
of ImageNet's."""


@dataclass(frozen=True)
class PhotoSet:
    about: str
    images: int
    shards: int
    size: tuple[int, int] | None
    """Width and height; None: the sources as they are."""
    mean_bytes: int = 0


SETS = {
    "a": PhotoSet("ImageNet-like, 475x400, 100 KB", 2048, 24, (475, 400), 100_000),
    "b": PhotoSet("1280x960, 230 KB", 2048, 48, (1280, 960), 230_000),
    "warm": PhotoSet("the same, to warm up on", 256, 4, (475, 400), 100_000),
    "small": PhotoSet("256x256, 20 KB", 1024, 8, (256, 256), 20_000),
    "grocery": PhotoSet("Grocery Store photographs as they are, 348 px, 22 KB", 2640, 24, None),
}


def make(name: str, folder: Path) -> list[Path]:
    """The set's shards, made in `folder` unless they are there."""
    photos = SETS[name]
    paths = [folder / f"{name}-{shard:03d}.tar" for shard in range(photos.shards)]
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        samples = _encoded(photos) if photos.size else _packed()
        per_shard = -(-photos.images // photos.shards)
        numbers = itertools.count()
        for path in paths:
            with wds.TarWriter(str(path), mtime=0) as writer:
                for jpeg, label in itertools.islice(samples, per_shard):
                    number = next(numbers)
                    writer.write({"__key__": f"{number:06d}", "jpg": jpeg, "cls": str(label).encode()})
        total = sum(path.stat().st_size for path in paths)
        (folder / "complete").write_text(json.dumps({"images": next(numbers), "bytes": total}))
    return paths


def make_many(folder: Path, *, images: int, shards: int, classes: int, processes: int) -> None:
    """Shards of photographs like set a's in little time: numbered labels, all cores, nothing kept."""
    folder.mkdir(parents=True)
    sources, photos = _sources(), SETS["a"]
    task = _Task(folder, photos, sources, _quality(photos, sources), -(-images // shards), classes)
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        pool.map(task.write, range(shards), chunksize=1)


@dataclass(frozen=True)
class _Task:
    folder: Path
    photos: PhotoSet
    sources: list[tuple[Image.Image, int]]
    quality: int
    per_shard: int
    classes: int

    def write(self, shard: int) -> None:
        with wds.TarWriter(str(self.folder / f"{shard:03d}.tar"), mtime=0) as writer:
            for number in range(shard * self.per_shard, (shard + 1) * self.per_shard):
                image, _ = _photo(self.photos, self.sources, number)
                label = str(number % self.classes).encode()
                jpeg = _jpeg(image, self.quality)
                writer.write({"__key__": f"{number:06d}", "jpg": jpeg, "cls": label})


def read(path: Path) -> Iterator[tuple[str, bytes, int]]:
    """Key, JPEG and label of each sample of a shard that `make` wrote."""
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    for name in files:
        key, _, extension = name.rpartition(".")
        if extension == "jpg":
            yield key, files[name], int(files[f"{key}.cls"])


def _encoded(photos: PhotoSet) -> Iterator[tuple[bytes, int]]:
    sources = _sources()
    quality = _quality(photos, sources)
    for number in range(photos.images):
        image, label = _photo(photos, sources, number)
        yield _jpeg(image, quality), label


def _quality(photos: PhotoSet, sources: list[tuple[Image.Image, int]]) -> int:
    """The smallest that reaches the mean size on 48 images."""
    images = [_photo(photos, sources, number * photos.images // 48)[0] for number in range(48)]
    low, high = 50, 98
    while low < high:
        middle = (low + high) // 2
        mean = sum(len(_jpeg(image, middle)) for image in images) / len(images)
        low, high = (low, middle) if mean >= photos.mean_bytes else (middle + 1, high)
    return low


def _photo(photos: PhotoSet, sources: list[tuple[Image.Image, int]], number: int) -> tuple[Image.Image, int]:
    """A crop of 0.7 to 1.0 of the largest box of the set's shape, noise added."""
    rng = np.random.default_rng(number)
    source, label = sources[number % len(sources)]
    width, height = photos.size
    scale = min(source.width / width, source.height / height) * rng.uniform(0.7, 1.0)
    w, h = width * scale, height * scale
    left, top = rng.uniform(0, source.width - w), rng.uniform(0, source.height - h)
    image = source.resize(photos.size, Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    noise = rng.standard_normal((height, width, 1), np.float32) * NOISE
    pixels = np.asarray(image, np.float32) + noise
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)), label


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def _sources() -> list[tuple[Image.Image, int]]:
    if "VITSCALE_TEST_DATA" in os.environ:
        return [(Image.open(io.BytesIO(jpeg)).convert("RGB"), label) for jpeg, label in _packed()]
    from sklearn.datasets import load_sample_images

    return [(Image.fromarray(image), label) for label, image in enumerate(load_sample_images().images)]


def _packed() -> Iterator[tuple[bytes, int]]:
    """The Grocery Store photographs; members are named <folder>/<number>_<label>.jpg."""
    path = Path(os.environ["VITSCALE_TEST_DATA"], "grocery", "grocery_train.tar")
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                label = member.name.rpartition("_")[2].removesuffix(".jpg")
                yield tar.extractfile(member).read(), int(label)


if __name__ == "__main__":
    target, *counts = sys.argv[1:]
    images_, shards_, classes_, processes_ = map(int, counts)
    make_many(Path(target), images=images_, shards=shards_, classes=classes_, processes=processes_)
