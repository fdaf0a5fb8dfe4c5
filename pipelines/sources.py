"""What can be ingested, and whether its images can be read.

A source is a folder per class, a tar of `<name>_<label>.jpg` members, or scikit-learn's digits.
"""

import functools
import hashlib
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from workers.data.tar import walk
from workers.errors import ConfigError, DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SPLITS = {"train", "training", "val", "valid", "validation", "test"}
LABELLED = re.compile(r"_(\d{1,9})\.[a-z]+$", re.IGNORECASE)
PIECE_BYTES = 8 << 20
THREADS = min(8, os.cpu_count() or 1)
WINDOW = 1024
"""Images queued for examination at a time."""
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""By what the bytes are, whatever the file is called."""
UNREADABLE = (
    *(OSError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError),
    *(SyntaxError, RuntimeError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow's decoders raise on damaged files."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source."""

    name: str
    """Where a person finds it."""
    label: int
    read: Callable[[], bytes]
    """Its file's bytes, unmodified."""


@dataclass(frozen=True, slots=True)
class Source:
    items: list[Item]
    classes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Examined:
    item: Item
    digest: bytes
    """blake2b-16 of the image's bytes: the first half decides the split, the second the order."""
    size: int
    extension: str
    problem: str = ""
    """Why it cannot be decoded."""


def open_source(source: str | Path) -> Source:
    """`"digits"`, a folder or a tar; ConfigError or DataError if it holds no labelled images."""
    if source == "digits":
        return _digits()
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _tar(path)
    raise ConfigError(f"source {str(source)!r}: no such file or folder")


def examine(
    items: Sequence[Item], *, decode: bool, progress: Callable[[int, int], None] | None = None
) -> list[Examined]:
    """Digest each image and, if asked, decode it whole; in the order of their digests.

    `progress(done, total)` counts these as half of the work."""
    examined: list[Examined] = []
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        # Pillow warns of oddities that it reads all the same; too many pixels are refused in _decode.
        warnings.simplefilter("ignore")
        for start in range(0, len(items), WINDOW):
            batch = items[start : start + WINDOW]
            for image in pool.map(functools.partial(_examine_one, decode=decode), batch):
                examined.append(image)
                if progress and len(examined) % 16 == 0:
                    progress(len(examined), 2 * len(items))
    return sorted(examined, key=lambda image: (image.digest[8:], image.item.name))


def digest_of(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _examine_one(item: Item, *, decode: bool) -> Examined:
    data = b""
    extension = problem = ""
    try:
        data = item.read()
        extension = _decode(data) if decode else ""
    except UnidentifiedImageError:
        problem = "not a JPEG, PNG or WebP image"
    except UNREADABLE as error:
        problem = f"{type(error).__name__}: {error}"
    return Examined(item, digest_of(data), len(data), extension, problem)


def _decode(data: bytes) -> str:
    """The extension of what the bytes are; whatever Pillow raises if they are not a whole image."""
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}")
        image.load()
        return EXTENSIONS[image.format or ""]


def _digits() -> Source:
    """UCI's 1,797 handwritten digits as scikit-learn ships them: 8 x 8, 17 grey levels scaled to 0..255."""
    from sklearn.datasets import load_digits

    data = load_digits()
    items = [
        Item(f"digit-{number:04d}", int(label), functools.partial(_png, (image * 255 / 16).round()))
        for number, (image, label) in enumerate(zip(data.images, data.target, strict=True))
    ]
    return Source(items, tuple(str(label) for label in range(10)))


def _png(image: np.ndarray) -> bytes:
    """Stored, not deflated: what deflate gives differs between zlib versions, and so would every digest."""
    buffer = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def _folder(root: Path) -> Source:
    """One sub-folder per class, images anywhere inside; hidden files and folders are left out."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = [folder.name for folder in folders]
    if not folders:
        raise DataError(f"{root} has no sub-folders; expected one per class, with its images inside")
    if SPLITS.issuperset(name.lower() for name in names):
        raise ConfigError(
            f"{root} holds splits ({', '.join(names)}), not classes; give one, such as {folders[0]}"
        )
    stray = [path.name for path in sorted(root.iterdir()) if _is_image(path.name) and path.is_file()]
    if stray:
        raise DataError(
            f"{root}: {stray[0]} lies in no class's folder ({len(stray)} such images); move it into one"
        )
    items = []
    for label, folder in enumerate(folders):
        paths = list(_images(folder))
        if not paths:
            raise DataError(f"{folder} has no images ({', '.join(SUFFIXES)}); remove the folder or fill it")
        items += [Item(path.relative_to(root).as_posix(), label, path.read_bytes) for path in paths]
    return Source(items, tuple(names))


def _images(folder: Path) -> Iterator[Path]:
    for directory, subdirectories, files in os.walk(folder):
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        yield from (Path(directory) / name for name in sorted(files) if _is_image(name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.rpartition("/")[2].startswith(".")


def _tar(path: Path) -> Source:
    """Labels are taken as they stand: a number means the same in every tar of a set. So gaps are refused
    unless a `classes.txt` beside the tar (`0 airplane` on each line) says that they are meant."""
    items = []
    for member in walk(path.name, _pieces(path)):
        if not member.is_file or not _is_image(member.name):
            continue
        match = LABELLED.search(member.name)
        if not match:
            raise DataError(
                f"{path.name}: the name of {member.name!r} ends in no label, expected <name>_<label>.jpg; "
                f"WebDataset shards need no ingest: `vitscale index` takes them as they are"
            )
        read = functools.partial(_read_range, path, member.data_offset, member.size)
        items.append(Item(member.name, int(match[1]), read))
    if not items:
        raise DataError(f"{path.name} holds no images ({', '.join(SUFFIXES)})")
    return Source(items, _tar_classes(path, {item.label for item in items}))


def _tar_classes(path: Path, labels: set[int]) -> tuple[str, ...]:
    file = path.with_name("classes.txt")
    if not file.exists():
        gaps = [label for label in range(min(max(labels), len(labels))) if label not in labels]
        if gaps:
            raise DataError(
                f"{path.name}: labels go up to {max(labels)}, but no image has {gaps[0]}; if that is as it "
                f"should be, name all classes in {file}, `0 airplane` and so on, one a line"
            )
        return tuple(str(label) for label in range(len(labels)))
    classes: list[str] = []
    for number, line in enumerate(file.read_text("utf-8").splitlines()):
        label, _, name = line.strip().partition(" ")
        if label != str(number) or not name.strip() or name.strip() in classes:
            raise DataError(f"{file}, line {number + 1}: expected `{number} <a new name>`, found {line!r}")
        classes.append(name.strip())
    if max(labels) >= len(classes):
        raise DataError(
            f"{path.name} has the label {max(labels)}, but {file} names only {len(classes)} classes"
        )
    return tuple(classes)


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def _read_range(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
