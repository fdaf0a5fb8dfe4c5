"""Ingest: the same input gives the same shards, nothing unreadable gets in, nothing half-written counts."""

import csv
import hashlib
import io
import json
import shutil
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from sklearn.datasets import load_digits

from pipelines.ingest import ingest
from pipelines.ingest.examine import examine_one
from pipelines.ingest.work import MARKER
from tests.conftest import make_png, make_tar
from workers.data.index import DatasetIndex
from workers.errors import ConfigError, DataError
from workers.storage import FileStore, open_store

Photos = Callable[..., Path]


def read_shards(url: str) -> list[tuple[bytes, int]]:
    """Image bytes and label of each sample, in order, as stock webdataset reads them."""
    store = open_store(url)
    tars = sorted(info.key for info in store.list() if info.key.endswith(".tar"))
    streams = ({"url": key, "stream": io.BytesIO(store.read(key))} for key in tars)
    samples = wds.tariterators.group_by_keys(wds.tariterators.tar_file_expander(streams))
    return [
        (next(sample[name] for name in ("jpg", "png", "webp") if name in sample), int(sample["cls"]))
        for sample in samples
    ]


def read_index(url: str) -> list[tuple[bytes, int]]:
    """The same by way of the index."""
    index, store = DatasetIndex.open(url), open_store(url)
    return [
        (
            store.read_range(index.shards[number].name, int(row["image_offset"]), int(row["image_size"])),
            row["label"],
        )
        for number, row in zip(*index.records(0, index.num_samples), strict=True)
    ]


def digests(url: str) -> dict[str, str]:
    """Of all objects but the shard table, which holds ETags."""
    store, table = open_store(url), "_vitscale/shards/"
    keys = [info.key for info in store.list() if not info.key.startswith(table)]
    return {key: hashlib.sha256(store.read(key)).hexdigest() for key in keys}


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(make_png(number))).save(buffer, "JPEG")
    return buffer.getvalue()


def test_digits(tmp_path: Path):
    steps: list[tuple[str, int, int]] = []
    report = ingest("digits", (tmp_path / "a").as_uri(), progress=lambda *step: steps.append(step))
    assert (report.num_train, report.num_validation, report.num_shards) == (1402, 395, 8)
    assert (report.classes, report.num_duplicates) == (tuple("0123456789"), 0)
    assert (report.conflicts, report.skipped, report.format) == ((), (), "digits")
    assert [step for step in steps if step[1] == step[2]] == [
        ("examine", 1797, 1797),
        ("write", 1797, 1797),
        ("index", 8, 8),
    ]

    samples = [*read_shards(report.train_url), *read_shards(report.validation_url)]
    assert samples == [*read_index(report.train_url), *read_index(report.validation_url)]
    found = sorted((np.asarray(Image.open(io.BytesIO(data))).tolist(), label) for data, label in samples)
    data = load_digits()
    pixels = (data.images * 255 / 16).round().astype(int).tolist()
    assert found == sorted(zip(pixels, data.target.tolist(), strict=True))
    for shard in DatasetIndex.open(report.train_url).shards:
        index = DatasetIndex.open(report.train_url)
        assert set(index.records(shard.first, shard.num_samples)[1]["label"]) == set(range(10))


def test_a_folder_per_class(photos: Photos, tmp_path: Path):
    root = photos(cat=30, dog=20)
    (root / "dog" / "more" / "deep").mkdir(parents=True)
    (root / "dog" / "more" / "deep" / "d.o.g.JPEG").write_bytes(jpeg(900))
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "cat" / ".ipynb_checkpoints").mkdir()
    (root / "cat" / ".ipynb_checkpoints" / "x.png").write_bytes(b"broken")
    (root / "cat" / "._000.png").write_bytes(b"broken")
    (root / ".git").mkdir()
    report = ingest(root, (tmp_path / "out").as_uri())
    assert report.classes == ("cat", "dog")
    samples = [*read_shards(report.train_url), *read_shards(report.validation_url)]
    expected = [(make_png(number), 0) for number in range(30)]
    expected += [(make_png(100 + number), 1) for number in range(20)] + [(jpeg(900), 1)]
    assert sorted(samples) == sorted(expected)
    assert DatasetIndex.open(report.train_url).classes == ("cat", "dog")
    assert DatasetIndex.open(report.train_url).fingerprint == report.train_fingerprint
    assert len(DatasetIndex.open(report.train_url).shards) == 4


def test_the_same_images_give_the_same_bytes(photos: Photos, tmp_path: Path):
    root = photos(cat=20, dog=20)
    first = ingest(root, (tmp_path / "a").as_uri())
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)
    second = ingest(tmp_path / "copy", (tmp_path / "b").as_uri())
    assert second.train_fingerprint == first.train_fingerprint
    assert second.validation_fingerprint == first.validation_fingerprint
    tars = [{k: v for k, v in digests(r.destination).items() if k.endswith(".tar")} for r in (first, second)]
    assert tars[0] == tars[1]
    assert len(tars[0]) == first.num_shards


def test_an_image_stays_on_its_side_whatever_its_name_and_company(photos: Photos, tmp_path: Path):
    root = photos(cat=40, dog=40)
    report = ingest(root, (tmp_path / "a").as_uri(), validation=0.3)
    held_out = {data for data, _ in read_shards(report.validation_url)}
    for number, path in enumerate(sorted((root / "cat").iterdir())):
        path.rename(path.with_name(f"renamed-{99 - number}.png"))
    for number in range(10):
        (root / "dog" / f"{number:03d}.png").unlink()
    again = ingest(root, (tmp_path / "b").as_uri(), validation=0.3)
    assert {data for data, _ in read_shards(again.validation_url)} <= held_out
    assert not {data for data, _ in read_shards(again.train_url)} & held_out
    wider = ingest(root, (tmp_path / "c").as_uri(), validation=0.6)
    assert {data for data, _ in read_shards(again.validation_url)} < {
        data for data, _ in read_shards(wider.validation_url)
    }


def test_duplicates_and_conflicting_labels_are_told(photos: Photos, tmp_path: Path):
    root = photos(cat=20, dog=20)
    shutil.copy(root / "cat" / "003.png", root / "cat" / "zzz.png")
    shutil.copy(root / "cat" / "004.png", root / "dog" / "zzz.png")
    report = ingest(root, (tmp_path / "out").as_uri())
    assert report.num_duplicates == 2
    assert report.conflicts == ("dog/zzz.png is cat/004.png",)
    train, held_out = (
        {data for data, _ in read_shards(url)} for url in (report.train_url, report.validation_url)
    )
    assert not train & held_out


def test_a_tar_of_labelled_names(tmp_path: Path):
    members = [("train/", b""), ("train/README.txt", b"hi")]
    members += [(f"train/{number:05d}_{number % 3}.jpg", jpeg(number)) for number in range(60)]
    (tmp_path / "set.tar").write_bytes(make_tar(members))
    report = ingest(tmp_path / "set.tar", (tmp_path / "out").as_uri())
    assert report.classes == ("0", "1", "2")
    samples = [*read_shards(report.train_url), *read_shards(report.validation_url)]
    assert sorted(samples) == sorted((jpeg(number), number % 3) for number in range(60))

    (tmp_path / "classes.txt").write_text("0 air plane\n1 bird\n2 cat\n3 never seen\n")
    named = ingest(tmp_path / "set.tar", (tmp_path / "named").as_uri())
    assert named.classes == ("air plane", "bird", "cat", "never seen")
    for text, reason in [
        ("0 a\n1 b\n", "2.jpg has the label 2, but only 2 classes are named"),
        ("0 a\n2 b\n", "classes.txt, line 2: expected `1 <a new name>`, found '2 b'"),
        ("0 a\n1 a\n", "classes.txt, line 2"),
        ("0 a\n1\n", "classes.txt, line 2"),
    ]:
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(DataError, match=reason):
            ingest(tmp_path / "set.tar", (tmp_path / "bad").as_uri())


def test_gaps_among_the_labels_of_a_tar_must_be_meant(tmp_path: Path):
    members = [(f"{number:02d}_{label}.jpg", jpeg(number)) for number, label in enumerate([0, 1, 3] * 10)]
    (tmp_path / "set.tar").write_bytes(make_tar(members))
    with pytest.raises(DataError, match=r"set.tar: labels go up to 3, but no image has 2; .*classes.txt"):
        ingest(tmp_path / "set.tar", (tmp_path / "out").as_uri())
    (tmp_path / "classes.txt").write_text("0 a\n1 b\n2 c\n3 d\n")
    report = ingest(tmp_path / "set.tar", (tmp_path / "out").as_uri())
    assert {label for _, label in read_shards(report.train_url)} == {0, 1, 3}


def test_shards_are_bounded(photos: Photos, tmp_path: Path):
    root = photos(cat=20, dog=20)
    report = ingest(root, (tmp_path / "out").as_uri(), shard_bytes=5 * 2048, validation=0.25)
    index = DatasetIndex.open(report.train_url)
    assert {shard.num_samples for shard in index.shards[:-1]} == {5}
    assert report.bytes == sum(
        shard.size
        for url in (report.train_url, report.validation_url)
        for shard in DatasetIndex.open(url).shards
    )


def test_limit_takes_images_of_all_classes(photos: Photos, tmp_path: Path):
    root = photos(cat=100, dog=100)
    report = ingest(root, (tmp_path / "out").as_uri(), limit=40)
    assert report.num_train + report.num_validation == 40
    labels = [label for _, label in read_shards(report.train_url)]
    assert min(labels.count(0), labels.count(1)) > 5
    more = ingest(root, (tmp_path / "more").as_uri(), limit=60)
    assert set(read_shards(report.train_url)) < set(read_shards(more.train_url))


# Idempotence.


def test_a_complete_destination_is_left_alone(
    photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root, destination = photos(cat=20, dog=20), (tmp_path / "out").as_uri()
    report = ingest(root, destination)
    before = {info.key: info.etag for info in open_store(destination).list()}

    def refuse(*_: object) -> None:
        raise AssertionError("written to")

    for method in ("write", "upload", "delete", "create"):
        monkeypatch.setattr(FileStore, method, refuse)
    assert ingest(root, destination) == report
    assert {info.key: info.etag for info in open_store(destination).list()} == before
    with pytest.raises(ConfigError, match="already holds another data set, or this one with other options"):
        ingest(root, destination, validation=0.3)
    (root / "cat" / "new.png").write_bytes(make_png(77))
    with pytest.raises(ConfigError, match="choose another destination"):
        ingest(root, destination)
    (root / "cat" / "new.png").unlink()
    shutil.rmtree(tmp_path / "out" / "val" / "_vitscale")
    with pytest.raises(DataError, match="out/val is not indexed"):
        ingest(root, destination)


def test_what_no_ingest_wrote_is_never_touched(photos: Photos, tmp_path: Path):
    mine = tmp_path / "out" / "train" / "train-000000.tar"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"not empty \(it holds train/train-000000.tar\)"):
        ingest(photos(cat=20, dog=20), (tmp_path / "out").as_uri())
    assert mine.read_bytes() == b"mine"


def test_an_interrupted_ingest_is_begun_anew(photos: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whichever of its writes fails: what is left never counts, and none of it stays."""
    root, destination = photos(cat=20, dog=20), (tmp_path / "out").as_uri()
    clean = ingest(root, (tmp_path / "clean").as_uri())

    def interrupt_after(writes: int) -> bool:
        left = writes

        def breaking(method):
            def write(self, key, *arguments):
                nonlocal left
                left -= 1
                if left < 0:
                    raise DataError("the store is down")
                return method(self, key, *arguments)

            return write

        with monkeypatch.context() as patch:
            for name in ("write", "upload"):
                patch.setattr(FileStore, name, breaking(getattr(FileStore, name)))
            try:
                ingest(root, destination, shard_bytes=5 * 2048)
            except DataError:
                return True
            return False

    writes = 0
    while interrupt_after(writes):
        if writes:
            assert json.loads(open_store(destination).read(MARKER))["report"] is None
        report = ingest(root, destination)
        assert digests(report.train_url).keys() == digests(clean.train_url).keys()
        assert report.train_fingerprint == clean.train_fingerprint
        assert report.validation_fingerprint == clean.validation_fingerprint
        shutil.rmtree(tmp_path / "out")
        writes += 4
    assert writes > 40


def test_a_damaged_marker(tmp_path: Path, photos: Photos):
    store = open_store((tmp_path / "out").as_uri())
    for data in (b"", b"[]", b"null", b"{}"):
        store.write(MARKER, data)
        with pytest.raises(DataError, match=r"_vitscale/ingest.json is damaged"):
            ingest("digits", store.url)


# What is refused.


def broken_images() -> dict[str, bytes]:
    """One for each way in which a file can fail, without any file from elsewhere."""
    whole_png, whole_jpeg = make_png(1, 64), jpeg(2)
    flipped = bytearray(whole_png)
    flipped[60] ^= 255
    header = whole_png.index(b"IHDR")
    bomb = bytearray(whole_png)
    bomb[header + 4 : header + 12] = struct.pack(">II", 20_000, 20_000)
    bomb[header + 17 : header + 21] = struct.pack(">I", zlib.crc32(bomb[header : header + 17]))
    gif = io.BytesIO()
    Image.new("L", (8, 8)).save(gif, "GIF")
    return {
        "empty.png": b"",
        "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "cut.png": whole_png[: len(whole_png) // 2],
        "cut.jpg": whole_jpeg[:-40],
        "flipped.png": bytes(flipped),
        "bomb.png": bytes(bomb),
        "gif.png": gif.getvalue(),
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }


def test_unreadable_images_are_all_named(photos: Photos, tmp_path: Path):
    root, destination = photos(cat=20, dog=20), (tmp_path / "out").as_uri()
    broken = broken_images()
    for name, data in broken.items():
        (root / "dog" / name).write_bytes(data)
    with pytest.raises(DataError, match="8 of 48 images cannot be read") as caught:
        ingest(root, destination)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == [f"dog/{name}" for name in sorted(broken)]
    for name in ("pointer.jpg", "gif.png", "postscript.jpg"):
        assert f"  dog/{name}: not a JPEG, PNG or WebP image" in lines, "no other decoder is tried"
    assert lines[0].startswith("  dog/bomb.png: DecompressionBombError: Image size (400000000 pixels)")
    assert not list((tmp_path / "out").rglob("*.tar"))

    report = ingest(root, destination, skip_unreadable=True)
    assert [reason.split(":")[0] for reason in report.skipped] == [f"dog/{name}" for name in sorted(broken)]
    assert report.num_train + report.num_validation == 40
    assert ingest(root, destination, skip_unreadable=True) == report

    for number in range(20):
        (root / "cat" / f"broken-{number:02d}.png").write_bytes(b"?")
    with pytest.raises(DataError, match=r"28 of 68 (.|\n)*broken-09.png: [^\n]*\n  and 18 more$"):
        ingest(root, (tmp_path / "other").as_uri())


def test_images_over_pillows_pixel_limit_are_refused(monkeypatch: pytest.MonkeyPatch):
    """Pillow itself only warns up to twice its limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63)
    warnings.simplefilter("ignore")
    assert examine_one(make_png(1), decode=True).problem == "ValueError: 8 x 8 pixels, more than 63"


def test_an_image_is_named_by_what_it_is(photos: Photos, tmp_path: Path):
    root = photos(cat=20, dog=20)
    for path in (root / "cat").iterdir():
        path.rename(path.with_suffix(".jpg"))
    report = ingest(root, (tmp_path / "out").as_uri())
    assert len(read_shards(report.train_url)) == report.num_train
    tars = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*.tar"))
    assert b".jpg" not in tars


def test_images_that_change_meanwhile(photos: Photos, tmp_path: Path):
    root, destination = photos(cat=24, dog=24), (tmp_path / "out").as_uri()
    image = root / "cat" / "000.png"

    def when_all_are_examined(action: Callable[[], object]) -> Callable[[str, int, int], None]:
        def progress(phase: str, done: int, total: int) -> None:
            if phase == "examine" and done == total:
                action()

        return progress

    with pytest.raises(DataError, match=r"cat/000.png changed while it was ingested; ingest again"):
        ingest(root, destination, progress=when_all_are_examined(lambda: image.write_bytes(make_png(50))))
    image.write_bytes(make_png(0))
    with pytest.raises(DataError, match=r"cannot read .*cat/000.png: No such file"):
        ingest(root, destination, progress=when_all_are_examined(image.unlink))


def test_sources_that_cannot_work(photos: Photos, tmp_path: Path):
    destination = (tmp_path / "out").as_uri()

    def refused(source: Path | str, kind: type[Exception], reason: str, **options: float) -> None:
        with pytest.raises(kind, match=reason):
            ingest(source, destination, **options)

    refused(tmp_path / "missing", ConfigError, "missing': no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", DataError, "empty has no sub-folders")
    root = photos(cat=20)
    refused(root, DataError, "at least two classes, found: cat")
    (root / "dog").mkdir()
    refused(root, DataError, "photos/dog has no images")
    (root / "dog" / "a.png").write_bytes(make_png(100))
    (root / "stray.png").write_bytes(make_png(101))
    refused(root, DataError, "stray.png lies in no class's folder")
    (root / "stray.png").unlink()
    refused(root, DataError, r"class '...' \(label .\) has images for validation only", validation=0.999)
    refused(root, DataError, "no image falls to validation", validation=1e-9)
    for share in (0.0, 1.0, -1.0):
        refused(root, ConfigError, "validation: expected a share", validation=share)
    refused(root, ConfigError, "limit: expected a positive number, got 0", limit=0)
    refused(root, ConfigError, "shard_bytes: expected a positive number", shard_bytes=0)
    refused(root, ConfigError, "processes: expected a positive number", processes=0)
    refused(root, ConfigError, "--resize 0", resize=0)
    refused(root, ConfigError, "--reencode gif: expected jpeg, webp, png", reencode="gif")
    refused(root, ConfigError, "--quality 101", quality=101)
    (root / "cat").rename(root / "train")
    refused(root, DataError, "holds the split 'train' and the folder 'dog'")
    (root / "dog").rename(root / "val")
    refused(root, DataError, "train/000.png lies in no class's folder; expected train/<class>/000.png")

    tar = tmp_path / "x.tar"
    whole = make_tar([("0_0.jpg", jpeg(0)), ("1_1.jpg", jpeg(1))])
    tar.write_bytes(whole[:1500])
    refused(tar, DataError, "x.tar: truncated")
    tar.write_bytes(make_tar([("README", b"hi")]))
    refused(tar, DataError, "x.tar holds no images")
    tar.write_bytes(make_tar([("0001.jpg", jpeg(0)), ("0001.cls", b"0")]))
    refused(tar, DataError, "at least two classes, found: 0")
    tar.write_bytes(make_tar([("0001.jpg", jpeg(0)), ("0002.jpg", jpeg(1))]))
    refused(tar, DataError, "'0001.jpg' ends in no label, expected <name>_<label>.jpg, or WebDataset samples")
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_destinations_that_cannot_work(photos: Photos, tmp_path: Path):
    for destination in ("out", "gs://bucket/x", "http://x/y"):
        with pytest.raises(ConfigError, match="is not a store"):
            ingest("digits", destination)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(DataError, match=r"file/_vitscale/ingest.json"):
        ingest(photos(cat=20, dog=20), (tmp_path / "file").as_uri())


# Real data, where there is some.


def test_real_images_come_back_as_they_went(vitscale_test_data: Path | None, tmp_path: Path):
    """CIFAR-10's own JPEGs where the machine has them, synthetic ones elsewhere."""
    if vitscale_test_data is None:
        source = tmp_path / "set.tar"
        source.write_bytes(
            make_tar((f"x/{number:05d}_{number % 2}.jpg", jpeg(number)) for number in range(100))
        )
    else:
        source = vitscale_test_data / "cifar10" / "cifar10_test_4k.tar"
    report = ingest(source, (tmp_path / "out").as_uri(), limit=1000)
    with tarfile.open(source) as tar:
        originals = {
            (tar.extractfile(member).read(), int(member.name.rpartition("_")[2].removesuffix(".jpg")))
            for member in tar
            if member.isfile()
        }
    assert report.num_train + report.num_validation == min(1000, len(originals))
    for url in (report.train_url, report.validation_url):
        assert read_shards(url) == read_index(url)
        assert set(read_shards(url)) <= originals


def test_odd_images_are_told_apart(vitscale_test_data: Path | None):
    """Files broken and merely odd: as their notes have it, or synthetic ones elsewhere."""
    if vitscale_test_data is None:
        files = broken_images() | {"ok.png": make_png(1), "ok.jpg": jpeg(2)}
        expected = {name: name.startswith("ok.") for name in files}
    else:
        notes = csv.DictReader((vitscale_test_data / "odd" / "NOTES.csv").read_text().splitlines())
        expected = {row["file"]: row["strict_load"] == "ok" for row in notes}
        files = {name: (vitscale_test_data / "odd" / name).read_bytes() for name in expected}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name: not examine_one(data, decode=True).problem for name, data in files.items()}
    assert found == expected


def test_a_destination_inside_of_the_source_is_refused(photos):
    root = photos(cat=5, dog=5)
    for destination in (root.as_uri(), f"{root.as_uri()}/out"):
        with pytest.raises(ConfigError, match=r"lies in the source .*; choose a destination outside of it"):
            ingest(root, destination)
    assert sorted(path.name for path in root.iterdir()) == ["cat", "dog"]


def test_a_folder_named_like_the_built_in_digits_may_hold_the_destination(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    report = ingest("digits", (tmp_path / "digits" / "out").as_uri(), limit=40)
    assert report.format == "digits"


def test_an_index_beside_the_images_is_no_class(photos, store_url):
    root = photos(cat=8, dog=8)
    (root / "_vitscale" / "samples").mkdir(parents=True)
    (root / "_vitscale" / "samples" / "x.bin").write_bytes(b"rows")
    assert ingest(root, store_url, validation=0.4).classes == ("cat", "dog")


def test_labels_as_pandas_writes_them_are_numbers(tmp_path, store_url):
    lines = ["image,label"]
    for number in range(110):
        (tmp_path / f"{number}.png").write_bytes(make_png(number))
        lines.append(f"{number}.png,{number % 11}.0")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    report = ingest(tmp_path / "table.csv", store_url, validation=0.3)
    assert report.classes == tuple(map(str, range(11)))
