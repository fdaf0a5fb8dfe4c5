"""Augmentations after crop and flip, on uint8 pixels; all randomness comes from the generator given.

Grey images draw the same operations as coloured ones; what only changes saturation does nothing to them.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from workers.config import AugmentConfig
from workers.data.decode import Pixels

MAX_MAGNITUDE = 30.0

ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 1 / 0.3)
ERASE_TRIES = 10

MAX_SHIFT = 150 / 331
"""Of a side: the paper's 150 pixels of 331."""

BLUR_PIXELS = (0.1, 2.0)
"""Standard deviation."""

GREY = 128
"""What shifted pixels leave behind, as in the code of the paper."""


def augment_view(view: Pixels, augment: AugmentConfig, rng: np.random.Generator) -> None:
    """Changes `view` (C, H, W): 3-Augment, colours, RandAugment, erasing."""
    if augment.three_augment or augment.color_jitter or augment.rand_augment_layers:
        image = _to_image(view)
        if augment.three_augment:
            image = three_augment(image, rng)
        if augment.color_jitter:
            image = jitter(image, augment.color_jitter, rng)
        if augment.rand_augment_layers:
            image = rand_augment(image, augment.rand_augment_layers, augment.rand_augment_magnitude, rng)
        for plane, band in zip(view, image.split(), strict=True):
            plane[...] = np.asarray(band)
    if augment.erase and rng.random() < augment.erase:
        erase(view, rng)


def three_augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One of three, each as likely: grey, solarised, or blurred by a Gaussian of 0.1 to 2 pixels (3-Augment,
    arXiv 2204.07118, section 3.2, as in the authors' augment.py)."""
    choice, share = int(rng.integers(3)), rng.random()
    if choice == 0:
        return ImageOps.grayscale(image).convert(image.mode)
    if choice == 1:
        return ImageOps.solarize(image)
    smallest, largest = BLUR_PIXELS
    return image.filter(ImageFilter.GaussianBlur(smallest + (largest - smallest) * share))


def jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation in random order, each times 1 - strength .. 1 + strength:
    torchvision's ColorJitter without hue."""
    factors = rng.uniform(1 - strength, 1 + strength, len(_JITTERS)).tolist()
    for at in rng.permutation(len(_JITTERS)).tolist():
        image = _JITTERS[at](image, factors[at])
    return image


def rand_augment(image: Image.Image, layers: int, magnitude: float, rng: np.random.Generator) -> Image.Image:
    """RandAugment (arXiv 1909.13719): `layers` of its 14 operations, drawn with replacement, all of one
    magnitude of 0 to 30. What that means for each is torchvision's table, where all get stronger with it;
    no pixels are interpolated, as there and in the code of the paper. 30 to 850 µs each at 224 pixels."""
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
    bands = [Image.fromarray(plane) for plane in view]
    return bands[0] if len(bands) == 1 else Image.merge("RGB", bands)


def _saturate(image: Image.Image, factor: float) -> Image.Image:
    return image if image.mode == "L" else ImageEnhance.Color(image).enhance(factor)


def _brighten(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def _contrast(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def _sharpen(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(factor)


_JITTERS = (_brighten, _contrast, _saturate)


def _fill(image: Image.Image) -> int | tuple[int, int, int]:
    return GREY if image.mode == "L" else (GREY, GREY, GREY)


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, fillcolor=_fill(image))


def _shear(image: Image.Image, x: float, y: float) -> Image.Image:
    """A pixel comes from x pixels further right per row, and y further down per column: the upper left
    corner stays, as in the code of the paper."""
    return image.transform(image.size, Image.Transform.AFFINE, (1, x, 0, y, 1, 0), fillcolor=_fill(image))


def _shift(image: Image.Image, x: int, y: int) -> Image.Image:
    shifted = Image.new(image.mode, image.size, _fill(image))
    shifted.paste(image, (x, y))
    return shifted


OPERATIONS: tuple[Callable[[Image.Image, float, int], Image.Image], ...] = (
    lambda image, strength, sign: image,
    lambda image, strength, sign: ImageOps.autocontrast(image),
    lambda image, strength, sign: ImageOps.equalize(image),
    lambda image, strength, sign: _rotate(image, sign * 30 * strength),
    lambda image, strength, sign: ImageOps.solarize(image, round(256 * (1 - strength))),
    lambda image, strength, sign: _saturate(image, 1 + sign * 0.9 * strength),
    lambda image, strength, sign: ImageOps.posterize(image, 8 - round(4 * strength)),
    lambda image, strength, sign: _contrast(image, 1 + sign * 0.9 * strength),
    lambda image, strength, sign: _brighten(image, 1 + sign * 0.9 * strength),
    lambda image, strength, sign: _sharpen(image, 1 + sign * 0.9 * strength),
    lambda image, strength, sign: _shear(image, sign * 0.3 * strength, 0),
    lambda image, strength, sign: _shear(image, 0, sign * 0.3 * strength),
    lambda image, strength, sign: _shift(image, round(sign * MAX_SHIFT * strength * image.width), 0),
    lambda image, strength, sign: _shift(image, 0, round(sign * MAX_SHIFT * strength * image.height)),
)
"""In the paper's order, identity first; `strength` is 0 to 1, `sign` -1 or 1."""
