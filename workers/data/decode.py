"""Image files to upright uint8 pixels: JPEG, PNG and WebP, told apart by content; `docs/images.md`.

Plain JPEGs are decoded by libjpeg-turbo through simplejpeg, all else by Pillow, whose verdict on what is
damaged holds: simplejpeg is strict, and what it refuses goes to Pillow. Where both decode, the pixels are
the same, as both build on libjpeg-turbo.
"""

import io
import struct
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from workers.errors import DataError

Pixels = npt.NDArray[np.uint8]

Channels = Literal[1, 3]

FORMATS = ("JPEG", "PNG", "WEBP")
"""All that Pillow may try: its EPS reader, for one, would start Ghostscript."""

MAX_PIXELS = 89_478_485
"""A quarter of a gigabyte as RGB, Pillow's own limit, where it only warns."""

SHRINKS = ((8, 2.0), (4, 2.0), (2, 1.5))
"""What libjpeg-turbo can divide both sides by while it decodes, and how many times the pixels that are
needed must remain on each side, so that a picture reduced from those is faithful to one reduced from full
size. On photographs of 348 to 1800 pixels the median PSNR between the two is 46.6 to 49.8 dB for 2, 49.2
to 52.2 for 4 and 47.0 to 51.0 for 8 near this least distance, and 50.5 dB or more at twice as many
pixels; single values differ by up to 26 of 255. Of the time to decode 1800 x 1200 pixels, 2 saves 21 %,
4 saves 30 % and 8 saves 37 %: the rest is entropy decoding. Fractions such as 6/8 are slower than none."""

_SEGMENT = struct.Struct(">HH")
_FIRST_MARKER, _START_OF_SCAN, _APP1 = 0xFFC0, 0xFFDA, 0xFFE1
"""Of JPEG (ITU-T T.81, table B.1): a segment is its marker, its length and so many bytes less two; EXIF
and XMP are in APP1."""

_METADATA = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
"""Where Pillow finds an orientation."""

_ORIENTATIONS = {
    1: (1, 1, False),
    2: (1, -1, False),
    3: (-1, -1, False),
    4: (-1, 1, False),
    5: (1, 1, True),
    6: (-1, 1, True),
    7: (-1, -1, True),
    8: (1, -1, True),
}
"""EXIF orientation to what undoes it: steps through rows and columns, then whether to swap the two. As in
PIL.ImageOps.exif_transpose, which also rewrites the EXIF block and fails on many damaged elsewhere."""


class Picture(NamedTuple):
    """An image file whose header has been read, and its pixels where that is all the same to Pillow."""

    data: bytes | memoryview
    channels: Channels
    height: int
    """Upright, as the width."""
    width: int
    orientation: int
    """EXIF's, 1 to 8."""
    pixels: Pixels | None
    """(H, W, C), upright; None: a JPEG that simplejpeg is to decode."""


def decode(data: bytes | memoryview, *, channels: Channels, need: tuple[int, int] | None = None) -> Pixels:
    """(H, W, C), C-contiguous, upright; DataError says why these bytes are no image.

    With `need`, height and width to which the pixels will be reduced, a JPEG that is much larger comes out
    smaller, as `SHRINKS` says.
    """
    picture = open_picture(data, channels=channels)
    shrink = shrink_for(picture.height / need[0], picture.width / need[1]) if need else 1
    return np.ascontiguousarray(read_pixels(picture, shrink)[0])


def open_picture(data: bytes | memoryview, *, channels: Channels) -> Picture:
    """DataError if the header is damaged or tells of more than MAX_PIXELS; no memory is taken for those."""
    if data[:2] != b"\xff\xd8":
        return _open_with_pillow(data, channels)
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return _open_with_pillow(data, channels)
    _check_size(width, height)
    if space not in ("YCbCr", "Gray"):
        return _open_with_pillow(data, channels)
    orientation = 1 if _lacks_metadata(data) else _jpeg_orientation(data)
    if orientation > 4:
        height, width = width, height
    return Picture(data, channels, height, width, orientation, None)


def shrink_for(vertical: float, horizontal: float) -> int:
    """What to divide the sides of pixels by that will be reduced by these factors."""
    reduction = min(vertical, horizontal)
    return next((shrink for shrink, margin in SHRINKS if reduction >= shrink * margin), 1)


def read_pixels(picture: Picture, shrink: int) -> tuple[Pixels, int]:
    """(H, W, C), upright, perhaps a transposed view, and what the sides were divided by, rounded up:
    `shrink`, or 1 where Pillow decoded it."""
    if picture.pixels is not None:
        return picture.pixels, 1
    height, width = picture.height, picture.width
    if picture.orientation > 4:
        height, width = width, height
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            picture.data,
            "RGB" if picture.channels == 3 else "GRAY",
            min_height=-(-height // shrink),
            min_width=-(-width // shrink),
            min_factor=shrink,
        )
    except ValueError:
        return _read_with_pillow(picture), 1
    return _upright(pixels, picture.orientation), shrink


def _lacks_metadata(data: bytes | memoryview) -> bool:
    """Whether a JPEG's header holds neither EXIF nor XMP, for sure; 1 µs."""
    at, end = 2, len(data) - _SEGMENT.size
    while at <= end:
        marker, length = _SEGMENT.unpack_from(data, at)
        if marker == _START_OF_SCAN:
            return True
        if marker == _APP1 or marker < _FIRST_MARKER:
            return False
        at += 2 + length
    return False


def _jpeg_orientation(data: bytes | memoryview) -> int:
    """As Pillow reads it, in 30 µs."""
    try:
        return _orientation(Image.open(io.BytesIO(data), formats=("JPEG",)))
    except Exception as error:
        raise _damage(error) from error


def _open_with_pillow(data: bytes | memoryview, channels: Channels) -> Picture:
    mode = "L" if channels == 1 else "RGB"
    try:
        # Depending on the damage Pillow raises OSError, SyntaxError, ValueError, UnicodeDecodeError,
        # struct.error, IndexError, TypeError, ... and, where filters say so, warnings.
        if data[:4] == b"RIFF":
            _check_size(*_webp_size(bytes(data[:30])))
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(*image.size)
        if channels == 1:
            image.draft("L", image.size)  # a JPEG's luma is at hand as it is
        image.load()
        orientation = 1 if _METADATA.isdisjoint(image.info) else _orientation(image)
        if image.mode != mode:
            image = _convert(image, mode)
        pixels = np.array(image).reshape(image.height, image.width, channels)
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise _damage(error) from error
    pixels = _upright(pixels, orientation)
    return Picture(data, channels, pixels.shape[0], pixels.shape[1], orientation, pixels)


def _read_with_pillow(picture: Picture) -> Pixels:
    """What simplejpeg refuses after its header."""
    other = _open_with_pillow(picture.data, picture.channels)
    assert other.pixels is not None
    if (other.height, other.width) != (picture.height, picture.width):
        raise DataError("damaged image: its header tells of several sizes")
    return other.pixels


def _damage(error: Exception) -> DataError:
    if isinstance(error, UnidentifiedImageError):  # its message holds an address
        return DataError(f"no {' or '.join(FORMATS)} image, or its header is damaged")
    return DataError(f"damaged image: {error}")


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"{width} x {height} pixels are more than {MAX_PIXELS}")


def _webp_size(header: bytes) -> tuple[int, int]:
    """Width and height from the first 30 bytes of a WebP file (RFC 9649, section 2), or zeros: before
    version 13 Pillow takes memory for all pixels before it tells how many there are."""
    match header[8:16]:
        case b"WEBPVP8X":
            return int.from_bytes(header[24:27], "little") + 1, int.from_bytes(header[27:30], "little") + 1
        case b"WEBPVP8L":
            sides = int.from_bytes(header[21:25], "little")
            return (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
        case b"WEBPVP8 ":
            sides = int.from_bytes(header[26:30], "little")
            return sides & 0x3FFF, sides >> 16 & 0x3FFF
    return 0, 0


def _orientation(image: Image.Image) -> int:
    """1 where EXIF is damaged, which raises as much as damaged images do, see _open_with_pillow."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - the picture is taken as it lies
        return 1
    return orientation if isinstance(orientation, int) and orientation in _ORIENTATIONS else 1


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image.info.pop("transparency", None)  # convert() would warn about what it cannot keep
    return image if image.mode == mode else image.convert(mode)


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation == 1:
        return pixels
    rows, columns, swap = _ORIENTATIONS[orientation]
    pixels = pixels[::rows, ::columns]
    return pixels.transpose(1, 0, 2) if swap else pixels
