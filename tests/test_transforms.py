import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from workers.config import AugmentConfig
from workers.data import transforms
from workers.data.decode import decode, open_picture, shrink_for
from workers.data.transforms import (
    DecodeTimes,
    eval_transform,
    mirror,
    resize,
    sample_rng,
    train_transform,
)
from workers.errors import DataError

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encode(pixels, format="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def augment(pixels, rng, *, size=16, **options):
    """Of an array (H, W) or (H, W, 3), or of a file's bytes."""
    data = pixels if isinstance(pixels, bytes) else encode(pixels)
    out = np.full((1 if data is not pixels and pixels.ndim == 2 else 3, size, size), 99, np.uint8)
    train_transform(data, size=size, channels=len(out), augment=AugmentConfig(**options), rng=rng, out=out)
    return out


def evaluate(pixels, *, size):
    data = pixels if isinstance(pixels, bytes) else encode(pixels)
    out = np.full((1 if data is not pixels and pixels.ndim == 2 else 3, size, size), 99, np.uint8)
    eval_transform(data, size=size, channels=len(out), out=out)
    return out


def photograph(height, width, seed=0):
    """(H, W, 3), smooth and sharp in parts, as photographs are."""
    noise = np.random.default_rng(seed).integers(
        0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8
    )
    return np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


def psnr(one, other):
    return 10 * np.log10(255**2 / max(1e-9, np.mean((one.astype(float) - other) ** 2)))


def test_augmentation_is_a_function_of_the_generator():
    image = RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    views = [augment(image, sample_rng(1, 2, sample)) for sample in range(20)]
    again = [augment(image, sample_rng(1, 2, sample)) for sample in range(20)]
    assert np.array_equal(views, again)
    assert len({view.tobytes() for view in views}) == 20


def test_crops_cover_the_allowed_scales_ratios_and_places():
    """Pixels hold their own coordinates, so the pixels of a view tell its crop."""
    height, width = 120, 160
    rows, columns = np.indices((height, width), dtype=np.uint8)
    image = encode(np.dstack([rows, columns, rows]))
    scales, ratios, lefts = [], [], []
    for sample in range(1500):
        view = augment(image, sample_rng(0, 0, sample), size=64, flip=False).astype(float)
        # Away from the edges, 32 of the view's 64 pixels span half of the crop.
        crop_height = (view[0, 48, 32] - view[0, 16, 32]) * 2
        crop_width = (view[1, 32, 48] - view[1, 32, 16]) * 2
        scales.append(crop_height * crop_width / (height * width))
        ratios.append(crop_width / crop_height)
        lefts.append((view[1, 32, 32] - crop_width / 2) / max(1, width - crop_width))
    assert 0.06 < min(scales) < 0.1 and 0.88 < max(scales) < 1.03
    # Those that stick out are drawn again, so the mean is that of the scales which fit into 4:3.
    scale, aspect = RNG.uniform(0.08, 1, 100_000), np.exp(RNG.uniform(np.log(3 / 4), np.log(4 / 3), 100_000))
    fit = (scale * aspect <= 4 / 3) & (scale / aspect <= 3 / 4)
    assert abs(np.mean(scales) - scale[fit].mean()) < 0.02
    assert abs(np.mean(np.log(ratios)) - np.log(aspect[fit]).mean()) < 0.02
    assert 0.70 < min(ratios) < 0.79 and 1.27 < max(ratios) < 1.42
    assert min(lefts) < 0.05 and max(lefts) > 0.95 and abs(np.mean(lefts) - 0.5) < 0.05


def test_half_of_the_views_are_flipped():
    image = COLOURS.repeat(4, axis=0).repeat(4, axis=1)[:24, :24]
    whole = {"size": 24, "min_scale": 1.0, "min_ratio": 1.0}
    upright = image.transpose(2, 0, 1)
    flips = 0
    for sample in range(400):
        view = augment(image, sample_rng(0, 0, sample), **whole)
        flips += np.array_equal(view, upright[:, :, ::-1])
        assert np.array_equal(view, upright) or np.array_equal(view, upright[:, :, ::-1])
        assert np.array_equal(augment(image, sample_rng(0, 0, sample), flip=False, **whole), upright)
    assert 160 < flips < 240


def test_a_panorama_gives_its_central_part():
    columns = np.tile(np.linspace(0, 255, 1000).astype(np.uint8), (10, 1))
    wide = augment(columns, sample_rng(0, 0, 0), min_scale=0.5, flip=False)
    tall = augment(np.ascontiguousarray(columns.T), sample_rng(0, 0, 0), min_scale=0.5, flip=False)
    for view in (wide, tall):  # 13 of 1,000 pixels around the middle
        assert view.shape == (1, 16, 16)
        assert view.min() >= 122 and view.max() <= 132


def test_one_pixel_can_be_augmented():
    image = np.full((1, 1), 77, np.uint8)
    for sample in range(20):
        assert (augment(image, sample_rng(0, 0, sample)) == 77).all()
    assert (evaluate(image, size=4) == 77).all()


def test_evaluation_takes_the_central_square():
    image = np.zeros((20, 60), np.uint8)
    image[:, 20:40] = 200
    assert (evaluate(image[:, 19:41], size=10)[0, :, 1:-1] == 200).all()
    assert np.array_equal(evaluate(COLOURS[:, :6], size=6), COLOURS[:, :6].transpose(2, 0, 1))
    assert evaluate(image.T.copy(), size=10).mean() > 190


def test_evaluation_shrinks_with_antialiasing():
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    view = evaluate(stripes, size=8)
    assert abs(view.astype(int) - 127).max() <= 8


def test_tiny_images_are_enlarged_smoothly():
    ramp = np.tile(np.arange(8, dtype=np.uint8) * 32, (8, 1))
    view = evaluate(ramp, size=16)[0].astype(int)
    assert (np.diff(view, axis=1) >= 0).all() and np.diff(view, axis=1).max() <= 16
    assert (view[0, 0], view[0, -1]) == (0, 224)
    assert np.array_equal(view, np.tile(view[0], (16, 1)))


def test_generators_are_pinned_and_independent():
    """Saved runs augmented with these numbers."""
    assert sample_rng(0, 0, 0).random(3).tolist() == [
        0.6393667733335535,
        0.9754457268976325,
        0.9466403007952052,
    ]
    draws = [
        sample_rng(seed, epoch, sample).random()
        for seed in (0, 1, 11)
        for epoch in (0, 1, 11)
        for sample in (0, 1, 2**64 - 1)
    ]
    assert len(set(draws)) == len(draws)
    many = np.array([sample_rng(0, epoch, 5).random() for epoch in range(2000)])
    assert abs(many.mean() - 0.5) < 0.03 and abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 0.08


@pytest.mark.parametrize("size", [1, 7, 8, 24])
@pytest.mark.parametrize("channels", [1, 3])
def test_mirroring(size, channels):
    view = RNG.integers(0, 256, (channels, size, size), dtype=np.uint8)
    for source in (view, np.ascontiguousarray(view.transpose(1, 2, 0)).transpose(2, 0, 1)):
        out = np.zeros_like(view)
        mirror(source, out)
        assert np.array_equal(out, view[:, :, ::-1])


@pytest.mark.parametrize("shape", [(50, 70, 3), (20, 9, 3), (31, 31, 1)])
@pytest.mark.parametrize("size", [8, 32, 45])
def test_resizing_is_torchs_antialiased_bilinear(shape, size):
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    exact = functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None].double(),
        (size, size),
        mode="bilinear",
        antialias=True,
    )
    assert np.abs(resize(pixels, (size, size)) - exact[0].numpy()).max() <= 1
    view = pixels[2:19, 1:8]
    assert np.array_equal(resize(view, (size, size)), resize(view.copy(), (size, size)))
    assert np.array_equal(resize(view[::-1], (size, size)), resize(view[::-1].copy(), (size, size)))


def test_pixels_are_written_into_any_view():
    image = encode(RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    expected = augment(image, sample_rng(0, 0, 0))
    rows_last = np.zeros((16, 16, 3), np.uint8)
    train_transform(
        memoryview(image),
        size=16,
        channels=3,
        augment=AugmentConfig(),
        rng=sample_rng(0, 0, 0),
        out=rows_last.transpose(2, 0, 1),
    )
    assert np.array_equal(rows_last.transpose(2, 0, 1), expected)


def test_times_add_up():
    times = DecodeTimes()
    out = np.zeros((3, 16, 16), np.uint8)
    image = encode(photograph(64, 80), "JPEG")
    train_transform(
        image, size=16, channels=3, augment=AugmentConfig(), rng=sample_rng(0, 0, 0), out=out, times=times
    )
    first = (times.decode, times.augment)
    eval_transform(image, size=16, channels=3, out=out, times=times)
    assert 0 < first[0] < times.decode and 0 < first[1] < times.augment


def test_damage_is_a_data_error():
    out = np.zeros((3, 16, 16), np.uint8)
    data = encode(photograph(64, 80), "JPEG")[:-300]
    for run in (
        lambda: augment(data, sample_rng(0, 0, 0)),
        lambda: eval_transform(data, size=16, channels=3, out=out),
    ):
        with pytest.raises(DataError, match="image file is truncated"):
            run()


def test_grey_views_of_colours():
    colours = np.full((20, 20, 3), (255, 0, 0), np.uint8)
    for format in ("PNG", "JPEG"):
        out = np.zeros((1, 8, 8), np.uint8)
        eval_transform(encode(colours, format), size=8, channels=1, out=out)
        assert abs(out.astype(int) - 76).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_are_those_of_the_upright_picture(orientation):
    """A turned file gives the same views as its upright pixels do, also where it is decoded smaller."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = encode(photograph(160, 224), "JPEG", exif=exif, quality=95, subsampling=0)
    upright = encode(decode(turned, channels=3))
    for sample in range(12):
        views = [augment(data, sample_rng(0, 0, sample), size=64) for data in (turned, upright)]
        assert np.array_equal(*views)
    pairs = [read_crop(turned, sample_rng(0, 0, sample), size=16) for sample in range(12)]
    assert all(psnr(*pair) > 40 for pair in pairs)


def read_crop(data, rng, *, size):
    """A random crop of at least half of the picture as it is read, and from the pixels at full size."""
    picture, shape = open_picture(data, channels=3), (size, size)
    box = transforms._crop_box(picture.width, picture.height, shape, AugmentConfig(min_scale=0.5), rng)
    crop = transforms._read_crop(picture, box, shape)
    shrink = shrink_for((box[3] - box[1]) / size, (box[2] - box[0]) / size)
    left, top, right, bottom = (round(edge / shrink) * shrink for edge in box)
    assert min(crop.shape[:2]) >= min(size, right - left, bottom - top)
    return resize(crop, shape), resize(decode(data, channels=3)[top:bottom, left:right], shape)


def test_real_photographs_decoded_smaller_are_faithful(vitscale_test_data):
    if vitscale_test_data is None:
        pytest.skip("VITSCALE_TEST_DATA is not set")
    large = [path.read_bytes() for path in sorted((vitscale_test_data / "odd").glob("exif__*.jpg"))]
    with tarfile.open(vitscale_test_data / "grocery" / "grocery_val.tar") as tar:
        members = [member for member in tar if member.name.endswith(".jpg")][:16]
        small = [tar.extractfile(member).read() for member in members]
    for size, files in ((224, large), (64, large), (64, small), (32, small)):
        views = [read_crop(data, sample_rng(seed, 0, 0), size=size) for seed in range(3) for data in files]
        found = [psnr(*pair) for pair in views if not np.array_equal(*pair)]
        assert len(found) > 8
        assert np.median(found) > 45 and min(found) > 40
