import csv
import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from workers.data.transforms import decode, eval_transform, sample_rng, train_transform
from workers.errors import DataError

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREYS = RNG.integers(0, 256, (6, 9), dtype=np.uint8)


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data, channels):
    image = decode(data, channels=channels)
    assert image.mode == ("L" if channels == 1 else "RGB")
    return np.asarray(image)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def luma(colours):
    return np.asarray(Image.fromarray(colours).convert("L"))


def test_colour_and_grey():
    assert np.array_equal(pixels(encode(Image.fromarray(COLOURS)), 3), COLOURS)
    assert np.array_equal(pixels(encode(Image.fromarray(COLOURS)), 1), luma(COLOURS))
    assert np.array_equal(pixels(encode(Image.fromarray(GREYS)), 1), GREYS)
    assert np.array_equal(pixels(encode(Image.fromarray(GREYS)), 3), np.dstack([GREYS] * 3))
    assert np.array_equal(pixels(encode(Image.fromarray(COLOURS), "WEBP", lossless=True), 3), COLOURS)


def test_alpha_is_dropped():
    alpha = RNG.integers(0, 256, (6, 9), dtype=np.uint8)
    assert np.array_equal(pixels(encode(Image.fromarray(np.dstack([COLOURS, alpha]))), 3), COLOURS)
    assert np.array_equal(pixels(encode(Image.fromarray(np.dstack([GREYS, alpha]))), 1), GREYS)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(0, 160, 10))])
def test_palettes_become_their_colours(transparency):
    """Pillow itself warns about the last kind of transparency, which would be an error here."""
    image = Image.fromarray(GREYS % 16)
    image.putpalette([3 * index % 256 for index in range(48)])
    options = {} if transparency is None else {"transparency": transparency}
    expected = np.stack([(3 * (3 * (GREYS % 16).astype(int) + band)) % 256 for band in range(3)], axis=2)
    assert np.array_equal(pixels(encode(image, **options), 3), expected)
    assert np.array_equal(pixels(encode(image, **options), 1), luma(expected.astype(np.uint8)))


def test_black_and_white():
    image = Image.fromarray(GREYS).point(lambda value: 255 * (value > 99), "1")
    assert np.array_equal(pixels(encode(image), 1), 255 * (GREYS > 99))


def test_16_bits_keep_their_high_byte():
    deep = RNG.integers(0, 65536, (6, 9), dtype=np.uint16)
    assert np.array_equal(pixels(encode(Image.fromarray(deep)), 1), deep >> 8)
    assert np.array_equal(pixels(encode(Image.fromarray(deep)), 3), np.dstack([deep >> 8] * 3))


def test_cmyk_jpeg():
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(pixels(encode(red, "JPEG", quality=95), 3).astype(int) - (255, 0, 0)).max() <= 4
    assert abs(int(pixels(encode(red, "JPEG", quality=95), 1).mean()) - 76) <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(COLOURS)
    data = encode(image, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert np.array_equal(pixels(data, 3), upright)
    assert upright.shape == ((9, 6, 3) if orientation > 4 else (6, 9, 3))


def test_unreadable_exif_is_taken_for_none():
    image = Image.fromarray(COLOURS)
    for exif in (b"Exif\0\0" + b"MM\0*" + b"\xff" * 30, b"Exif\0\0garbage"):
        assert np.array_equal(pixels(encode(image, exif=exif), 3), COLOURS)


def test_a_strange_orientation_is_taken_for_none():
    exif = Image.Exif()
    exif[0x0112] = 99
    assert np.array_equal(pixels(encode(Image.fromarray(COLOURS), exif=exif), 3), COLOURS)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_every_truncation_is_refused(format):
    data = encode(Image.fromarray(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)), format)
    for length in range(0, len(data) - 40, 61):
        with pytest.raises(DataError, match="image"):
            decode(data[:length], channels=3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no JPEG or PNG or WEBP"),
        (b"version https://git-lfs.github.com/spec/v1\n", "no JPEG or PNG or WEBP"),
        (encode(Image.fromarray(COLOURS), "GIF"), "no JPEG or PNG or WEBP"),
        (encode(Image.fromarray(COLOURS), "TIFF"), "no JPEG or PNG or WEBP"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "no JPEG or PNG or WEBP"),
        (png(8, 8, chunk(b"IDAT", b"not zlib")), "damaged image"),
        (png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7)))), "damaged image"),
        (png(20_000, 20_000, chunk(b"IDAT", zlib.compress(b""))), "exceeds limit"),
    ],
    ids=["empty", "pointer", "gif", "tiff", "eps", "garbage", "text bomb", "pixel bomb"],
)
def test_what_is_no_sound_image_is_refused(data, reason):
    with pytest.raises(DataError, match=reason):
        decode(data, channels=3)


@pytest.mark.parametrize("action", ["error", "ignore"])
def test_a_bomb_of_which_pillow_only_warns_is_refused(action):
    bomb = png(10_000, 10_000, chunk(b"IDAT", zlib.compress(b"")))
    with warnings.catch_warnings(), pytest.raises(DataError, match=r"100000000|10000 x 10000"):
        warnings.simplefilter(action)
        decode(bomb, channels=3)


def test_damage_anywhere_gives_an_image_or_a_data_error():
    for format in ("PNG", "JPEG", "WEBP"):
        exif = Image.Exif()
        exif[0x0112] = 6
        data = encode(Image.fromarray(COLOURS), format, exif=exif)
        for at in range(len(data)):
            damaged = bytearray(data)
            damaged[at] ^= 0x41
            try:
                assert decode(bytes(damaged), channels=3).mode == "RGB"
            except DataError:
                continue


@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # Pillow's, about EXIF and MPO headers that it can do without
def test_odd_real_files(vitscale_test_data):
    """Exactly those that Pillow loads strictly are accepted, and each of them can be augmented."""
    if vitscale_test_data is None:
        pytest.skip("VITSCALE_TEST_DATA is not set")
    with (vitscale_test_data / "odd" / "NOTES.csv").open() as file:
        notes = list(csv.DictReader(file))
    for note in notes:
        data = (vitscale_test_data / "odd" / note["file"]).read_bytes()
        if note["strict_load"] == "ok":
            image = decode(data, channels=3)
            assert (np.asarray(decode(data, channels=1)).shape) == (image.height, image.width)
            assert eval_transform(image, size=24).shape == (3, 24, 24)
            assert augment(image, sample_rng(0, 0, 0), size=24).shape == (3, 24, 24)
        else:
            with pytest.raises(DataError):
                decode(data, channels=3)


def augment(image, rng, *, size=16, min_scale=0.08, min_ratio=0.75, flip=True):
    return train_transform(image, size=size, min_scale=min_scale, min_ratio=min_ratio, flip=flip, rng=rng)


def test_augmentation_is_a_function_of_the_generator():
    image = Image.fromarray(RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    views = [augment(image, sample_rng(1, 2, sample)) for sample in range(20)]
    again = [augment(image, sample_rng(1, 2, sample)) for sample in range(20)]
    assert all(view.shape == (3, 16, 16) and view.dtype == np.uint8 for view in views)
    assert np.array_equal(views, again)
    assert len({view.tobytes() for view in views}) == 20


def test_crops_cover_the_allowed_scales_ratios_and_places():
    """Pixels hold their own coordinates, so the pixels of a view tell its crop."""
    height, width = 120, 160
    rows, columns = np.indices((height, width), dtype=np.uint8)
    image = Image.fromarray(np.dstack([rows, columns, rows]))
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
    image = Image.fromarray(COLOURS.repeat(4, axis=0).repeat(4, axis=1)[:24, :24])
    whole = {"size": 24, "min_scale": 1.0, "min_ratio": 1.0}
    upright = np.asarray(image).transpose(2, 0, 1)
    flips = 0
    for sample in range(400):
        view = augment(image, sample_rng(0, 0, sample), **whole)
        flips += np.array_equal(view, upright[:, :, ::-1])
        assert np.array_equal(view, upright) or np.array_equal(view, upright[:, :, ::-1])
        assert np.array_equal(augment(image, sample_rng(0, 0, sample), flip=False, **whole), upright)
    assert 160 < flips < 240


def test_a_panorama_gives_its_central_part():
    columns = np.tile(np.linspace(0, 255, 1000).astype(np.uint8), (10, 1))
    wide = augment(Image.fromarray(columns), sample_rng(0, 0, 0), min_scale=0.5, flip=False)
    tall = augment(
        Image.fromarray(np.ascontiguousarray(columns.T)), sample_rng(0, 0, 0), min_scale=0.5, flip=False
    )
    for view in (wide, tall):  # 13 of 1,000 pixels around the middle
        assert view.shape == (1, 16, 16)
        assert view.min() >= 122 and view.max() <= 132


def test_one_pixel_can_be_augmented():
    image = Image.fromarray(np.full((1, 1), 77, np.uint8))
    for sample in range(20):
        assert (augment(image, sample_rng(0, 0, sample)) == 77).all()
    assert (eval_transform(image, size=4) == 77).all()


def test_evaluation_takes_the_central_square():
    image = np.zeros((20, 60), np.uint8)
    image[:, 20:40] = 200
    assert (eval_transform(Image.fromarray(image[:, 19:41]), size=10)[0, :, 1:-1] == 200).all()
    assert np.array_equal(
        eval_transform(Image.fromarray(COLOURS[:, :6]), size=6), COLOURS[:, :6].transpose(2, 0, 1)
    )
    assert eval_transform(Image.fromarray(image.T.copy()), size=10).mean() > 190


def test_evaluation_shrinks_with_antialiasing():
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    view = eval_transform(Image.fromarray(stripes), size=8)
    assert abs(view.astype(int) - 127).max() <= 8


def test_tiny_images_are_enlarged_smoothly():
    ramp = np.tile(np.arange(8, dtype=np.uint8) * 32, (8, 1))
    view = eval_transform(Image.fromarray(ramp), size=16)[0].astype(int)
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
