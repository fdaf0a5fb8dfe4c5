"""Augmentations after crop and flip, on uint8 pixels; all randomness comes from the generator given.

Each draws the same random numbers for grey images as for coloured ones, where it leaves out what only
changes colours.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from workers.config import AugmentConfig
from workers.data.decode import Pixels

MAX_MAGNITUDE = 30.0

ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
ERASE_TRIES = 10

MAX_SHIFT = 150 / 331
"""Of a side: the paper's 150 pixels of 331."""

_FILL = 128
"""What RandAugment's shifted pixels leave behind, as in the code of the paper."""


def augment_view(view: Pixels, augment: AugmentConfig, rng: np.random.Generator) -> None:
    """Changes `view` (C, H, W): colours, RandAugment, erasing."""
    if augment.color_jitter or augment.rand_augment_layers:
        image = _to_image(view)
        if augment.color_jitter:
            image = jitter(image, augment.color_jitter, rng)
        if augment.rand_augment_layers:
            image = rand_augment(image, augment.rand_augment_layers, augment.rand_augment_magnitude, rng)
        pixels = np.asarray(image)
        view[...] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if augment.erase and rng.random() < augment.erase:
        erase(view, rng)


def jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation in random order, each times 1 - strength .. 1 + strength:
    torchvision's ColorJitter without hue."""
    factors = rng.uniform(1 - strength, 1 + strength, len(_JITTERS)).tolist()
    for at in rng.permutation(len(_JITTERS)).tolist():
        image = _JITTERS[at](image, factors[at])
    return image


def rand_augment(image: Image.Image, layers: int, magnitude: float, rng: np.random.Generator) -> Image.Image:
    """RandAugment (arXiv 1909.13719): `layers` of its 14 operations, drawn with replacement, all of one
    magnitude of 0 to 30, with torchvision's table of what that means: all get stronger with it. Shifted
    and turned pixels are interpolated."""
    strength = magnitude / MAX_MAGNITUDE
    for at in rng.integers(len(OPERATIONS), size=layers).tolist():
        sign = 1 if rng.random() < 0.5 else -1
        image = OPERATIONS[at](image, strength, sign)
    return image


def erase(view: Pixels, rng: np.random.Generator) -> None:
    """Random erasing (arXiv 1708.04896, algorithm 1, RE-R): one rectangle of 2 to 33 % of the area becomes
    noise, uniform for each value. Its ratio of height to width is log-uniform, the tries are bounded."""
    channels, height, width = view.shape
    for _ in range(ERASE_TRIES):
        share, ratio, top, left = rng.random(4).tolist()
        area = height * width * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * share)
        aspect = math.exp(math.log(ERASED_RATIO[1]) * (2 * ratio - 1))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
            view[:, y : y + h, x : x + w] = rng.integers(0, 256, (channels, h, w), np.uint8)
            return


def _to_image(view: Pixels) -> Image.Image:
    return Image.fromarray(view[0] if len(view) == 1 else np.ascontiguousarray(view.transpose(1, 2, 0)))


def _saturate(image: Image.Image, factor: float) -> Image.Image:
    return image if image.mode == "L" else ImageEnhance.Color(image).enhance(factor)


def _brighten(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def _contrast(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def _sharpen(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(factor)


_JITTERS = (_brighten, _contrast, _saturate)


def _shift(image: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
    """A pixel x, y comes from a x + b y + c, d x + e y + f."""
    fill = _FILL if image.mode == "L" else (_FILL,) * 3
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        (a, b, c, d, e, f),
        Image.Resampling.BILINEAR,
        fillcolor=fill,
    )


def _rotate(image: Image.Image, strength: float, sign: int) -> Image.Image:
    fill = _FILL if image.mode == "L" else (_FILL,) * 3
    return image.rotate(sign * 30 * strength, Image.Resampling.BILINEAR, fillcolor=fill)


OPERATIONS: tuple[Callable[[Image.Image, float, int], Image.Image], ...] = (
    lambda image, strength, sign: image,
    lambda image, strength, sign: ImageOps.autocontrast(image),
    lambda image, strength, sign: ImageOps.equalize(image),
    _rotate,
    lambda image, strength, sign: ImageOps.solarize(image, round(255 * (1 - strength))),
    lambda image, strength, sign: _saturate(image, 1 + sign * 0.9 * strength),
    lambda image, strength, sign: ImageOps.posterize(image, 8 - round(4 * strength)),
    lambda image, strength, sign: _contrast(image, 1 + sign * 0.9 * strength),
    lambda image, strength, sign: _brighten(image, 1 + sign * 0.9 * strength),
    lambda image, strength, sign: _sharpen(image, 1 + sign * 0.9 * strength),
    lambda image, strength, sign: _shift(image, 1, sign * 0.3 * strength, 0, 0, 1, 0),
    lambda image, strength, sign: _shift(image, 1, 0, 0, sign * 0.3 * strength, 1, 0),
    lambda image, strength, sign: _shift(image, 1, 0, sign * MAX_SHIFT * strength * image.width, 0, 1, 0),
    lambda image, strength, sign: _shift(image, 1, 0, 0, 0, 1, sign * MAX_SHIFT * strength * image.height),
)
"""In the paper's order, identity first; `strength` is 0 to 1, `sign` -1 or 1."""
