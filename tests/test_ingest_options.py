"""What ingest does to images when it is asked: other pixels; and what it says of equal ones."""

import io
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.data_commands import parse_size
from pipelines.ingest import ingest
from pipelines.ingest.encode import BYTES_PER_PIXEL, Encoding
from pipelines.ingest.examine import examine_one
from tests.test_ingest import read_shards
from workers.data.decode import decode
from workers.errors import ConfigError, DataError

VITSCALE = [sys.executable, "-m", "pipelines.cli"]


def smooth(width: int, height: int, grey: bool = False) -> Image.Image:
    """Gradients, so that shrinking and JPEG change them little."""
    y, x = np.mgrid[:height, :width]
    planes = [255 * x / width, 255 * y / height, 255 - 255 * x / width]
    pixels = np.stack(planes[:1] if grey else planes, 2).astype(np.uint8)
    return Image.fromarray(pixels.squeeze() if grey else pixels)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encode(data: bytes, encoding: Encoding) -> tuple[Image.Image, str, bytes]:
    found = examine_one(data, decode=True)
    made, extension = encoding.encode(data, found.width, found.height, found.extension)
    return Image.open(io.BytesIO(made)), extension, made


@pytest.mark.parametrize(("codec", "kind"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("png", "PNG")])
def test_shrunk_and_encoded_again(codec: str, kind: str) -> None:
    data = encoded(smooth(400, 300), "JPEG", quality=95)
    encoding = Encoding(resize=90, codec=codec, quality=90)
    image, extension, made = encode(data, encoding)
    assert (image.format, image.size, image.mode) == (kind, (120, 90), "RGB")
    assert extension == ("jpg" if codec == "jpeg" else codec)
    expected = np.asarray(smooth(400, 300).resize((120, 90), Image.Resampling.BICUBIC), float)
    assert np.abs(np.asarray(image, float) - expected).mean() < 3
    assert encode(data, encoding)[2] == made
    small, _, again = encode(encoded(smooth(40, 30), "PNG"), encoding)
    assert small.size == (40, 30), "never enlarged"
    assert encode(again, Encoding(codec=codec))[0].size == (40, 30)


def test_without_a_codec_only_large_images_change() -> None:
    encoding = Encoding(resize=90)
    for kind in ("JPEG", "PNG", "WEBP"):
        small = encoded(smooth(90, 200), kind)
        assert encode(small, encoding)[2] == small
        image, _, made = encode(encoded(smooth(91, 200), kind), encoding)
        assert (image.format, image.size) == (kind, (90, 198))
        assert len(made) < 3 * len(small)
    assert (Encoding().changes, str(Encoding())) == (False, "")
    assert str(encoding) == "shorter side at most 90, own codec, quality 90"


def test_orientation_is_applied_and_metadata_goes() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a camera"
    data = encoded(smooth(60, 40), "JPEG", exif=exif.tobytes(), icc_profile=b"x" * 200, quality=95)
    image, _, made = encode(data, Encoding(codec="jpeg", quality=95))
    assert image.size == (40, 60)
    assert not image.getexif() and "icc_profile" not in image.info and b"camera" not in made
    upright = decode(data, channels=3).astype(int)
    assert np.abs(decode(made, channels=3).astype(int) - upright).mean() < 2
    image, _, _ = encode(data, Encoding(resize=20))
    assert image.size == (20, 30)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("RGB", "RGB"), ("L", "L"), ("LA", "L"), ("RGBA", "RGB"), ("P", "RGB"), ("1", "L"), ("I;16", "L")],
)
def test_colours_become_rgb_or_grey(mode: str, expected: str) -> None:
    source = smooth(40, 30, grey=expected == "L")
    image = (
        Image.fromarray(np.asarray(source).astype(np.uint16) * 257)
        if mode == "I;16"
        else source.convert(mode)
    )
    for codec in ("jpeg", "webp", "png"):
        found, _, made = encode(encoded(image, "PNG"), Encoding(codec=codec))
        # WebP has no grey.
        assert found.mode == ("RGB" if codec == "webp" else expected)
        if mode != "1":
            plain = np.asarray(source.convert("RGB"), int)
            tolerance = 25 if mode == "P" else 4
            assert np.abs(decode(made, channels=3).astype(int) - plain).mean() < tolerance


def test_shards_of_changed_images(tmp_path: Path, photos: Callable[..., Path]) -> None:
    root = tmp_path / "large"
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for number in range(15):
            smooth(100 + number, 80 + label).save(root / name / f"{number}.jpg", quality=60 + number)
    plain = ingest(root, (tmp_path / "plain").as_uri(), validation=0.3)
    report = ingest(root, (tmp_path / "a").as_uri(), validation=0.3, resize=40, reencode="webp", quality=80)
    assert report.encoding == "shorter side at most 40, webp, quality 80"
    assert (report.num_train, report.num_validation) == (plain.num_train, plain.num_validation)
    sizes = {Image.open(io.BytesIO(data)).size[1] for data, _ in read_shards(report.train_url)}
    assert sizes == {40}
    assert [label for _, label in read_shards(report.train_url)] == [
        label for _, label in read_shards(plain.train_url)
    ]
    tables = [pq.read_table(tmp_path / name / "_vitscale/ingest/items.parquet") for name in ("plain", "a")]
    assert tables[0].equals(tables[1]), "the same images on the same sides in the same order"
    again = ingest(
        root, (tmp_path / "b").as_uri(), validation=0.3, resize=40, reencode="webp", quality=80, processes=2
    )
    assert again.train_fingerprint == report.train_fingerprint
    with pytest.raises(ConfigError, match="already holds another data set, or this one with other options"):
        ingest(root, (tmp_path / "b").as_uri(), validation=0.3)


def test_odd_images_encode(vitscale_test_data: Path | None) -> None:
    """All real photographs that can be decoded can be encoded, and come out upright."""
    if vitscale_test_data is None:
        files = [encoded(smooth(60, 40), kind) for kind in ("JPEG", "PNG", "WEBP")]
    else:
        files = [path.read_bytes() for path in sorted((vitscale_test_data / "odd").iterdir())]
    done = 0
    warnings.simplefilter("ignore")
    for data in files:
        found = examine_one(data, decode=True)
        if not found.problem:
            image, _, _ = encode(data, Encoding(resize=64, codec="jpeg"))
            shape = decode(data, channels=3).shape[:2]
            assert (shape[0] > shape[1]) == (image.height > image.width) or shape[0] == shape[1]
            assert min(image.size) == min(64, *shape)
            done += 1
    assert done >= 3


def test_estimates_of_encoded_photographs(vitscale_test_data: Path | None) -> None:
    """Within a factor of two and a half: enough for the size of shards."""
    if vitscale_test_data is None:
        pytest.skip("needs photographs")
    for name in (
        "exif__Landscape_0.jpg",
        "caltech__airplanes_image_0493_wide397x104.jpg",
        "pillow__junk_jpeg_header.jpg",
    ):
        data = (vitscale_test_data / "odd" / name).read_bytes()
        found = examine_one(data, decode=True)
        for codec in BYTES_PER_PIXEL:
            encoding = Encoding(resize=320, codec=codec)
            guess = encoding.estimate(found.width, found.height, len(data), "jpg")
            assert 0.4 < len(encode(data, encoding)[2]) / guess < 2.5, (name, codec)


# Equal images.


@pytest.fixture
def twins(photos: Callable[..., Path]) -> Path:
    """Twenty cats, twenty dogs; cat 3 twice, cat 4 also as a dog, dog 5 three times."""
    root = photos(cat=20, dog=20)
    shutil.copy(root / "cat" / "003.png", root / "cat" / "y.png")
    shutil.copy(root / "cat" / "004.png", root / "dog" / "z.png")
    for name in ("v", "w"):
        shutil.copy(root / "dog" / "005.png", root / "dog" / f"{name}.png")
    return root


def names(root: Path) -> set[str]:
    return set(pq.read_table(root / "_vitscale/ingest/items.parquet")["name"].to_pylist())


def test_equal_images_are_kept_and_told(twins: Path, tmp_path: Path) -> None:
    report = ingest(twins, (tmp_path / "out").as_uri())
    assert (report.num_duplicates, report.num_conflicts, report.num_leaks, report.num_dropped) == (4, 1, 0, 0)
    assert set(report.duplicates) == {
        "cat/y.png is cat/003.png",
        "dog/z.png is cat/004.png",
        "dog/v.png is dog/005.png",
        "dog/w.png is dog/005.png",
    }
    assert report.conflicts == ("dog/z.png is cat/004.png",)
    assert len(names(tmp_path / "out")) == report.num_train + report.num_validation == 44


def test_one_of_equal_images_and_none_whose_label_nobody_knows(twins: Path, tmp_path: Path) -> None:
    report = ingest(twins, (tmp_path / "out").as_uri(), drop_duplicates=True)
    everything = {path.relative_to(twins).as_posix() for path in twins.rglob("*.png")}
    gone = everything - names(tmp_path / "out")
    assert gone == {"cat/y.png", "cat/004.png", "dog/z.png", "dog/v.png", "dog/w.png"}
    assert (report.num_dropped, report.num_train + report.num_validation) == (5, 39)


def test_conflicts_can_be_refused(twins: Path, tmp_path: Path) -> None:
    url = (tmp_path / "out").as_uri()
    told = r"1 images have the bytes of another one with another label:\n  dog/z.png is cat/004.png"
    with pytest.raises(DataError, match=told):
        ingest(twins, url, refuse_conflicts=True)
    assert not list((tmp_path / "out").rglob("*.tar"))
    assert ingest(twins, url).num_conflicts == 1
    with pytest.raises(DataError, match=told):
        ingest(twins, url, refuse_conflicts=True)


def test_an_image_in_two_splits_is_a_leak(photos: Callable[..., Path], tmp_path: Path) -> None:
    plain = photos(cat=6, dog=6)
    root = tmp_path / "splits"
    for split in ("train", "val"):
        shutil.copytree(plain, root / split)
    for number in range(6):
        for name in ("cat", "dog"):
            (root / ("val" if number % 2 else "train") / name / f"{number:03d}.png").unlink()
    shutil.copy(root / "val" / "cat" / "000.png", root / "train" / "cat" / "a.png")
    report = ingest(root, (tmp_path / "a").as_uri())
    assert report.leaks == ("val/cat/000.png (val) is train/cat/a.png (train)",)
    dropped = ingest(root, (tmp_path / "b").as_uri(), drop_duplicates=True)
    assert (dropped.num_train, dropped.num_validation) == (6, 6), "what judges the model is kept"
    assert "train/cat/a.png" not in names(tmp_path / "b")


def test_real_labels_in_conflict(vitscale_test_data: Path | None, tmp_path: Path) -> None:
    """TrashNet has the same photograph as glass and as metal or plastic."""
    if vitscale_test_data is None:
        pytest.skip("needs the odd images")
    root = tmp_path / "odd"
    for path in (vitscale_test_data / "odd").glob("labelconflict__*"):
        _, label, name = path.name.split("__")
        (root / label).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, root / label / name)
        for number in range(8):
            smooth(30 + number, 40 + ord(label[0])).save(root / label / f"{number}.png")
    told = r"3 images have the bytes of another one(.|\n)*  metal/metal91.jpg is glass/glass115.jpg"
    with pytest.raises(DataError, match=told):
        ingest(root, (tmp_path / "out").as_uri(), validation=0.3, refuse_conflicts=True)


# The command.


def test_the_command_s_json_and_its_words(twins: Path, tmp_path: Path) -> None:
    (twins / "cat" / "notes.txt").write_text("hi")
    url = (tmp_path / "out").as_uri()
    command = [*VITSCALE, "ingest", str(twins), url, "--shard-size", "20k"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["destination"], report["format"], report["num_duplicates"]) == (url, "folder", 4)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    for line in (
        "  1 files are no JPEG",
        "  4 images have the bytes",
        "    dog/z.png is cat/004.png",
        "read as folder",
    ):
        assert line in done.stdout


def test_sizes() -> None:
    sizes = {
        "256M": 256 << 20,
        "1G": 1 << 30,
        "20k": 20 << 10,
        "500000": 500_000,
        "2 GiB".replace(" ", ""): 2 << 30,
    }
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "0", "1.5G", "G", "-1M", "5X"):
        with pytest.raises(ConfigError, match="--shard-size"):
            parse_size(text)
