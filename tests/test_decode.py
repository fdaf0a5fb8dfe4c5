import io
import struct
import tarfile
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from workers.data import decode as module
from workers.data.decode import MAX_PIXELS, decode, open_picture, read_pixels, shrink_for
from workers.errors import DataError

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREYS = RNG.integers(0, 256, (6, 9), dtype=np.uint8)

NO_IMAGE = "no JPEG or PNG or WEBP image, or its header is damaged"
ODD = {
    "caltech__airplanes_image_0493_wide397x104.jpg": (104, 397),
    "caltech__gray_accordion_image_0007.jpg": (225, 300),
    "exif__Landscape_0.jpg": (1200, 1800),
    "exif__Landscape_3.jpg": (1200, 1800),
    "exif__Landscape_6.jpg": (1200, 1800),
    "exif__Landscape_8.jpg": (1200, 1800),
    "exif__Portrait_6.jpg": (1800, 1200),
    "labelconflict__glass__glass115.jpg": (512, 384),
    "labelconflict__glass__glass176.jpg": (512, 384),
    "labelconflict__glass__glass389.jpg": (512, 384),
    "labelconflict__metal__metal91.jpg": (512, 384),
    "labelconflict__plastic__plastic152.jpg": (512, 384),
    "labelconflict__plastic__plastic332.jpg": (512, 384),
    "lfspointer__not_an_image.jpg": NO_IMAGE,
    "pillow__1_trns.png": (64, 64),
    "pillow__apng_mode_16bit.png": (64, 128),
    "pillow__apng_syntax_num_frames_zero.png": "damaged image: cannot load this image",
    "pillow__app13-multiple.jpg": (160, 256),
    "pillow__broken.png": NO_IMAGE,
    "pillow__broken_data_stream.png": "damaged image: unrecognized data stream contents when reading",
    "pillow__broken_exif_dpi.jpg": (100, 100),
    "pillow__empty_gps_ifd.jpg": (10, 10),
    "pillow__exif_imagemagick_orientation.png": (512, 512),
    "pillow__exif_typeerror.jpg": (531, 800),
    "pillow__hopper_16bit_qtables.jpg": (128, 128),
    "pillow__hopper_bad_exif.jpg": (500, 500),
    "pillow__hopper_gray.jpg": (128, 128),
    "pillow__hopper_orientation_3.jpg": (128, 128),
    "pillow__hopper_orientation_6.jpg": (128, 128),
    "pillow__hopper_orientation_6.webp": (128, 128),
    "pillow__hopper_orientation_8.jpg": (128, 128),
    "pillow__i_trns.png": (64, 64),
    "pillow__icc-after-SOF.jpg": (10, 10),
    "pillow__icc_profile_big.jpg": (250, 425),
    "pillow__jpeg_ff00_header.jpg": (225, 300),
    "pillow__junk_jpeg_header.jpg": (768, 1024),
    "pillow__orientation_rectangle.jpg": (2, 1),
    "pillow__pil_sample_cmyk.jpg": (100, 100),
    "pillow__png_decompression_dos.png": "damaged image: Decompressed data too large",
    "pillow__sugarshack_bad_mpo_header.jpg": (480, 640),
    "pillow__truncated_app14.jpg": (100, 100),
    "pillow__truncated_end_chunk.png": "damaged image: Truncated File Read",
    "pillow__truncated_exif_dpi.jpg": (640, 480),
    "pillow__truncated_image.png": "damaged image: image file is truncated",
    "pillow__truncated_jpeg.jpg": "damaged image: image file is truncated",
    "pillow__ultrahdr.jpg": "damaged image: image file is truncated",
    "pillow__uncompressed_la.png": (128, 128),
    "pillow__unknown_compression_method.png": NO_IMAGE,
}
"""Height and width, or how the refusal begins."""

OPENED_BY_PILLOW = {
    "icc-after-SOF",
    "jpeg_ff00_header",
    "junk_jpeg_header",
    "pil_sample_cmyk",
    "truncated_app14",
}
"""JPEGs that simplejpeg will not open, or is not given."""


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data, channels):
    """(H, W) for one channel."""
    found = decode(data, channels=channels)
    assert found.dtype == np.uint8 and found.flags.c_contiguous and found.shape[2] == channels
    assert np.array_equal(decode(memoryview(data), channels=channels), found)
    return found[:, :, 0] if channels == 1 else found


def by_pillow(data, channels):
    return module._open_with_pillow(data, channels).pixels


def by_simplejpeg(data):
    return open_picture(data, channels=3).pixels is None


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
    for format in ("JPEG", "WEBP"):
        data = encode(image, format, exif=exif)
        upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        assert np.array_equal(pixels(data, 3), upright)
        assert by_simplejpeg(data) == (format == "JPEG")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_unreadable_exif_is_taken_for_none():
    image = Image.fromarray(COLOURS)
    for exif in (b"Exif\0\0" + b"MM\0*" + b"\xff" * 30, b"Exif\0\0garbage"):
        assert np.array_equal(pixels(encode(image, exif=exif), 3), COLOURS)
        plain = pixels(encode(image, "JPEG"), 3)
        assert np.array_equal(pixels(encode(image, "JPEG", exif=exif), 3), plain)


def test_orientation_in_xmp_counts_too():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    image = Image.fromarray(COLOURS)
    upright = np.rot90(pixels(encode(image, "JPEG"), 3), -1)
    assert np.array_equal(pixels(encode(image, "JPEG", xmp=xmp), 3), upright)


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
                assert decode(bytes(damaged), channels=3).shape[2] == 3
            except DataError:
                continue


def photograph(height, width, seed=0):
    """Smooth, like a photograph."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


EXIF = Image.Exif()
EXIF[0x0112] = 6
JPEGS = {
    "420": encode(photograph(80, 113), "JPEG"),
    "422": encode(photograph(80, 113), "JPEG", subsampling=1),
    "444": encode(photograph(80, 113), "JPEG", subsampling=0, quality=100),
    "grey": encode(photograph(80, 113).convert("L"), "JPEG"),
    "progressive": encode(photograph(80, 113), "JPEG", progressive=True),
    "restarts": encode(photograph(80, 113), "JPEG", restart_marker_blocks=3),
    "huge ICC": encode(photograph(80, 113), "JPEG", icc_profile=bytes(range(256)) * 700),
    "turned": encode(photograph(80, 113), "JPEG", exif=EXIF),
    "two pictures": encode(photograph(80, 113), "MPO", save_all=True, append_images=[photograph(80, 113, 1)]),
    "RGB": encode(photograph(80, 113), "JPEG", keep_rgb=True),
    "CMYK": encode(photograph(80, 113).convert("CMYK"), "JPEG"),
}


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("channels", [1, 3])
def test_simplejpeg_and_pillow_see_the_same(kind, channels):
    data = JPEGS[kind]
    assert by_simplejpeg(data) == (kind not in ("RGB", "CMYK"))
    found = decode(data, channels=channels)
    assert np.array_equal(found, by_pillow(data, channels))
    assert found.shape == ((113, 80, channels) if kind == "turned" else (80, 113, channels))


def test_the_luma_of_a_jpeg_is_close_to_that_of_its_colours():
    for kind in ("420", "444", "progressive"):
        difference = pixels(JPEGS[kind], 1).astype(int) - luma(pixels(JPEGS[kind], 3))
        assert abs(difference).mean() < 1.5


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged metadata it can do without
def test_damaged_jpegs_are_judged_by_pillow():
    """Cut, spliced or with other bits: the same pixels, or the same refusal, as by Pillow alone."""
    rng = np.random.default_rng(3)
    files = list(JPEGS.values())
    outcomes = {"pixels": 0, "refused": 0}
    for _ in range(1500):
        data = bytearray(files[rng.integers(len(files))])
        at = int(rng.integers(min(len(data), 900)))
        match rng.integers(4):
            case 0:
                del data[int(rng.integers(len(data))) :]
            case 1:
                data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            case 2:
                del data[at : at + int(rng.integers(1, 4))]
            case _:
                data[at] = rng.integers(256)
        results = []
        for read in (decode, lambda data, channels: by_pillow(data, channels)):
            try:
                if open_picture(bytes(data), channels=3).height > 500:
                    break  # a damaged height; slow
                results.append(read(bytes(data), channels=3))
            except DataError as error:
                results.append(str(error))
        if len(results) == 2:
            assert np.array_equal(*results)
            outcomes["refused" if isinstance(results[0], str) else "pixels"] += 1
    assert min(outcomes.values()) > 300, outcomes


def test_16_bit_colours_keep_their_high_byte():
    deep = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.array_equal(pixels(data, 3), deep >> 8)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(format):
    first, second = (Image.fromarray(RNG.integers(0, 256, (6, 9, 3), dtype=np.uint8)) for _ in range(2))
    data = encode(first, format, save_all=True, append_images=[second], lossless=True)
    assert np.array_equal(pixels(data, 3), np.asarray(first))


def bomb_jpeg():
    """A header of 65,000 x 65,000 pixels."""
    data = JPEGS["420"]
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", 65_000, 65_000) + data[at + 9 :]


def bomb_webp(kind):
    sides = struct.pack("<I", 16382 | 16382 << 14)
    body = {
        b"VP8X": b"\0" * 4 + b"\xfe\x3f\0" * 2,
        b"VP8L": b"\x2f" + sides,
        b"VP8 ": b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383),
    }[kind] + bytes(40)
    return b"RIFF" + struct.pack("<I", len(body) + 12) + b"WEBP" + kind + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "data", [bomb_jpeg(), *map(bomb_webp, (b"VP8X", b"VP8L", b"VP8 "))], ids=["JPEG", "VP8X", "VP8L", "VP8"]
)
def test_bombs_are_refused_by_their_header(data):
    with pytest.raises(DataError, match=f"65000 x 65000 .* {MAX_PIXELS}|16383 x 16383 .* {MAX_PIXELS}"):
        decode(data, channels=3)


def test_sizes_of_real_webp_headers():
    for options in ({"lossless": True}, {"quality": 50}, {"exif": EXIF}):
        data = encode(photograph(70, 50), "WEBP", **options)
        assert module._webp_size(data[:30]) == (50, 70)
    assert module._webp_size(b"RIFF") == (0, 0)


def test_large_jpegs_are_decoded_smaller_where_less_is_needed():
    for name in ("420", "grey", "turned"):
        full, half = decode(JPEGS[name], channels=3), decode(JPEGS[name], channels=3, need=(26, 26))
        assert half.shape == ((57, 40, 3) if name == "turned" else (40, 57, 3))
        even = np.pad(full, [(0, side % 2) for side in full.shape[:2]] + [(0, 0)], mode="edge").astype(float)
        means = (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4
        assert np.abs(half - means).mean() < 3
    assert decode(JPEGS["420"], channels=3, need=(27, 26)).shape == (80, 113, 3)
    assert decode(JPEGS["420"], channels=1, need=(10, 10)).shape == (20, 29, 1)
    assert decode(JPEGS["420"], channels=3, need=(5, 5)).shape == (10, 15, 3)
    assert decode(JPEGS["RGB"], channels=3, need=(5, 5)).shape == (80, 113, 3)
    assert decode(encode(photograph(80, 113)), channels=3, need=(5, 5)).shape == (80, 113, 3)


def test_what_is_decoded_smaller_keeps_more_than_is_needed():
    assert [shrink_for(at, at) for at in (0.5, 2.9, 3, 7.9, 8, 15.9, 16, 400)] == [1, 1, 2, 2, 4, 4, 8, 8]
    assert shrink_for(100, 2) == shrink_for(2, 100) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ODD)
def test_odd_real_files(vitscale_test_data, name):
    if vitscale_test_data is None:
        pytest.skip("VITSCALE_TEST_DATA is not set")
    data = (vitscale_test_data / "odd" / name).read_bytes()
    verdict = ODD[name]
    for channels in (1, 3):
        if isinstance(verdict, str):
            with pytest.raises(DataError, match=f"^{verdict}"):
                decode(data, channels=channels)
        else:
            found = decode(data, channels=channels)
            assert found.shape == (*verdict, channels)
            assert np.array_equal(found, by_pillow(data, channels))
            fast = name.endswith(".jpg") and not any(part in name for part in OPENED_BY_PILLOW)
            assert by_simplejpeg(data) == fast


def test_all_odd_files_have_a_verdict(vitscale_test_data):
    if vitscale_test_data is None:
        pytest.skip("VITSCALE_TEST_DATA is not set")
    files = {
        path.name
        for path in (vitscale_test_data / "odd").iterdir()
        if path.suffix in (".jpg", ".png", ".webp")
    }
    assert files == set(ODD)


@pytest.mark.parametrize("shards", ["cifar10/cifar10_test_4k.tar", "grocery/grocery_val.tar"])
def test_photographs_are_the_same_by_both(vitscale_test_data, shards):
    if vitscale_test_data is None:
        pytest.skip("VITSCALE_TEST_DATA is not set")
    with tarfile.open(vitscale_test_data / shards) as tar:
        members = [member for member in tar if member.name.endswith(".jpg")][:200]
        for member in members:
            data = tar.extractfile(member).read()
            assert by_simplejpeg(data)
            for channels in (1, 3):
                assert np.array_equal(decode(data, channels=channels), by_pillow(data, channels))
    assert len(members) == 200


def test_read_pixels_tells_by_what_it_divided():
    picture = open_picture(JPEGS["turned"], channels=3)
    assert (picture.height, picture.width, picture.orientation) == (113, 80, 6)
    assert [read_pixels(picture, shrink)[1] for shrink in (1, 2, 8)] == [1, 2, 8]
    assert read_pixels(open_picture(JPEGS["RGB"], channels=3), 8)[1] == 1
