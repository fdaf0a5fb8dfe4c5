"""Sources: each kind is recognised, read as its own libraries read it, and refused by file, row or byte."""

import csv
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.ingest import ingest
from pipelines.sources import Item, SourceOptions, open_source
from pipelines.sources import files as source_files
from pipelines.sources.content import contents
from pipelines.sources.files import read_range
from pipelines.sources.inert_pickle import read_batch
from tests.conftest import make_png, make_tar
from tests.test_ingest import read_shards
from workers.errors import ConfigError, DataError, VitscaleError


def read(
    source: Path | str, **options: object
) -> tuple[str, tuple[str, ...], list[tuple[str, int, str, bytes]]]:
    """Format, classes, and each item's name, label, split and bytes."""
    found = open_source(source, SourceOptions(**options))  # type: ignore[arg-type]
    items = [Item(**row) for row in found.items.to_pylist()]
    images = [
        read_range(item.object, item.offset, item.size, item.etag)
        if item.form == "file"
        else next(contents([item]))
        for item in items
    ]
    rows = [(item.name, item.label, item.split, data) for item, data in zip(items, images, strict=True)]
    return found.format, found.classes, rows


def refused(source: Path | str, kind: type[Exception], reason: str, **options: object) -> None:
    with pytest.raises(kind, match=reason):
        read(source, **options)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """images/0.png to 5.png."""
    folder = tmp_path / "set" / "images"
    folder.mkdir(parents=True)
    for number in range(6):
        (folder / f"{number}.png").write_bytes(make_png(number))
    return folder


# Folders.


def test_splits_above_the_classes_are_kept(photos: Callable[..., Path], tmp_path: Path) -> None:
    root = photos(cat=8, dog=8)
    for split in ("train", "Validation", "test"):
        (root / split).mkdir()
        for name in ("cat", "dog"):
            (root / split / name).mkdir()
    for number in range(8):
        split = ("train", "train", "Validation", "test")[number % 4]
        for name in ("cat", "dog"):
            (root / name / f"{number:03d}.png").rename(root / split / name / f"{number}.png")
    (root / "cat").rmdir()
    (root / "dog").rmdir()
    report = ingest(root, (tmp_path / "out").as_uri())
    assert (report.num_train, report.num_validation, report.num_test) == (8, 4, 4)
    assert report.classes == ("cat", "dog")
    for url, numbers in (
        (report.train_url, {0, 1, 4, 5}),
        (report.validation_url, {2, 6}),
        (report.test_url, {3, 7}),
    ):
        assert set(read_shards(url)) == {
            (make_png(100 * label + n), label) for label in (0, 1) for n in numbers
        }

    with pytest.raises(ConfigError, match="the source has no test split, or one for validation too"):
        ingest(root, (tmp_path / "b").as_uri(), test_as_validation=True)
    for path in (root / "Validation").rglob("*.png"):
        path.rename(root / "train" / path.parent.name / path.name)
    for folder in ("Validation/cat", "Validation/dog", "Validation"):
        (root / folder).rmdir()
    carved = ingest(root, (tmp_path / "c").as_uri(), validation=0.4)
    assert carved.num_train + carved.num_validation == 12
    assert carved.num_test == 4
    assert 0 < carved.num_validation < 8
    moved = ingest(root, (tmp_path / "d").as_uri(), test_as_validation=True)
    assert (moved.num_train, moved.num_validation, moved.num_test) == (12, 4, 0)
    assert moved.validation_fingerprint
    for path in list((root / "train").rglob("*.png")):
        path.unlink()
    (root / "train" / "cat").rmdir()
    (root / "train" / "dog").rmdir()
    (root / "train").rmdir()
    with pytest.raises(DataError, match="images for test, none to train on"):
        ingest(root, (tmp_path / "e").as_uri())


def test_links_that_leave_the_folder_are_named(photos: Callable[..., Path], tmp_path: Path) -> None:
    root = photos(cat=2, dog=2)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.png").write_bytes(make_png(50))
    (root / "cat" / "inside.png").symlink_to(root / "dog" / "000.png")
    (root / "cat" / "notes.txt").symlink_to(elsewhere / "nothing")
    assert len(read(root)[2]) == 5
    (root / "cat" / "x.png").symlink_to(elsewhere / "x.png")
    refused(root, DataError, "cat/x.png is a link to the file .*elsewhere/x.png; .* --follow-links")
    assert ("cat/x.png", 0, "", make_png(50)) in read(root, follow_links=True)[2]
    (root / "cat" / "x.png").unlink()
    (root / "bird").symlink_to(elsewhere)
    refused(root, DataError, "bird is a link to the folder")
    assert ("bird/x.png", 0, "", make_png(50)) in read(root, follow_links=True)[2]
    (root / "cat" / "loop").symlink_to(root)
    refused(root, DataError, "cat/loop is a link to a folder that holds it", follow_links=True)


def test_names_that_no_text_can_hold(photos: Callable[..., Path]) -> None:
    root = photos(cat=1, dog=1)
    (root / "cat" / os.fsdecode(b"\xff.png")).write_bytes(make_png(9))
    refused(root, DataError, r"udcff.png': its name is no UTF-8; rename the file")


def test_files_that_are_no_images_are_counted(photos: Callable[..., Path], tmp_path: Path) -> None:
    root = photos(cat=8, dog=8)
    for number in range(12):
        (root / "cat" / f"{number:02d}.gif").write_bytes(b"GIF")
    report = ingest(root, (tmp_path / "out").as_uri(), validation=0.4)
    assert report.num_ignored == 12
    assert report.ignored == tuple(f"cat/{number:02d}.gif" for number in range(10))


# Tables.


def write_csv(path: Path, rows: list[dict[str, object]], delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(
    ("name", "delimiter"), [("t.csv", ","), ("t.csv", ";"), ("t.tsv", "\t"), ("t.jsonl", "")]
)
def test_a_table_with_image_files(images: Path, name: str, delimiter: str) -> None:
    table = images.parent / name
    paths = [f"images/{n}.png" for n in range(3)] + [str(images / f"{n}.png") for n in range(3, 6)]
    rows: list[dict[str, object]] = [
        {
            "note": 'a, "b"\nc',
            "File_Name": path,
            "class": ("dog", "cat")[n % 2],
            "split": ("train", "valid")[n > 3],
        }
        for n, path in enumerate(paths)
    ]
    if delimiter:
        write_csv(table, rows, delimiter)
    else:
        table.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    for source in (table, images.parent):
        if source == images.parent:
            continue
        kind, classes, found = read(source)
        assert (kind, classes) == ("table", ("cat", "dog"))
        assert found == [
            (path, (1, 0)[n % 2], ("train", "val")[n > 3], make_png(n)) for n, path in enumerate(paths)
        ]


def test_numbered_labels_with_names_in_another_column(images: Path) -> None:
    table = images.parent / "t.csv"
    rows = [{"path": f"images/{n}.png", "label": n % 3, "class": "cba"[n % 3]} for n in range(6)]
    write_csv(table, rows)
    _, classes, found = read(table)
    assert classes == ("c", "b", "a")
    assert [label for _, label, _, _ in found] == [0, 1, 2, 0, 1, 2]
    write_csv(table, [{**row, "class": "x"} for row in rows])
    assert read(table)[1] == ("0", "1", "2")
    write_csv(table, [{"path": row["path"], "label": (0, 1, 5)[n % 3]} for n, row in enumerate(rows)])
    refused(table, DataError, r"labels go up to 5, but no image has 2; .*--class-map FILE, or .*/classes.txt")
    names = {name: number for number, name in enumerate("abcdefg")}
    _, classes, found = read(table, class_map=names)
    assert (classes, {label for _, label, _, _ in found}) == (tuple("abcdefg"), {0, 1, 5})


def test_what_is_wrong_with_a_table_is_told_by_its_line(images: Path) -> None:
    table = images.parent / "t.csv"

    def refuse(text: str, reason: str, kind: type[Exception] = DataError, **options: object) -> None:
        table.write_text(text)
        refused(table, kind, reason, **options)

    refuse(
        "image,label\nimages/0.png,a\nimages/9.png,b\n../8.png,b\n",
        r"names 2 files .*\n  line 3: images/9.png\n",
    )
    refuse("image,label\nimages/0.png,a\nx\n", r"t.csv, line 3: 1 values, the header has 2")
    refuse("image,label\nimages/0.png,\n", r"line 2: column 'label' has '', expected a number or a name")
    refuse("image,label\n,a\n", r"line 2: column 'image' has '', expected a file's path")
    refuse(
        "image,label,split\nimages/0.png,a,dev2\n", r"line 2: the split 'dev2'; expected train, val or test"
    )
    refuse(
        "a,b\nimages/0.png,a\n",
        r"none of its columns \(a, b\) is called label, .* --label-column",
        ConfigError,
    )
    refuse("a,b\n1,2\n", "--label-column: .* has no column 'c', only a, b", ConfigError, label_column="c")
    refuse("image,image\n", "two or more distinct columns")
    refuse("image,label\n", "t.csv has no rows")
    refuse("image,label\nimages/0.png,-1\n", "0.png has the label -1; labels start at 0")
    table.write_bytes(b"image,label\n\xff\xfe,a\n")
    refused(table, DataError, "no UTF-8 text")
    lines = images.parent / "t.jsonl"
    for text, reason in (
        ('{"image": "images/0.png", "label": 1.5}\n', "line 1: column 'label' has 1.5"),
        ('{"image": "images/0.png", "label": "a"}\n{"im\n', "line 2: no JSON"),
        ("[1]\n", "line 1: expected an object"),
    ):
        lines.write_text(text)
        refused(lines, DataError, reason)


def test_a_table_of_images_in_tars_beside_it(tmp_path: Path, vitscale_test_data: Path | None) -> None:
    """The grocery photographs' own table names members of three tars."""
    if vitscale_test_data is None:
        (tmp_path / "t.csv").write_text("file,split,label,class\nx/a.png,train,0,b\nx/b.png,test,1,a\n")
        (tmp_path / "x.tar").write_bytes(make_tar([("x/a.png", make_png(1)), ("x/b.png", make_png(2))]))
        table, sizes, some = tmp_path / "t.csv", {"train": 1, "test": 1}, "b"
    else:
        table = vitscale_test_data / "grocery" / "grocery_labels.csv"
        sizes, some = {"train": 2640, "val": 296, "test": 405}, "Golden-Delicious"
    found = open_source(table)
    splits = found.items["split"].to_pylist()
    assert {split: splits.count(split) for split in set(splits)} == sizes
    assert found.classes[0] == some
    row = Item(**found.items.slice(len(found.items) - 1, 1).to_pylist()[0])
    with tarfile.open(row.object) as tar:
        assert read_range(row.object, row.offset, row.size, row.etag) == tar.extractfile(row.name).read()


def test_a_folder_that_could_be_two_things_is_asked_about(images: Path) -> None:
    (images.parent / "labels.csv").write_text("image,label\nimages/0.png,a\nimages/1.png,b\n")
    refused(images.parent, ConfigError, "could be read as table or folder; say which: --format table")
    assert read(images.parent, format="table")[0] == "table"
    assert read(images.parent, format="folder")[1] == ("images",)
    refused(images.parent, ConfigError, "--format zip: expected folder, table", format="zip")
    refused(images.parent, DataError, "holds no file of that format", format="parquet")


def test_a_class_map_gives_the_numbers(photos: Callable[..., Path], tmp_path: Path) -> None:
    root = photos(cat=20, dog=20)
    first = ingest(root, (tmp_path / "a").as_uri())
    assert json.loads((tmp_path / "a" / "classes.json").read_text()) == {"cat": 0, "dog": 1}
    (tmp_path / "map.json").write_text('{"dog": 0, "bird": 1, "cat": 2}')
    report = ingest(root, (tmp_path / "b").as_uri(), class_map=tmp_path / "map.json")
    assert report.classes == ("dog", "bird", "cat")
    assert {(data, (2, 0)[label]) for data, label in read_shards(first.train_url)} == set(
        read_shards(report.train_url)
    )
    for text in ('["dog", "bird", "cat"]', "0 dog\n1 bird\n2 cat\n", "dog\nbird\ncat\n"):
        (tmp_path / "map.json").write_text(text)
        assert ingest(root, (tmp_path / "b").as_uri(), class_map=tmp_path / "map.json") == report
    for text, kind, reason in (
        ('{"dog": 0}', DataError, "cat/000.png: its class 'cat' is not in the class map, which has dog"),
        ('{"dog": 0, "cat": 2}', ConfigError, "expected distinct names with the numbers 0 to n - 1"),
        ('["cat", "cat"]', ConfigError, "expected distinct names"),
        ('{"dog": tru', ConfigError, "is no JSON"),
    ):
        (tmp_path / "map.json").write_text(text)
        with pytest.raises(kind, match=reason):
            ingest(root, (tmp_path / "c").as_uri(), class_map=tmp_path / "map.json")


# Parquet.


def write_parquet(
    path: Path, rows: list[dict[str, object]], features: dict[str, object] | None = None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = (
        pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        if isinstance(rows[0]["image"], dict)
        else pa.binary()
    )
    label = pa.int64() if isinstance(rows[0]["label"], int) else pa.string()
    table = pa.Table.from_pylist(rows, pa.schema([("image", kind), ("label", label)]))
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=7)


def test_parquet_as_hugging_face_has_it(tmp_path: Path) -> None:
    names = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["zebra", "ant"]}}
    data = tmp_path / "set" / "data"
    for split, start, count in (
        ("train-00000-of-00002", 0, 20),
        ("train-00001-of-00002", 20, 3),
        ("test-00000-of-00001", 23, 9),
    ):
        rows = [
            {"image": {"bytes": make_png(n), "path": f"{n}.png"}, "label": n % 2}
            for n in range(start, start + count)
        ]
        write_parquet(data / f"{split}.parquet", rows, names)
    kind, classes, found = read(tmp_path / "set")
    assert (kind, classes) == ("parquet", ("zebra", "ant"))
    # By the files' names: test before train.
    order = [*range(23, 32), *range(23)]
    assert [row[1:] for row in found] == [(n % 2, ("train", "test")[n > 22], make_png(n)) for n in order]
    assert found[9][0] == "data/train-00000-of-00002.parquet[0]"
    report = ingest(tmp_path / "set", (tmp_path / "out").as_uri(), test_as_validation=True)
    assert set(read_shards(report.train_url)) == {(make_png(n), n % 2) for n in range(23)}
    assert set(read_shards(report.validation_url)) == {(make_png(n), n % 2) for n in range(23, 32)}
    assert report.classes == ("zebra", "ant")


def test_parquet_of_plain_bytes_and_names(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, [{"image": make_png(n), "label": ("dog", "cat")[n % 2]} for n in range(10)])
    kind, classes, found = read(path)
    assert (kind, classes) == ("parquet", ("cat", "dog"))
    assert found == [(f"x.parquet[{n}]", (1, 0)[n % 2], "", make_png(n)) for n in range(10)]


def test_parquet_that_cannot_work(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    rows: list[dict[str, object]] = [{"image": make_png(n), "label": n % 2} for n in range(20)]
    write_parquet(path, [*rows[:12], {"image": make_png(12), "label": -1}])
    refused(path, DataError, r"x.parquet, row 12: column 'label' has no label \(-1\)")
    write_parquet(path, rows)
    refused(path, ConfigError, "--image-column: .* column 'label' is int64, no bytes", image_column="label")
    refused(path, ConfigError, "--label-column: .* has no column 'x', only image, label", label_column="x")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    refused(path, DataError, "x.parquet: no Parquet file, or damaged")
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), path)
    refused(path, DataError, "no column of images' bytes: text, label")
    write_parquet(path, [*rows, {"image": None, "label": 1}])
    with pytest.raises(
        DataError, match=r"1 of 21 images cannot be read(.|\n)*x.parquet\[20\]: not a JPEG, PNG or WebP"
    ):
        ingest(path, (tmp_path / "out").as_uri())


# CIFAR.


def cifar_pixels(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), np.uint8)


def python2_batch(values: dict[str, object]) -> bytes:
    """As Python 2's cPickle wrote CIFAR's batches: by hand, since Python 3 names other things."""

    def text(value: str) -> bytes:
        raw = value.encode()
        return b"U" + bytes([len(raw)]) + raw

    def one(value: object) -> bytes:
        if isinstance(value, str):
            return text(value)
        if isinstance(value, int):
            return b"K" + bytes([value]) if value < 256 else b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"]q\x05(" + b"".join(map(one, value)) + b"e"
        assert isinstance(value, np.ndarray)
        head = b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85U\x01b\x87R("
        shape = b"".join(b"J" + struct.pack("<i", side) for side in value.shape) + b"\x86"
        minus_one = b"J\xff\xff\xff\xff"
        kind = b"cnumpy\ndtype\nq\x04U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + 2 * minus_one + b"K\x00tb"
        raw = value.tobytes()
        return head + b"K\x01" + shape + kind + b"\x89" + b"T" + struct.pack("<i", len(raw)) + raw + b"tb"

    body = b"".join(text(key) + one(value) for key, value in values.items())
    return b"\x80\x02}q\x01(" + body + b"u."


def cifar10(seed: int, count: int, labels: int = 10) -> tuple[dict[str, object], np.ndarray]:
    data = cifar_pixels(seed, count)
    values: dict[str, object] = {
        "batch_label": "b",
        "labels": [n % labels for n in range(count)],
        "data": data,
    }
    return {**values, "filenames": [f"{n}.png" for n in range(count)]}, data


def test_the_hand_written_pickle_is_one() -> None:
    """What the inert reader is tested with, Python's own reader understands the same way."""
    values, data = cifar10(1, 12)
    loaded = pickle.loads(python2_batch(values), encoding="latin1")  # our own bytes
    assert loaded["labels"] == values["labels"]
    assert (loaded["data"] == data).all()
    found = read_batch("b", python2_batch(values))
    assert (found["labels"], found["filenames"]) == (values["labels"], values["filenames"])
    array = found["data"]
    assert python2_batch(values)[array.offset :][: data.size] == data.tobytes()
    assert array.shape == (12, 3072)


@pytest.mark.parametrize("packed", ["tar.gz", "tar", "folder"])
def test_cifar_10_in_python_batches(tmp_path: Path, packed: str) -> None:
    parts, members, expected = ["data_batch_1", "data_batch_2", "test_batch"], [], []
    names = [f"name{n}" for n in range(10)]
    members.append(("cifar-10-batches-py/batches.meta", python2_batch({"label_names": names})))
    members.append(("cifar-10-batches-py/readme.html", b"hi"))
    for seed, part in enumerate(parts):
        values, data = cifar10(seed, 30)
        members.append((f"cifar-10-batches-py/{part}", python2_batch(values)))
        for n in range(30):
            expected.append((n % 10, "test" if part == "test_batch" else "train", data[n].reshape(3, 32, 32)))
    if packed == "folder":
        source = tmp_path / "down"
        for name, data in members:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
        assert read(source / "cifar-10-batches-py")[0] == "cifar"
    else:
        source = tmp_path / f"cifar-10-python.{packed}"
        tar = make_tar(members)
        source.write_bytes(gzip.compress(tar) if packed == "tar.gz" else tar)
    kind, classes, found = read(source)
    assert (kind, classes) == ("cifar", tuple(names))
    for row, (label, split, planes) in zip(found, expected, strict=True):
        assert row[1:3] == (label, split)
        assert (pixels(row[3]) == planes.transpose(1, 2, 0)).all()
    assert found[3][0] == "cifar-10-batches-py/data_batch_1[3] 3.png"
    report = ingest(source, (tmp_path / "out").as_uri(), validation=0.3)
    assert (report.num_train + report.num_validation, report.num_test) == (60, 30)
    everything = [
        *read_shards(report.train_url),
        *read_shards(report.validation_url),
        *read_shards(report.test_url),
    ]
    assert sorted(everything) == sorted((row[3], row[1]) for row in found)


def test_cifar_100_has_fine_and_coarse_labels(tmp_path: Path) -> None:
    root = tmp_path / "cifar-100-python"
    root.mkdir()
    data = cifar_pixels(3, 40)
    fine, coarse = [n % 20 for n in range(40)], [n % 4 for n in range(40)]
    batch = {"fine_labels": fine, "coarse_labels": coarse, "data": data, "filenames": ["x"] * 40}
    for name in ("train", "test"):
        (root / name).write_bytes(python2_batch(batch))
    meta = {"fine_label_names": [f"f{n}" for n in range(20)], "coarse_label_names": list("abcd")}
    (root / "meta").write_bytes(python2_batch(meta))
    kind, classes, found = read(tmp_path)
    assert (kind, classes[:3], [row[1] for row in found]) == ("cifar", ("f0", "f1", "f2"), fine * 2)
    _, classes, found = read(tmp_path, label_column="coarse")
    assert (classes, [row[1] for row in found]) == (tuple("abcd"), coarse * 2)
    refused(tmp_path, ConfigError, "CIFAR has `fine`", label_column="x")


@pytest.mark.parametrize("label_bytes", [1, 2])
def test_cifar_in_binary(tmp_path: Path, label_bytes: int) -> None:
    data = cifar_pixels(4, 20)
    rows = b"".join(bytes([n % 2] * (label_bytes - 1) + [n % 5]) + data[n].tobytes() for n in range(20))
    root = tmp_path / ("cifar-10-batches-bin" if label_bytes == 1 else "cifar-100-binary")
    root.mkdir()
    names = ("data_batch_1.bin", "test_batch.bin") if label_bytes == 1 else ("train.bin", "test.bin")
    for name in names:
        (root / name).write_bytes(rows)
    (root / ("batches.meta.txt" if label_bytes == 1 else "fine_label_names.txt")).write_text(
        "a\nb\nc\nd\ne\n\n"
    )
    kind, classes, found = read(root)
    assert (kind, classes, len(found)) == ("cifar", tuple("abcde"), 40)
    assert (pixels(found[7][3]) == data[7].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert {row[2] for row in found} == {"train", "test"}
    assert [row[1] for row in found[:20]] == [n % 5 for n in range(20)]
    (root / names[0]).write_bytes(rows[:5000])
    refused(
        root,
        DataError,
        rf"{names[0]}: truncated at byte 5000, inside image 1 \({3072 + label_bytes} bytes each\)",
    )


class Evil:
    """What an attacker's pickle would do when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.path,)


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    batch, victim = root / "data_batch_1", tmp_path / "victim"
    good = python2_batch(cifar10(1, 3)[0])
    attacks = {
        pickle.dumps({"data": Evil(victim)}, 2): "names 'pathlib.Path.touch'|names '__builtin__.getattr'",
        pickle.dumps({"data": Evil(victim)}, 4): "pickle opcode STACK_GLOBAL",
        b"cos\nsystem\n(U\x08touch /xtR.": "names 'os.system'; refused, nothing was run",
        b"(Ucos\nios\nsystem\n.": "damaged|opcode",
        b"(i__builtin__\neval\n.": "opcode INST",
        b"\x80\x02cnumpy\nndarray\nU\x01a\x85R.": "calls something; refused",
        b"\x80\x02}(U\x01aU\x01bu(b.": "damaged|state",
        b"\x80\x02P1\n.": "opcode PERSID",
        b"\x80\x02]q\x01.": "holds no dictionary",
        b"": "damaged",
        b"." * 3: "damaged",
        good.replace(b"u1K", b"O8K"): "its array is not one of unsigned bytes",
        good.replace(b"\x89T", b"\x88T"): "in C order",
        good[:2000]: "damaged",
        python2_batch({"data": "x", "labels": [1]}): "expected `data` of n x 3072",
        good.replace(b"U\x06labels", b"U\x06labelz"): "and fine labels",
    }
    for data, reason in attacks.items():
        batch.write_bytes(data)
        refused(root, DataError, reason)
    assert not victim.exists()
    batch.write_bytes(good)
    assert len(read(root)[2]) == 3


# IDX.


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("packed", [True, False])
def test_idx_as_mnist_is_distributed(tmp_path: Path, packed: bool) -> None:
    rng = np.random.default_rng(0)
    arrays, end = {}, ".gz" if packed else ""
    for split, count in (("train", 50), ("t10k", 20)):
        arrays[split] = rng.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8) % 10
        for kind, array in zip(("images-idx3", "labels-idx1"), arrays[split], strict=True):
            data = gzip.compress(idx(array)) if packed else idx(array)
            (tmp_path / f"{split}-{kind}-ubyte{end}").write_bytes(data)
    kind, classes, found = read(tmp_path)
    assert (kind, classes) == ("idx", tuple("0123456789"))
    everything = [("test", *pair) for pair in zip(*arrays["t10k"], strict=True)]
    everything += [("train", *pair) for pair in zip(*arrays["train"], strict=True)]
    for row, (split, image, label) in zip(found, everything, strict=True):
        assert row[1:3] == (label, split)
        assert (pixels(row[3]) == image).all()
    assert len(read(tmp_path / f"train-images-idx3-ubyte{end}")[2]) == 50
    out = tmp_path.with_name(f"{tmp_path.name}-out").as_uri()
    report = ingest(tmp_path, out, test_as_validation=True)
    assert sorted(read_shards(report.validation_url)) == sorted((row[3], row[1]) for row in found[:20])

    labels = tmp_path / f"train-labels-idx1-ubyte{end}"
    labels.unlink()
    refused(tmp_path, DataError, r"there is no train-labels-idx1-ubyte\[.gz\] with its labels")
    short = idx(np.zeros(49, np.uint8))
    labels.write_bytes(gzip.compress(short) if packed else short)
    refused(tmp_path, DataError, "has 50 images, .* has 49 labels")


def test_idx_that_is_cut_off_or_too_long(tmp_path: Path, vitscale_test_data: Path | None) -> None:
    images = tmp_path / "train-images-idx3-ubyte"
    whole = idx(np.zeros((5, 10, 10), np.uint8))
    for data, reason in (
        (whole[:250], "truncated at byte 250 of 516"),
        (whole + b"x", "bytes after its 5 entries"),
        (whole[:3], "neither a tar"),
        (idx(np.zeros((5, 5000, 1), np.uint8)), "images of 5000 x 1 pixels"),
    ):
        images.write_bytes(data)
        refused(images, VitscaleError, reason)
    packed = gzip.compress(np.random.default_rng(0).bytes(1000) + whole)
    packed = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (5, 10, 10), np.uint8)))
    images = tmp_path / "train-images-idx3-ubyte.gz"
    for length in range(20, len(packed) - 1, 37):
        images.write_bytes(packed[:length])
        refused(images, DataError, rf"truncated at byte {length} of the compressed file, after \d+ bytes")
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 255
    images.write_bytes(flipped)
    refused(images, DataError, "train-images-idx3-ubyte.gz: damaged before byte|train-images")
    if vitscale_test_data:
        name = "truncated__train-images-idx3-ubyte.gz"
        refused(
            vitscale_test_data / "odd" / name,
            DataError,
            rf"{name}: truncated at byte 1578568 of the compressed file, .*its images 0 to \d+ of 60000",
        )


def test_a_gzip_bomb_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB of zeros in 64 kB."""
    bomb = tmp_path / "x.tar.gz"
    bomb.write_bytes(gzip.compress(make_tar([("a_0.jpg", bytes(64 << 20))])))
    assert bomb.stat().st_size < 100_000
    monkeypatch.setattr(source_files, "MAX_UNPACKED", 16 << 20)
    refused(bomb, DataError, "x.tar.gz unpacks to more than 16 MiB; unpack it by hand")
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes(gzip.compress(idx(np.zeros((1, 10, 10), np.uint8)) + bytes(64 << 20)))
    refused(images, DataError, "bytes after its 1 entries")


# Tars.


def test_webdataset_tars_are_sharded_again(photos: Callable[..., Path], tmp_path: Path) -> None:
    first = ingest(photos(cat=30, dog=30), (tmp_path / "a").as_uri(), shard_bytes=20_000)
    again = ingest(tmp_path / "a", (tmp_path / "b").as_uri(), format="wds")
    assert again.num_train == first.num_train
    assert set(read_shards(again.train_url)) == set(read_shards(first.train_url))
    assert set(read_shards(again.validation_url)) == set(read_shards(first.validation_url))
    assert open_source(tmp_path / "a").format == "wds"


@pytest.mark.parametrize(
    ("extension", "labels", "options"),
    [
        ("cls", [b"0", b"1\n"], {}),
        ("txt", [b"dog", b" cat\n"], {}),
        ("json", [b'{"label": "dog"}', b'{"label": "cat"}'], {}),
        ("json", [b'{"label": 7, "kind": "dog"}', b'{"label": 7, "kind": "cat"}'], {"label_column": "kind"}),
    ],
)
def test_webdataset_labels(
    tmp_path: Path, extension: str, labels: list[bytes], options: dict[str, str]
) -> None:
    members = []
    for n in range(8):
        members += [
            (f"./{n:03d}.{extension}", labels[n % 2]),
            (f"./{n:03d}.png", make_png(n)),
            (f"./{n:03d}.npy", b"x"),
        ]
    tar = tmp_path / "x.tar"
    tar.write_bytes(make_tar(members))
    kind, classes, found = read(tar, **options)
    numbers = (0, 1) if extension == "cls" else (1, 0)
    assert (kind, classes) == ("wds", ("0", "1") if extension == "cls" else ("cat", "dog"))
    assert found == [(f"./{n:03d}.png", numbers[n % 2], "", make_png(n)) for n in range(8)]
    tar_gz = tmp_path / "y.tar.gz"
    tar_gz.write_bytes(gzip.compress(make_tar(members)))
    assert read(tar_gz, **options) == (kind, classes, found)


def test_webdataset_tars_that_cannot_work(tmp_path: Path) -> None:
    tar = tmp_path / "x.tar"
    good = [("0.png", make_png(0)), ("0.cls", b"0")]
    for more, reason in (
        (
            [("1.png", b"")],
            "sample '1' has no label, expected a .cls, .json or .txt file; its extensions are png",
        ),
        ([("1.png", b""), ("1.jpg", b""), ("1.cls", b"0")], "sample '1' has 2 images, expected one"),
        ([("1.png", b""), ("1.cls", b"")], "1.cls: the label is '', expected a number or a name"),
        ([("1.png", b""), ("1.cls", b"\xff")], "1.cls: the label is no UTF-8 text"),
        ([("1.png", b""), ("1.json", b"{")], "1.json is no JSON"),
        ([("1.png", b""), ("1.json", b'{"a": 1}')], "1.json has no 'label', only a"),
        ([("1.png", b""), ("1.json", b'{"label": [1]}')], r"the label is \[1\]"),
    ):
        tar.write_bytes(make_tar([*good, *more]))
        refused(tar, DataError, f"x.tar: .*{reason}")
    tar.write_bytes(make_tar(good)[:700])
    refused(tar, DataError, "x.tar: truncated at byte 700")


def test_splits_in_the_names_of_tars(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        members = [(f"{n:02d}_{n % 2}.png", make_png(n)) for n in range(4)]
        (tmp_path / f"photos_{split}.tar").write_bytes(make_tar(members))
    kind, _, found = read(tmp_path)
    assert kind == "tar"
    assert [row[0] for row in found[:2]] == ["photos_test.tar/00_0.png", "photos_test.tar/01_1.png"]
    assert [row[2] for row in found] == ["test"] * 4 + ["train"] * 4 + ["val"] * 4
    assert {row[2] for row in read(tmp_path / "photos_val.tar")[2]} == {""}


def test_what_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"hello")
    refused(tmp_path / "x.bin", ConfigError, "x.bin: neither a tar, Parquet, IDX, CSV, TSV nor JSON lines")
    (tmp_path / "x.gz").write_bytes(gzip.compress(make_tar([("a_0.png", make_png(0))])))
    refused(tmp_path / "x.gz", ConfigError, r"is a compressed tar; call it \*.tar.gz")
    refused(tmp_path, ConfigError, "--format digits: that source is called `digits`", format="digits")
