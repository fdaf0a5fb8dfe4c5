"""The tar walk and the index against archives by tarfile, GNU tar and webdataset, whole and damaged."""

import gzip
import hashlib
import io
import json
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import webdataset as wds
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.benchmarks.index_scale import SAMPLES_PER_SHARD, simulate
from tests.conftest import TINY_CLASSES, TINY_SHARDS, make_png, make_tar
from workers.data import index as index_module
from workers.data.index import SAMPLE, STORED, DatasetIndex, records_key
from workers.data.indexing import build_index
from workers.data.proof import id_sum
from workers.data.tar import BLOCK, MAX_MEMBER_BYTES, samples, split_name, walk
from workers.errors import ConfigError, DataError
from workers.storage import FileStore

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
SMALL = make_tar([("a.jpg", b"x" * 700), ("a.cls", b"0"), ("dir/", b""), ("b.jpg", b"y"), ("b.cls", b"1")])
END = 2 * BLOCK
"""Bytes of the end-of-archive marker."""


def folder(url: str) -> Path:
    return Path(urlsplit(url).path)


def build(tmp_path: Path, *members: tuple[str, bytes], **options: object) -> DatasetIndex:
    (tmp_path / "s.tar").write_bytes(make_tar(members))
    return build_index(tmp_path.as_uri(), **options)


def records_path(index: DatasetIndex, number: int) -> Path:
    shard = index.shards[number]
    return folder(index.url) / records_key(index.home, shard.name, shard.records_sha256)


def content_end(archive: bytes) -> int:
    """Where the zeros of the end marker begin, a multiple of 512."""
    return -(-len(archive.rstrip(b"\0")) // BLOCK) * BLOCK


# The walk.


def test_ranges_digests_and_files_of_each_sample():
    found = list(samples("s.tar", [SMALL]))
    assert [(sample.key, sample.offset, sample.size) for sample in found] == [
        ("a", 0, 2560),
        ("b", 3072, 2048),
    ]
    assert {sample.key: {name: m.data for name, m in sample.files.items()} for sample in found} == {
        "a": {"jpg": b"x" * 700, "cls": b"0"},
        "b": {"jpg": b"y", "cls": b"1"},
    }
    for sample in found:
        data = SMALL[sample.offset : sample.offset + sample.size]
        assert sample.digest == blake3(data).digest(length=16)
        for member in sample.files.values():
            assert SMALL[member.data_offset : member.data_offset + member.size] == member.data


def test_a_directory_amid_a_sample_is_in_its_range():
    archive = make_tar([("a.jpg", b"x"), ("d/", b""), ("a.cls", b"0"), ("e/", b"")])
    (sample,) = samples("s.tar", [archive])
    assert (sample.offset, sample.size) == (0, 5 * BLOCK)
    assert sample.digest == blake3(archive[: 5 * BLOCK]).digest(length=16)


@pytest.mark.parametrize("piece", [1, 511, 512, 513, 10_000])
def test_pieces_of_any_size_give_the_same(piece: int):
    pieces = [SMALL[start : start + piece] for start in range(0, len(SMALL), piece)]
    assert list(samples("s.tar", pieces)) == list(samples("s.tar", [SMALL]))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("./a/b/0001.JPG", ("./a/b/0001", "jpg")),
        ("a.b/img.0001.seg.png", ("a.b/img", "0001.seg.png")),
        ("a/LICENSE", None),
        ("._0001.jpg", None),
        ("a/._0001.jpg", None),
        ("__meta__/x.json", None),
        ("__info__", None),
    ],
)
def test_key_and_extension(name: str, parts: tuple[str, str] | None):
    assert split_name(name) == parts


stems = st.text("ab_1", min_size=1, max_size=3)
names = st.tuples(st.sampled_from(["", "./", "d/", "d.d/e/", "ü" * 90 + "/"]), stems)
extensions = st.sets(st.sampled_from(["jpg", "CLS", "seg.png", "json", "pyd"]), min_size=1)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.dictionaries(names, extensions, min_size=1, max_size=5),
    format=st.sampled_from(FORMATS[1:]),
    data=st.binary(max_size=1500),
)
def test_groups_as_stock_webdataset_does(groups, format: int, data: bytes):
    members = [
        (f"{directory}{stem}.{extension}", extension.encode() + data)
        for (directory, stem), found in groups.items()
        for extension in sorted(found)
    ]
    archive = make_tar(members, format)
    ours = [
        {"__key__": sample.key, **{name: member.data for name, member in sample.files.items()}}
        for sample in samples("s.tar", [archive])
    ]
    stream = [{"url": "s.tar", "stream": io.BytesIO(archive)}]
    stock = list(wds.tariterators.group_by_keys(wds.tariterators.tar_file_expander(stream)))
    for sample in stock:
        del sample["__url__"]
        sample.pop("__local_path__", None)
    assert ours == stock


@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_archives_by_gnu_tar(tmp_path: Path, format: str):
    long = "n" * 60 + "/" + "m" * 30
    for key in ("one", "two", long):
        (tmp_path / "in" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / f"{key}.cls").write_text("3\n")
        (tmp_path / "in" / f"{key}.jpg").write_bytes(key.encode() * 100)
    command = ["tar", f"--format={format}", "--sort=name", "-C", "in", "-cf", "s.tar", "."]
    subprocess.run(command, cwd=tmp_path, check=True)
    index = build_index(tmp_path.as_uri())
    _, rows = index.records(0, 3)
    archive = (tmp_path / "s.tar").read_bytes()
    images = {archive[row["image_offset"] :][: row["image_size"]] for row in rows}
    assert images == {key.encode() * 100 for key in ("one", "two", long)}
    assert rows["label"].tolist() == [3, 3, 3]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, content_end(SMALL) + END - 1))
def test_truncation_at_any_byte_is_found(cut: int):
    with pytest.raises(DataError, match=r"s\.tar: (truncated|damaged)"):
        list(samples("s.tar", [SMALL[:cut]]))


def test_truncation_at_every_member_boundary_is_found():
    for cut in range(0, content_end(SMALL) + END, BLOCK):
        with pytest.raises(DataError, match="truncated"):
            list(walk("s.tar", [SMALL[:cut]]))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, content_end(SMALL) * 8 - 1), st.sampled_from(FORMATS))
def test_a_flipped_bit_is_an_error_or_changes_a_digest(bit: int, format: int):
    archive = make_tar([("ä" * 45 + ".jpg", b"x" * 700), ("ä" * 45 + ".cls", b"0")], format)
    damaged = bytearray(archive)
    damaged[bit // 8 % content_end(archive)] ^= 1 << bit % 8
    try:
        found = [(sample.key, sample.digest) for sample in samples("s.tar", [bytes(damaged)])]
    except DataError:
        return
    assert found != [(sample.key, sample.digest) for sample in samples("s.tar", [archive])]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_hostile_headers_raise_only_data_errors(data: st.DataObject):
    """Random bytes in a header whose checksum is then made right."""
    archive = bytearray(make_tar([("ü" * 120 + ".jpg", b"x" * 700)], data.draw(st.sampled_from(FORMATS[1:]))))
    block = data.draw(st.integers(0, content_end(archive) // BLOCK - 1)) * BLOCK
    start = block + data.draw(st.integers(0, 340))
    noise = data.draw(st.binary(min_size=1, max_size=20))
    archive[start : start + len(noise)] = noise
    archive[block + 148 : block + 156] = b" " * 8
    archive[block + 148 : block + 155] = b"%06o\0" % sum(archive[block : block + BLOCK])
    try:
        total = sum(len(member.record) for member in walk("s.tar", [bytes(archive)]))
    except DataError as error:
        assert str(error).startswith("s.tar: ")
    else:
        assert total <= len(archive)


@pytest.mark.parametrize(
    ("archive", "reason"),
    [
        (b"", "truncated at byte 0"),
        (gzip.compress(SMALL, 0), r"not a plain tar archive \(compressed\?\)"),
        (b"<html>" * 1000, "not a plain tar archive"),
        (SMALL + SMALL, "bytes after its end-of-archive marker"),
        (SMALL[: content_end(SMALL)] + bytes(BLOCK) + SMALL, "a lone zero block"),
    ],
)
def test_what_is_no_plain_archive(archive: bytes, reason: str):
    with pytest.raises(DataError, match=f"^s.tar: .*{reason}"):
        list(samples("s.tar", [archive]))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.SYMTYPE, "'evil.jpg' is a symbolic link"),
        (tarfile.LNKTYPE, "'evil.jpg' is a hard link"),
        (tarfile.CHRTYPE, "'evil.jpg' is a device"),
        (tarfile.FIFOTYPE, "'evil.jpg' is a named pipe"),
        (tarfile.GNUTYPE_SPARSE, "'evil.jpg' is a sparse file"),
        (b"Z", "'evil.jpg' is a member of the unknown type"),
    ],
)
def test_links_and_devices_are_refused(kind: bytes, reason: str):
    member = tarfile.TarInfo("evil.jpg")
    member.type, member.linkname = kind, "/etc/passwd"
    archive = make_tar([("a.jpg", b"x")])[:1024] + member.tobuf(tarfile.GNU_FORMAT) + bytes(2 * BLOCK)
    with pytest.raises(DataError, match=reason):
        list(samples("s.tar", [archive]))


def test_sizes_beyond_reason_are_refused_before_they_are_read():
    member = tarfile.TarInfo("a.jpg")
    for size in (MAX_MEMBER_BYTES + 1, 1 << 40):
        member.size = size
        for format in FORMATS[1:]:
            with pytest.raises(DataError, match=f"'a.jpg' has {size} bytes"):
                list(walk("s.tar", [member.tobuf(format)]))
    member.size, member.type = 1 << 32, tarfile.XHDTYPE
    with pytest.raises(DataError, match="header extension of 4294967296 bytes"):
        list(walk("s.tar", [member.tobuf(tarfile.USTAR_FORMAT)]))


# The index.


def test_records_of_every_range(tiny_index: DatasetIndex, tiny_url: str):
    opened = DatasetIndex.open(tiny_url)
    assert opened == tiny_index
    assert opened.classes == TINY_CLASSES
    assert [(shard.name, shard.num_samples, shard.first) for shard in opened.shards] == [
        ("tiny-0.tar", 5, 0),
        ("tiny-1.tar", 1, 5),
        ("tiny-2.tar", 7, 6),
    ]
    numbers, rows = opened.records(0, 13)
    assert (numbers.dtype, rows.dtype) == (np.int32, SAMPLE)
    assert numbers.tolist() == [0] * 5 + [1] + [2] * 7
    assert rows["label"].tolist() == [number % 2 for number in range(13)]
    assert len(set(rows["id"].tolist())) == 13
    for number, row in enumerate(rows):
        archive = (folder(tiny_url) / opened.shards[numbers[number]].name).read_bytes()
        image = archive[row["image_offset"] :][: row["image_size"]]
        assert image == make_png(number)
        sample = archive[row["offset"] :][: row["size"]]
        assert row["digest"].tobytes() == blake3(sample).digest(length=16)
    for start in range(14):
        for count in range(14 - start):
            part_numbers, part = opened.records(start, count)
            assert part_numbers.tolist() == numbers[start : start + count].tolist()
            assert part.tobytes() == rows[start : start + count].tobytes()
    for start, count in [(-1, 1), (0, 14), (13, 1), (5, -1)]:
        with pytest.raises(IndexError):
            opened.records(start, count)


def test_sample_id_is_of_shard_name_and_key(tiny_index: DatasetIndex):
    _, rows = tiny_index.records(5, 1)
    digest = hashlib.blake2b(b"tiny-1.tar\x000005").digest()
    assert rows["id"][0] == int.from_bytes(digest[:8], "little")


def test_rows_are_read_in_pages_once(tiny_index: DatasetIndex, monkeypatch: pytest.MonkeyPatch):
    reads = []
    read_range = FileStore.read_range

    def spy(self, key, start, length, etag=None):
        reads.append((key.split("/")[-1].split(".")[0], start, length))
        return read_range(self, key, start, length, etag)

    monkeypatch.setattr(FileStore, "read_range", spy)
    tiny_index.records(3, 5)
    whole = [("tiny-0", 0, 5 * 64), ("tiny-1", 0, 64), ("tiny-2", 0, 7 * 64)]
    assert reads == whole, "pages of 64 KB"
    tiny_index.fetch_rows(np.array([0, 2, 9, 12]))
    assert reads == whole, "and they are kept"
    DatasetIndex.open(tiny_index.url).fetch_rows(np.array([0, 2, 9, 12]))
    assert reads[3:] == [whole[0], whole[2]]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 12)))
def test_rows_of_any_ordinals(tiny_index: DatasetIndex, ordinals: list[int]):
    numbers, rows = tiny_index.records(0, 13)
    wanted = np.array(sorted(ordinals), np.int64)
    found_numbers, found = tiny_index.fetch_rows(wanted)
    assert (found_numbers.dtype, found.dtype) == (np.int32, SAMPLE)
    assert found.tobytes() == rows[wanted].tobytes()
    assert found_numbers.tolist() == numbers[wanted].tolist()
    anyhow = np.array(ordinals, np.int64)
    shards, places = tiny_index.locate(anyhow)
    firsts = np.array([shard.first for shard in tiny_index.shards])
    assert (firsts[shards] + places).tolist() == ordinals


@pytest.mark.parametrize("ordinal", [-1, 13])
def test_ordinals_beyond_the_data_set(tiny_index: DatasetIndex, ordinal: int):
    for read in (tiny_index.locate, tiny_index.fetch_rows):
        with pytest.raises(IndexError):
            read(np.array([0, ordinal]))


def test_fingerprint_is_of_content_not_of_place(tiny_index: DatasetIndex, tiny_url: str, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(folder(tiny_url), copy, ignore=shutil.ignore_patterns("_vitscale"))
    seen = {tiny_index.fingerprint}
    assert build_index(copy.as_uri(), classes=TINY_CLASSES).fingerprint in seen
    seen.add(build_index(copy.as_uri(), classes=("a", "b")).fingerprint)
    assert len(seen) == 2, "the names of the classes"
    (copy / "tiny-1.tar").write_bytes(make_tar([("0005.cls", b"1"), ("0005.png", make_png(6))]))
    seen.add(build_index(copy.as_uri(), classes=TINY_CLASSES).fingerprint)
    assert len(seen) == 3, "an image"
    (copy / "tiny-2.tar").rename(copy / "tiny-3.tar")
    seen.add(build_index(copy.as_uri(), classes=TINY_CLASSES).fingerprint)
    assert len(seen) == 4, "the name of a shard"


def test_fingerprint_never_changes_between_versions(tmp_path: Path):
    """Runs and checkpoints of earlier versions name it."""
    index = build(tmp_path, ("a.jpg", b"A"), ("a.cls", b"1"), ("b.cls", b"0"), ("b.webp", b"B"))
    assert index.fingerprint == "cf9944aa48252af60e0e4696854079668b9b17894f4dc42063ca5f17266d0397"


def test_a_pickle_in_a_shard_runs_nothing(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    evil = pickle.dumps(Evil())
    for extension in ("pyd", "pickle", "pkl", "pth", "npy"):
        build(
            tmp_path, ("a.cls", b"0"), ("a.jpg", evil), (f"a.{extension}", evil), ("a.x." + extension, evil)
        )
        index = DatasetIndex.open(tmp_path.as_uri())
        index.records(0, 1)
    assert not (tmp_path / "executed").exists()


def test_only_shards_directly_below_are_indexed(tiny_url: str):
    root = folder(tiny_url)
    (root / "sub").mkdir()
    (root / "sub" / "x.tar").write_bytes(b"broken")
    (root / "notes.txt").write_bytes(b"hello")
    assert [shard.name for shard in build_index(tiny_url).shards] == list(TINY_SHARDS)


def test_unchanged_shards_are_not_read_again(tiny_url: str, monkeypatch: pytest.MonkeyPatch):
    reads = []
    read_range = FileStore.read_range

    def spy(self, key, start, length, etag=None):
        reads.append(key)
        return read_range(self, key, start, length, etag)

    monkeypatch.setattr(FileStore, "read_range", spy)
    steps: list[tuple[int, int]] = []
    first = build_index(tiny_url, classes=TINY_CLASSES, progress=lambda *step: steps.append(step))
    assert sorted(set(reads)) == list(TINY_SHARDS)
    assert steps == [(1, 3), (2, 3), (3, 3)]

    reads.clear()
    assert build_index(tiny_url) == first, "the class names stay"
    assert reads == []

    root = folder(tiny_url)
    records_path(first, 2).unlink()
    records_path(first, 0).write_bytes(bytes(5 * STORED.itemsize))
    (root / "tiny-1.tar").write_bytes(
        make_tar([("z.cls", b"1"), ("z.jpg", b"?"), ("y.jpg", b"?"), ("y.cls", b"0")])
    )
    (root / "tiny-3.tar").write_bytes(make_tar([("new.cls", b"1"), ("new.jpg", b"?")]))
    again = build_index(tiny_url)
    assert sorted(set(reads)) == ["tiny-0.tar", "tiny-1.tar", "tiny-2.tar", "tiny-3.tar"]
    assert again.num_samples == 15
    assert again.records(5, 2)[1]["label"].tolist() == [1, 0]

    reads.clear()
    (root / "tiny-1.tar").unlink()
    assert build_index(tiny_url).num_samples == 13
    assert reads == []


def test_without_class_names_each_label_is_its_own(tmp_path: Path):
    assert build(tmp_path, ("a.cls", b" 2\n"), ("a.jpg", b"?")).classes == ("0", "1", "2")
    assert build(tmp_path, ("a.cls", b"4"), ("a.jpg", b"?")).classes == ("0", "1", "2", "3", "4")


def test_class_names_survive_a_lost_shard_table(
    tiny_index: DatasetIndex, tiny_url: str, caplog: pytest.LogCaptureFixture
):
    (table,) = folder(tiny_url).glob("_vitscale/shards/*.parquet")
    table.unlink()
    with caplog.at_level("WARNING"):
        assert build_index(tiny_url) == tiny_index
    assert "reading all shards again" in caplog.text


IMAGE = ("a.jpg", b"?")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.cls", b"0")], "sample 'a' has 0 images, .*; its extensions are cls"),
        ([("img.0001.jpg", b"?"), ("img.0002.jpg", b"?")], "'img' has 0 images.*0001.jpg, 0002.jpg"),
        ([IMAGE, ("a.png", b"?"), ("a.cls", b"0")], "sample 'a' has 2 images"),
        ([IMAGE], "sample 'a' has no label, expected a .cls file; its extensions are jpg"),
        ([IMAGE, ("a.cls", b"cat")], "sample 'a' has the label 'cat', which is none of the 2 classes"),
        ([IMAGE, ("a.cls", b"")], "sample 'a' has the label '', expected an integer or a class name"),
        ([IMAGE, ("a.cls", b"1.0")], "sample 'a' has the label '1.0'"),
        ([IMAGE, ("a.cls", b"0" * 40)], "sample 'a' has the label 0000000.*, outside the classes 0 to 1"),
        ([IMAGE, ("a.cls", "²".encode())], "sample 'a' has the label"),
        ([IMAGE, ("a.cls", b"-1")], "sample 'a' has the label -1, outside the classes 0 to 1"),
        ([IMAGE, ("a.cls", b"2")], "sample 'a' has the label 2, outside the classes 0 to 1"),
        (
            [IMAGE, ("a.cls", b"0"), ("b.jpg", b"?"), ("b.cls", b"0"), IMAGE],
            "files of sample 'a' do not stand",
        ),
        ([IMAGE, ("a.JPG", b"?")], "sample 'a' has two files named 'a.JPG'"),
    ],
)
def test_samples_that_cannot_be_used(tmp_path: Path, members: list[tuple[str, bytes]], reason: str):
    with pytest.raises(DataError, match=f"^s.tar: .*{reason}"):
        build(tmp_path, *members, classes=TINY_CLASSES)
    assert not (tmp_path / "_vitscale/index.json").exists()


def test_labels_of_known_shards_must_fit_new_classes(tiny_index: DatasetIndex, tiny_url: str):
    with pytest.raises(
        DataError, match=r"tiny-0.tar: sample '0001' has the label 1, outside the classes 0 to 0"
    ):
        build_index(tiny_url, classes=("only",))
    assert DatasetIndex.open(tiny_url) == tiny_index


def test_nothing_to_index(store_url: str, tmp_path: Path):
    with pytest.raises(DataError, match=r"no \*.tar directly under"):
        build_index(store_url)
    with pytest.raises(DataError, match="hold no samples"):
        build(tmp_path, ("README", b"hello"))
    with pytest.raises(ConfigError, match="distinct names"):
        build_index(tmp_path.as_uri(), classes=("a", "a"))


def test_an_empty_shard_amid_others(tiny_url: str):
    (folder(tiny_url) / "tiny-00.tar").write_bytes(make_tar([]))
    index = build_index(tiny_url)
    assert [shard.num_samples for shard in index.shards] == [5, 0, 1, 7]
    assert index.records(4, 3)[0].tolist() == [0, 2, 3]
    assert DatasetIndex.open(tiny_url).records(5, 1)[0].tolist() == [2]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(byte=st.integers(0, 5 * STORED.itemsize - 1), flip=st.integers(1, 255))
def test_a_damaged_row_is_refused(tiny_index: DatasetIndex, tiny_url: str, byte: int, flip: int):
    path = records_path(tiny_index, 0)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[byte] ^= flip
    path.write_bytes(damaged)
    row = byte // STORED.itemsize
    try:
        with pytest.raises(DataError, match=f"{path.name}: row {row} is damaged; run `vitscale index"):
            tiny_index.records(0, 13)
        tiny_index.records(row + 1, 12 - row)
    finally:
        path.write_bytes(whole)


def test_rows_of_another_place_or_shard_are_refused(tiny_index: DatasetIndex, tiny_url: str):
    first, second = records_path(tiny_index, 0), records_path(tiny_index, 1)
    whole = first.read_bytes()
    width = STORED.itemsize
    first.write_bytes(whole[width : 2 * width] + whole[:width] + whole[2 * width :])
    with pytest.raises(DataError, match="row 0 is damaged"):
        tiny_index.records(0, 5)
    second.write_bytes(whole[:width])
    with pytest.raises(DataError, match="row 0 is damaged"):
        tiny_index.records(5, 1)
    second.write_bytes(b"")
    with pytest.raises(DataError, match="truncated"):
        tiny_index.records(5, 1)


def test_an_index_that_cannot_be_trusted(tiny_index: DatasetIndex, tiny_url: str, store_url: str):
    with pytest.raises(DataError, match=f"{store_url} is not indexed: .*run `vitscale index {store_url}`"):
        DatasetIndex.open(store_url)
    path = folder(tiny_url) / "_vitscale/index.json"
    (table,) = folder(tiny_url).glob("_vitscale/shards/*.parquet")
    whole, header = table.read_bytes(), json.loads(path.read_text())
    for text in ("", "[]", "null", "{}", '{"format": "x"}', "\xff"):
        path.write_text(text, "latin-1")
        with pytest.raises(DataError, match=r"index.json is damaged; run `vitscale index"):
            DatasetIndex.open(tiny_url)
    path.write_text(json.dumps({"format": 3, "fingerprint": "f", "classes": ["a"], "label": 3}))
    with pytest.raises(
        DataError, match=r"index.json lacks named, given, image_key, label, num_shards, pieces"
    ):
        DatasetIndex.open(tiny_url)
    for field, value in {"classes": ["light", "dark"], "num_shards": 2, "fingerprint": "0" * 64}.items():
        path.write_text(json.dumps({**header, field: value}))
        with pytest.raises(DataError, match=r"(index.json is damaged|expected 2); run `vitscale index"):
            DatasetIndex.open(tiny_url)
    for field, value in {"pieces": [], "num_shards": 1 << 60}.items():
        path.write_text(json.dumps({**header, field: value}))
        with pytest.raises(DataError, match=r"pieces of \d+ shards; run `vitscale index"):
            DatasetIndex.open(tiny_url)
    path.write_text(json.dumps(header))
    for data in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:]):
        table.write_bytes(data)
        with pytest.raises(DataError, match=r"\.parquet is damaged; run `vitscale index"):
            DatasetIndex.open(tiny_url)
    table.unlink()
    with pytest.raises(DataError, match=r"\.parquet is missing; run `vitscale index"):
        DatasetIndex.open(tiny_url)


def test_a_newer_format_is_neither_read_nor_overwritten(tiny_index: DatasetIndex, tiny_url: str):
    path = folder(tiny_url) / "_vitscale/index.json"
    newer = json.dumps({**json.loads(path.read_text()), "format": index_module.FORMAT + 1})
    path.write_text(newer)
    for action in (DatasetIndex.open, build_index):
        with pytest.raises(DataError, match="has format 4, this version reads 3; update vitscale"):
            action(tiny_url)
    assert path.read_text() == newer


def test_an_old_format_is_to_be_indexed_anew(tiny_index: DatasetIndex, tiny_url: str):
    path = folder(tiny_url) / "_vitscale/index.json"
    path.write_text('{"format": 1, "fingerprint": "", "classes": ["a"], "shards_sha256": ""}')
    with pytest.raises(DataError, match=f"has the old format 1; run `vitscale index {tiny_url}`"):
        DatasetIndex.open(tiny_url)
    assert build_index(tiny_url, classes=TINY_CLASSES) == tiny_index == DatasetIndex.open(tiny_url)


def test_the_sum_of_ids_is_of_all_samples(tiny_index: DatasetIndex, tiny_url: str):
    opened = DatasetIndex.open(tiny_url)
    assert opened.id_sum == tiny_index.id_sum == id_sum(opened.records(0, 13)[1]["id"])


def test_50_000_shards_there_and_back(tmp_path: Path):
    """Only their table; 70,000 take two pieces of it."""
    for count in (50_000, 70_000):
        simulate((tmp_path / str(count)).as_uri(), count)
        index = DatasetIndex.open((tmp_path / str(count)).as_uri())
        assert (len(index.shards), index.num_samples) == (count, count * SAMPLES_PER_SHARD)
        last = index.shards[-1]
        assert last.name == f"train-{count - 1:06d}-of-{count:06d}.tar"
        assert last == index.shards[count - 1] == index.shards[-1:][0]
        assert (last.first, last.num_samples) == ((count - 1) * SAMPLES_PER_SHARD, SAMPLES_PER_SHARD)
        assert (len(last.sha256), len(last.records_sha256)) == (64, 64)
        names = list(index.shards.names)
        assert names == sorted(set(names)) and len(names) == count
        numbers, rows = index.locate(np.array([0, 9_999, 10_000, index.num_samples - 1]))
        assert (numbers.tolist(), rows.tolist()) == ([0, 0, 1, count - 1], [0, 9_999, 0, 9_999])
        with pytest.raises(IndexError):
            index.shards[count]


def test_an_interrupted_build_leaves_no_index(tiny_url: str):
    (folder(tiny_url) / "tiny-2.tar").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"tiny-2\.tar"):
        build_index(tiny_url)
    with pytest.raises(DataError, match="is not indexed"):
        DatasetIndex.open(tiny_url)


def test_an_index_travels_between_processes(tiny_index: DatasetIndex):
    tiny_index.records(0, 1)
    copy = pickle.loads(pickle.dumps(tiny_index))
    assert copy == tiny_index
    assert copy.records(4, 3)[1].tobytes() == tiny_index.records(4, 3)[1].tobytes()


def test_rows_that_are_gone_say_what_to_do(tiny_index: DatasetIndex, tiny_url: str):
    (path,) = folder(tiny_url).glob("_vitscale/samples/tiny-2.*")
    path.unlink()
    with pytest.raises(DataError, match=r"no object .*tiny-2.*; run `vitscale index file:"):
        tiny_index.records(6, 3)
    assert len(tiny_index.records(0, 6)[0]) == 6
    build_index(tiny_url)
    assert len(DatasetIndex.open(tiny_url).records(0, 13)[0]) == 13
