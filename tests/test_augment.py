import hashlib

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from tests.test_config import VALUES
from workers.config import AugmentConfig, make_config
from workers.data.augment import OPERATIONS, augment_view, erase, jitter, rand_augment, three_augment
from workers.data.transforms import sample_rng
from workers.errors import ConfigError

NAMES = [
    *("identity", "autocontrast", "equalize", "rotate", "solarize", "colour", "posterize"),
    *("contrast", "brightness", "sharpness", "shear_x", "shear_y", "shift_x", "shift_y"),
]
OPERATION = dict(zip(NAMES, OPERATIONS, strict=True))


def picture(height=24, width=32, channels=3):
    """(C, H, W): ramps with stripes, none of which reaches 0 or 255."""
    rows, columns = np.indices((height, width))
    planes = [20 + 4 * columns, 30 + 6 * rows, 200 - 3 * columns - rows]
    return (np.stack(planes[:channels]) + 5 * (rows % 3 == 0)).astype(np.uint8)


def as_image(view):
    return Image.fromarray(view[0] if len(view) == 1 else np.ascontiguousarray(view.transpose(1, 2, 0)))


def as_view(image):
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def augmented(view, seed=0, **options):
    view = view.copy()
    augment_view(view, AugmentConfig(**options), sample_rng(0, 0, seed))
    return view


ALL = {"three_augment": True, "color_jitter": 0.4, "rand_augment_layers": 2, "erase": 0.5}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{"color_jitter": 0.4}, {"rand_augment_layers": 2}, {"erase": 1.0}, ALL],
)
def test_augmentation_is_a_function_of_the_generator(options, channels):
    view = picture(channels=channels)
    views = [augmented(view, seed, **options) for seed in range(40)]
    assert np.array_equal(views, [augmented(view, seed, **options) for seed in range(40)])
    assert len({view.tobytes() for view in views}) > 25


def test_the_defaults_change_nothing_and_draw_nothing():
    rng, view = sample_rng(0, 0, 0), picture()
    augment_view(view, AugmentConfig(), rng)
    assert np.array_equal(view, picture())
    assert rng.random() == sample_rng(0, 0, 0).random()


def test_views_need_not_be_contiguous():
    rows_last = np.ascontiguousarray(picture().transpose(1, 2, 0))
    augment_view(rows_last.transpose(2, 0, 1), AugmentConfig(**ALL), sample_rng(0, 0, 3))
    assert np.array_equal(rows_last.transpose(2, 0, 1), augmented(picture(), 3, **ALL))


def test_geometry_and_tables_are_pinned():
    """Saved runs augmented like this; operations that compute with whole numbers alone."""
    digest = hashlib.sha256()
    for name in ("autocontrast", "equalize", "rotate", "solarize", "posterize", "shear_x", "shift_y"):
        for strength, sign in ((0.3, 1), (1.0, -1)):
            for channels in (1, 3):
                image = OPERATION[name](as_image(picture(channels=channels)), strength, sign)
                digest.update(as_view(image).tobytes())
    assert digest.hexdigest() == "f1e12bce39017a24ffa668c7ee19a5c10e77fd6433b6a869b8dcca3aa6c7a825"
    view = picture()
    for seed in range(5):
        erase(view, sample_rng(0, 0, seed))
    assert (
        hashlib.sha256(view.tobytes()).hexdigest()
        == "6f987565555bdc1fb639cf6412de9624eb8a1b7722ac84efc35ae23d55903100"
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("autocontrast", "equalize")])
@pytest.mark.parametrize("sign", [-1, 1])
def test_operations_get_stronger_with_magnitude(name, sign):
    image = as_image(picture())
    changes = [
        np.abs(as_view(OPERATION[name](image, strength, sign)).astype(int) - picture()).mean()
        for strength in (0, 0.25, 0.5, 1)
    ]
    assert changes[0] == 0 and changes == sorted(changes)
    assert name == "identity" or changes[-1] > 0.4


def test_what_the_operations_do():
    view, image = picture().astype(int), as_image(picture())
    shown = {name: as_view(OPERATION[name](image, 0.5, 1)).astype(int) for name in NAMES}
    assert shown["autocontrast"].min() == 0 and shown["autocontrast"].max() == 255
    assert np.array_equal(shown["solarize"], np.where(view < 128, view, 255 - view))
    assert np.array_equal(shown["posterize"], view & 0b11111100)
    assert np.array_equal(shown["brightness"], np.minimum(255, np.floor(view * 1.45)))
    right = round(150 / 331 / 2 * 32)
    assert np.array_equal(shown["shift_x"][:, :, right:], view[:, :, :-right])
    assert (shown["shift_x"][:, :, :right] == 128).all()
    down = round(150 / 331 / 2 * 24)
    assert np.array_equal(shown["shift_y"][:, down:], view[:, :-down])
    assert np.array_equal(shown["shear_x"][:, 0], view[:, 0])  # the upper left corner stays
    assert np.array_equal(shown["shear_y"][:, :, 0], view[:, :, 0])
    middle = np.s_[:, 11:13, 15:17]  # turned by 15 degrees around the centre
    assert np.abs(shown["rotate"][middle] - view[middle]).max() <= 11
    assert (shown["rotate"][:, 0, -1] == 128).all()


def test_saturation_of_grey_is_left_alone():
    grey = as_image(picture(channels=1))
    assert OPERATION["colour"](grey, 1.0, 1) is grey
    for name in NAMES:
        assert OPERATION[name](grey, 0.7, -1).mode == "L"


def test_all_operations_are_drawn_alike():
    drawn = np.bincount(
        [sample_rng(0, 0, sample).integers(len(OPERATIONS), size=2)[1] for sample in range(3000)],
        minlength=14,
    )
    assert len(drawn) == 14 and drawn.min() > 150 and drawn.max() < 290
    image = as_image(picture())
    rng = sample_rng(0, 0, 7)
    first, second = rng.integers(14, size=2)
    signs = [1 if rng.random() < 0.5 else -1 for _ in range(2)]
    expected = OPERATIONS[second](OPERATIONS[first](image, 0.3, signs[0]), 0.3, signs[1])
    assert np.array_equal(as_view(rand_augment(image, 2, 9, sample_rng(0, 0, 7))), as_view(expected))


def test_jitter_is_brightness_contrast_and_saturation_in_random_order():
    """As Pillow computes them, which is what torchvision's ColorJitter does to Pillow's images."""
    image, orders = as_image(picture()), set()
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for sample in range(50):
        rng = sample_rng(0, 0, sample)
        factors, order = rng.uniform(0.6, 1.4, 3), rng.permutation(3)
        expected = image
        for at in order:
            expected = enhancers[at](expected).enhance(factors[at])
        assert np.array_equal(as_view(jitter(image, 0.4, sample_rng(0, 0, sample))), as_view(expected))
        orders.add(tuple(order))
    assert len(orders) == 6


@pytest.mark.parametrize("channels", [1, 3])
def test_three_augment_is_grey_or_solarised_or_blurred(channels):
    """Each a third of the time, as Pillow computes them, which is what the authors' augment.py does."""
    image, radii, counts = as_image(picture(channels=channels)), [], [0, 0, 0]
    for sample in range(300):
        rng = sample_rng(0, 0, sample)
        choice, radius = rng.integers(3), 0.1 + 1.9 * rng.random()
        grey = ImageOps.grayscale(image)
        expected = [
            Image.merge(image.mode, [grey] * channels),
            ImageOps.solarize(image, 128),
            image.filter(ImageFilter.GaussianBlur(radius)),
        ][choice]
        found = three_augment(image, sample_rng(0, 0, sample))
        assert np.array_equal(as_view(found), as_view(expected))
        assert found.mode == image.mode
        counts[choice] += 1
        radii += [radius] if choice == 2 else []
    assert min(counts) > 75
    assert 0.1 < min(radii) < 0.2 and 1.9 < max(radii) < 2


def test_three_augment_comes_before_the_colours():
    rng = sample_rng(0, 0, 5)
    expected = jitter(three_augment(as_image(picture()), rng), 0.3, rng)
    assert np.array_equal(augmented(picture(), 5, three_augment=True, color_jitter=0.3), as_view(expected))


def test_erased_rectangles_have_the_papers_shapes():
    areas, ratios, tops = [], [], []
    for sample in range(800):
        view = np.full((3, 64, 48), 44, np.uint8)
        rng = sample_rng(0, 0, sample)
        erase(view, rng)
        changed = (view != 44).any(axis=0)
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.95
        areas.append(height * width / (64 * 48))
        ratios.append(height / width)
        tops.append(rows[0] / (64 - height))
    assert 0.015 < min(areas) < 0.03 and 0.3 < max(areas) < 0.34
    assert 0.28 < min(ratios) < 0.4 and 2.5 < max(ratios) < 3.6
    assert min(tops) == 0 and max(tops) == 1 and abs(np.mean(tops) - 0.5) < 0.05


def test_erasing_has_its_probability_and_fills_with_noise():
    views = [augmented(picture(), seed, erase=0.3) for seed in range(400)]
    assert 90 < sum(not np.array_equal(view, picture()) for view in views) < 150
    noise = np.concatenate([view[view != picture()] for view in views])
    assert abs(noise.mean() - 127.5) < 4 and (noise.min(), noise.max()) == (0, 255)


def test_tiny_views_survive_everything():
    for side in (1, 2, 3):
        for seed in range(30):
            view = np.full((1, side, side), 7, np.uint8)
            assert augmented(view, seed, **(ALL | {"erase": 1.0})).shape == (1, side, side)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("rand_augment_layers", -1, "greater than or equal to 0, got -1"),
        ("rand_augment_layers", 1.5, "should be a valid integer"),
        ("rand_augment_magnitude", 31, "less than or equal to 30, got 31"),
        ("color_jitter", 1.5, "less than or equal to 1, got 1.5"),
        ("erase", -0.1, "greater than or equal to 0, got -0.1"),
        ("mixup", -1, "greater than or equal to 0, got -1"),
        ("cutmix", "a", "should be a valid number, got 'a'"),
        ("erasing", 0.5, "unknown field"),
    ],
)
def test_wrong_settings_are_named(field, value, reason):
    values = VALUES | {"data": VALUES["data"] | {"augment": {field: value}}}
    with pytest.raises(ConfigError, match=rf"data\.augment\.{field}: .*{reason}"):
        make_config(values)
