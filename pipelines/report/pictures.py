"""Pixels as PNG data URIs: example images, filters, and the mosaic of position similarities."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

EXAMPLE_PIXELS = 128
"""Larger examples are shrunk to this: they are shown smaller."""
MOSAIC_PIXELS = 480
MOSAIC_TILES = 10
"""At most so many query positions per side; of larger grids every second, third, ... row and column."""

# Every 8th part of matplotlib's viridis (CC0): even steps to the eye, also for the colour-blind.
VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")

Floats = NDArray[np.float64]
Pixels = NDArray[np.uint8]


def example(image: Pixels) -> str:
    """(H, W), (H, W, 1) or (H, W, 3) → data URI, in its own pixels if it is small."""
    picture = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    picture.thumbnail((EXAMPLE_PIXELS, EXAMPLE_PIXELS))
    return _data_uri(picture)


def filter_pictures(filters: Floats) -> list[str]:
    """(K, C, p, p) → K data URIs; zero is mid-grey, the largest absolute value of each black or white.

    RGB for three channels, else grey, the mean over channels.
    """
    images = np.moveaxis(filters, 1, -1) if filters.shape[1] == 3 else filters.mean(axis=1)
    return [_data_uri(Image.fromarray(_around_grey(image))) for image in images]


def similarity_mosaic(similarity: Floats) -> tuple[str, int, int, int]:
    """(h, w, h, w) → (data URI, rows and columns of tiles, stride between the positions they belong to).

    Tile (i, j) shows how similar every position is to position (i * stride, j * stride); colours run from
    the least similarity of all to 1. Figure 7 (middle) of Dosovitskiy et al. 2021.
    """
    height, width = similarity.shape[:2]
    stride = -(-max(height, width) // MOSAIC_TILES)
    tiles = similarity[::stride, ::stride]
    rows, columns = tiles.shape[:2]
    scale = max(1, MOSAIC_PIXELS // (columns * (width + 1)))
    gap = max(1, scale * width // 12)
    canvas = np.zeros(
        (rows * (height * scale + gap) - gap, columns * (width * scale + gap) - gap, 4), np.uint8
    )
    low = similarity.min()
    for i, j in np.ndindex(rows, columns):
        top, left = i * (height * scale + gap), j * (width * scale + gap)
        tile = viridis((tiles[i, j] - low) / max(1 - low, 1e-9)).repeat(scale, axis=0).repeat(scale, axis=1)
        canvas[top : top + height * scale, left : left + width * scale, :3] = tile
        canvas[top : top + height * scale, left : left + width * scale, 3] = 255
    return _data_uri(Image.fromarray(canvas)), rows, columns, stride


def viridis(values: Floats) -> Pixels:
    """Numbers from 0 to 1, of any shape → RGB (..., 3)."""
    anchors = np.array([_rgb(colour) for colour in VIRIDIS])
    places = np.linspace(0, 1, len(anchors))
    channels = [np.interp(values, places, anchors[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def gradient(colours: Sequence[str] = VIRIDIS) -> str:
    """CSS for the colour bar beside the mosaic."""
    return f"linear-gradient(90deg, {', '.join(colours)})"


def _around_grey(image: Floats) -> Pixels:
    largest = max(float(np.abs(image).max()), np.finfo(np.float64).tiny)
    return (127.5 + 127.5 * image / largest).round().astype(np.uint8)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
