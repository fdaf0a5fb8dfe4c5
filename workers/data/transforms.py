"""Decode and augment: image bytes to the uint8 pixels that a model is given.

All randomness comes from `sample_rng(seed, epoch, sample id)`: never from rank, process or order of work.
"""

import hashlib
import io
import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from workers.errors import DataError

Pixels = npt.NDArray[np.uint8]
"""(C, H, W); may be a transposed view."""

FORMATS = ("JPEG", "PNG", "WEBP")
"""All that Pillow may try: its EPS reader, for one, would start Ghostscript."""

MAX_PIXELS = 89_478_485
"""A quarter of a gigabyte as RGB, Pillow's own limit, where it only warns."""

TRIES = 10

_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what undoes it, as in PIL.ImageOps.exif_transpose, which also rewrites the EXIF
block and fails on many that are damaged elsewhere."""


def decode(data: bytes, *, channels: Literal[1, 3]) -> Image.Image:
    """An "L" or "RGB" image, upright by its EXIF orientation; DataError says why these bytes are none.

    Colours are converted as by `Image.convert`, so alpha and ICC profiles are dropped and grey is ITU-R
    601-2 luma; 16-bit grey keeps its high byte. Of an animation, the first frame. What is cut off or
    damaged is an error, save EXIF: a picture whose EXIF cannot be read is taken as it lies.
    """
    mode = "L" if channels == 1 else "RGB"
    try:
        # Depending on the damage Pillow raises OSError, SyntaxError, ValueError, UnicodeDecodeError,
        # struct.error, IndexError, TypeError, ... and, where filters say so, warnings.
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise DataError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
        image.load()
        orientation = _orientation(image)
        if image.mode != mode:
            image = _convert(image, mode)
        return image.transpose(_ORIENTATIONS[orientation]) if orientation in _ORIENTATIONS else image
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its message holds an address
        raise DataError(f"no {' or '.join(FORMATS)} image, or its header is damaged") from error
    except Exception as error:
        raise DataError(f"damaged image: {error}") from error


def sample_rng(seed: int, epoch: int, sample_id: int) -> np.random.Generator:
    """The generator for one sample in one epoch; 2 µs, a third of what np.random.SeedSequence takes."""
    words = _Seed(f"{seed} {epoch} {sample_id}".encode())
    return np.random.Generator(np.random.PCG64(words))  # type: ignore[arg-type]  # the stubs omit ISeedSequence


def train_transform(
    image: Image.Image,
    *,
    size: int,
    min_scale: float,
    min_ratio: float,
    flip: bool,
    rng: np.random.Generator,
) -> Pixels:
    """(C, size, size): a random crop, resized with antialiasing, flipped half of the time if `flip`.

    The crop takes min_scale..1 of the area, at an aspect ratio log-uniform between min_ratio and its
    inverse: Inception's (arXiv 1409.4842, section 6) in torchvision's form, RandomResizedCrop.
    """
    pixels = _resize(image, _crop_box(image.width, image.height, min_scale, min_ratio, rng), size)
    return pixels[:, :, ::-1] if flip and rng.random() < 0.5 else pixels


def eval_transform(image: Image.Image, *, size: int) -> Pixels:
    """(C, size, size): the shorter side resized to `size`, then the central square, in one step."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return _resize(image, (left, top, left + side, top + side), size)


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - damaged EXIF raises as much as damaged images do, see decode
        return 1
    return orientation if isinstance(orientation, int) else 1


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image.info.pop("transparency", None)  # convert() would warn about what it cannot keep
    return image if image.mode == mode else image.convert(mode)


class _Seed(np.random.bit_generator.ISeedSequence):
    def __init__(self, identity: bytes) -> None:
        self._identity = identity

    def generate_state(
        self, n_words: int, dtype: npt.DTypeLike = np.uint64
    ) -> npt.NDArray[np.uint32 | np.uint64]:
        digest = hashlib.blake2b(self._identity, digest_size=n_words * np.dtype(dtype).itemsize).digest()
        return np.frombuffer(digest, dtype)


def _crop_box(
    width: int, height: int, min_scale: float, min_ratio: float, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom, in pixels."""
    max_log_ratio = -math.log(min_ratio)
    for _ in range(TRIES):
        scale, ratio, left, top = rng.random(4).tolist()
        area = width * height * (min_scale + (1 - min_scale) * scale)
        aspect = math.exp(max_log_ratio * (2 * ratio - 1))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    # No try fitted, as in panoramas: the largest central crop of an allowed ratio.
    w = min(width, max(1, round(height / min_ratio)))
    h = min(height, max(1, round(width / min_ratio)))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def _resize(image: Image.Image, box: tuple[float, float, float, float], size: int) -> Pixels:
    """Bilinear with antialiasing where that shrinks."""
    if box != (0, 0, size, size) or image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(image)
    return pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
