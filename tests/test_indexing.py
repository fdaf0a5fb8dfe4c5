"""Building the index: what is read again and what is not, after changes, failures and a SIGKILL."""

import gc
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import webdataset as wds

from tests.conftest import TINY_CLASSES, TINY_SHARDS, make_png, make_tar
from workers.data import index_journal
from workers.data.index import DatasetIndex
from workers.data.index_journal import ENTRY, Journal
from workers.data.indexing import build_index
from workers.data.proof import id_sum
from workers.data.shards import mark
from workers.data.tar import BLOCK, MAX_NAME, samples, walk
from workers.errors import ConfigError, DataError
from workers.storage import FileStore, open_store

SLOW_BUILD = """
import sys, time
from workers.data import index_journal
from workers.data.indexing import build_index
from workers.storage import FileStore

read_range = FileStore.read_range
index_journal.FLUSH_SECONDS = 0.2

def slow(self, key, start, length, etag=None):
    time.sleep(0.1)
    return read_range(self, key, start, length, etag)

FileStore.read_range = slow
if __name__ == "__main__":
    build_index(sys.argv[1], workers=int(sys.argv[2]))
"""


def folder(url: str) -> Path:
    return Path(urlsplit(url).path)


def write_shard(root: Path, number: int, *labels: str) -> None:
    """Keys and pixels are of the number."""
    members = []
    for place, label in enumerate(labels):
        key = f"{number:03d}-{place}"
        members += [(f"{key}.cls", label.encode()), (f"{key}.png", make_png(10 * number + place))]
    (root / f"s-{number:03d}.tar").write_bytes(make_tar(members))


def copied(url: str, to: Path) -> str:
    """The shards alone, elsewhere."""
    shutil.copytree(folder(url), to, ignore=shutil.ignore_patterns("_vitscale"))
    return to.as_uri()


def everything(url: str) -> dict[str, bytes]:
    store = open_store(url)
    return {info.key: store.read(info.key) for info in store.list("_vitscale/")}


def contents(index: DatasetIndex) -> list[tuple[int, str]]:
    """Id and class name of each sample."""
    _, rows = index.records(0, index.num_samples)
    return [(int(row["id"]), index.classes[row["label"]]) for row in rows]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are read, once per piece; records do not count."""
    names: list[str] = []
    read_range = FileStore.read_range

    def spy(self, key, start, length, etag=None):
        if key.endswith(".tar"):
            names.append(key)
        return read_range(self, key, start, length, etag)

    monkeypatch.setattr(FileStore, "read_range", spy)
    return names


# What is read again.


def test_only_what_is_new_or_changed_is_read(tmp_path: Path, reads: list[str]):
    for number in range(6):
        write_shard(tmp_path, number, "0", "1")
    url = tmp_path.as_uri()
    first = build_index(url)
    assert sorted(reads) == [f"s-{number:03d}.tar" for number in range(6)]

    reads.clear()
    before = everything(url)
    assert build_index(url) == first
    assert (reads, everything(url)) == ([], before), "nothing is written either"

    write_shard(tmp_path, 2, "1", "0", "1")
    write_shard(tmp_path, 9, "4")
    (tmp_path / "s-004.tar").unlink()
    steps: list[tuple[int, int]] = []
    second = build_index(url, progress=lambda *step: steps.append(step))
    assert sorted(reads) == ["s-002.tar", "s-009.tar"]
    assert steps == [(4, 6), (5, 6), (6, 6)]
    assert second.classes == ("0", "1", "2", "3", "4")
    assert second.fingerprint == build_index(copied(url, tmp_path / "copy")).fingerprint
    assert second == DatasetIndex.open(url)
    assert len(list(tmp_path.glob("_vitscale/samples/*.bin"))) == 6, "those of old shards are removed"
    assert len(list(tmp_path.glob("_vitscale/shards/*.parquet"))) == 1

    reads.clear()
    assert build_index(url, fresh=True) == second
    assert len(set(reads)) == 6


def test_a_shard_written_anew_with_the_same_bytes(tmp_path: Path, reads: list[str]):
    write_shard(tmp_path, 0, "0")
    write_shard(tmp_path, 1, "0")
    index = build_index(tmp_path.as_uri())
    os.utime(tmp_path / "s-001.tar", (1, 1))
    reads.clear()
    again = build_index(tmp_path.as_uri())
    assert again.fingerprint == index.fingerprint
    assert [shard.etag for shard in again.shards] != [shard.etag for shard in index.shards]
    assert DatasetIndex.open(tmp_path.as_uri()).shards[1].etag == again.shards[1].etag
    assert reads == ["s-001.tar"]


def test_another_layout_reads_everything(tmp_path: Path, reads: list[str]):
    for number in range(3):
        members = [("a.jpg", b"?"), ("a.png", b"!"), ("a.cls", b"0"), ("a.json", b'{"y": 1}')]
        (tmp_path / f"{number}.tar").write_bytes(make_tar(members))
    url = tmp_path.as_uri()
    build_index(url, image_key="jpg")
    for options in ({"image_key": "png"}, {"label": "json:y"}):
        reads.clear()
        index = build_index(url, **options)
        assert len(reads) == 3
    assert (index.image_key, index.label, index.classes) == ("png", "json:y", ("0", "1"))
    reads.clear()
    build_index(url)
    assert reads == []


def test_new_classes_of_numbers_read_nothing(tiny_index: DatasetIndex, tiny_url: str, reads: list[str]):
    renamed = build_index(tiny_url, classes=("x", "y", "z"))
    assert (reads, renamed.classes) == ([], ("x", "y", "z"))
    assert renamed.fingerprint != tiny_index.fingerprint
    assert renamed.records(0, 13)[1].tobytes() == tiny_index.records(0, 13)[1].tobytes()


# Names.


def test_a_vocabulary_grows_and_shrinks_without_reading_shards(tmp_path: Path, reads: list[str]):
    write_shard(tmp_path, 0, "dog", "cat")
    write_shard(tmp_path, 1, "dog")
    url = tmp_path.as_uri()
    assert build_index(url).classes == ("cat", "dog")

    reads.clear()
    write_shard(tmp_path, 2, "bee", "cow", "cat")
    index = build_index(url)
    assert reads == ["s-002.tar"]
    assert index.classes == ("bee", "cat", "cow", "dog")
    assert [name for _, name in contents(index)] == ["dog", "cat", "dog", "bee", "cow", "cat"]
    assert contents(DatasetIndex.open(url)) == contents(index)
    assert index.fingerprint == build_index(copied(url, tmp_path / "copy1")).fingerprint

    reads.clear()
    (tmp_path / "s-000.tar").unlink()
    write_shard(tmp_path, 2, "ant")
    index = build_index(url)
    assert reads == ["s-002.tar"]
    assert [name for _, name in contents(index)] == ["dog", "ant"]
    assert index.classes == ("ant", "dog"), "as if it had always been so"
    assert index.fingerprint == build_index(copied(url, tmp_path / "copy2")).fingerprint

    reads.clear()
    assert build_index(url) == index
    assert reads == []
    listed = build_index(url, classes=("ant", "dog", "emu"))
    assert (reads, [name for _, name in contents(listed)]) == ([], ["dog", "ant"])
    other = build_index(url, classes=("dog", "ant"))
    assert sorted(reads) == ["s-001.tar", "s-002.tar"], "other numbers for the same names"
    assert [name for _, name in contents(other)] == ["dog", "ant"]


def test_the_old_index_is_whole_whatever_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every write fails once; the numbers of all names change, so all records are written anew."""
    write_shard(tmp_path, 0, "dog", "cat")
    write_shard(tmp_path, 1, "dog")
    url = tmp_path.as_uri()
    old = contents(build_index(url))
    write_shard(tmp_path, 2, "bee")
    new = contents(build_index(copied(url, tmp_path / "copy")))
    write = FileStore.write

    def build_failing_after(left: int) -> None:
        def breaking(self, key, data):
            nonlocal left
            left -= 1
            if left < 0:
                raise DataError("the store is full")
            return write(self, key, data)

        with monkeypatch.context() as patch:
            patch.setattr(FileStore, "write", breaking)
            build_index(url)

    for writes in range(20):
        try:
            build_failing_after(writes)
        except DataError as error:
            assert "the store is full" in str(error)
            assert contents(DatasetIndex.open(url)) == old
        else:
            break
    assert writes >= 4, "each goes on where the last one failed"
    assert contents(DatasetIndex.open(url)) == new


# Shards that cannot be used.


def test_all_unusable_shards_are_told_at_once(tiny_index: DatasetIndex, tiny_url: str, reads: list[str]):
    root = folder(tiny_url)
    good = (root / "tiny-0.tar").read_bytes()
    link = tarfile.TarInfo("a.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    bad = {
        "b-cut.tar": (good[:1000], "truncated at byte 1000, inside member '0000.cls'"),
        "c-link.tar": (link.tobuf() + bytes(2 * BLOCK), "member 'a.jpg' is a symbolic link"),
        "d-twice.tar": (
            make_tar([("a.jpg", b"?"), ("a.cls", b"0"), ("b.jpg", b"?"), ("b.cls", b"0"), ("a.png", b"?")]),
            "the files of sample 'a' do not stand together",
        ),
        "e-label.tar": (make_tar([("k.jpg", b"?"), ("k.cls", b"7")]), "sample 'k' has the label 7, outside"),
        "f-dots.tar": (make_tar([("i.01.jpg", b"?"), ("i.02.jpg", b"?")]), "sample 'i' has 0 images"),
        "g.tar.gz": (b"", "a compressed archive; ranged reads need plain tars"),
        "h-zip.tar": (b"PK" * 1000, "not a plain tar archive"),
    }
    for name, (data, _) in bad.items():
        (root / name).write_bytes(data)
    before = everything(tiny_url)
    with pytest.raises(DataError) as caught:
        build_index(tiny_url)
    first, *lines = str(caught.value).split("\n  ")
    assert first == "7 of 9 shards cannot be used:"
    assert [line.partition(": ")[0] for line in lines] == sorted(bad)
    for line, (_, reason) in zip(lines, bad.values(), strict=True):
        assert reason in line
    assert DatasetIndex.open(tiny_url) == tiny_index
    assert {key: everything(tiny_url)[key] for key in before} == before

    for name in bad:
        (root / name).unlink()
    reads.clear()
    assert build_index(tiny_url) == tiny_index
    assert reads == []


def test_many_unusable_shards(tmp_path: Path):
    for number in range(30):
        (tmp_path / f"{number:02d}.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"^30 of 30 shards") as caught:
        build_index(tmp_path.as_uri())
    lines = str(caught.value).split("\n  ")
    assert len(lines) == 22
    assert lines[1].startswith("00.tar: truncated at byte 0")
    assert lines[-1] == "and 10 more"


def test_what_was_read_before_a_failure_is_not_read_again(tiny_url: str, reads: list[str]):
    (folder(tiny_url) / "x.tar").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"^x\.tar: truncated"):
        build_index(tiny_url)
    with pytest.raises(DataError, match="is not indexed"):
        DatasetIndex.open(tiny_url)
    (folder(tiny_url) / "x.tar").unlink()
    reads.clear()
    assert build_index(tiny_url).num_samples == 13
    assert reads == []
    assert not list(folder(tiny_url).glob("_vitscale/journal/*"))


def test_reads_that_are_given_up_leave_nothing_to_the_garbage_collector(tmp_path: Path):
    """Their threads, ended by it under a lock of threading's, once waited for themselves."""
    for number in range(30):
        (tmp_path / f"{number:02d}.tar").write_bytes(b"PK" * 3000)
    threshold = gc.get_threshold()
    gc.set_threshold(30)
    try:
        for _ in range(50):
            with pytest.raises(DataError, match="30 of 30"):
                build_index(tmp_path.as_uri())
    finally:
        gc.set_threshold(*threshold)


def test_a_store_that_is_down_is_not_asked_for_every_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(100):
        write_shard(tmp_path, number, "0")
    asked = []

    def down(self, key, start, length, etag=None):
        asked.append(key)
        raise DataError(f"{key}: the object store cannot be reached")

    monkeypatch.setattr(FileStore, "read_range", down)
    with pytest.raises(DataError, match="20 of 100 shards cannot be used"):
        build_index(tmp_path.as_uri())
    assert len(asked) < 50


def test_a_shard_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_shard(tmp_path, 0, "0")
    read_range = FileStore.read_range

    def changing(self, key, start, length, etag=None):
        os.utime(tmp_path / "s-000.tar", (1, 1))
        return read_range(self, key, start, length, etag)

    monkeypatch.setattr(FileStore, "read_range", changing)
    with pytest.raises(DataError, match=r"s-000\.tar changed since"):
        build_index(tmp_path.as_uri())


def test_hostile_archives_are_refused_within_bounds():
    def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, **fields: str) -> bytes:
        member = tarfile.TarInfo(name)
        member.type, member.size, member.pax_headers = kind, size, fields
        return member.tobuf(tarfile.PAX_FORMAT)

    def sized(size: bytes) -> bytes:
        record = b"%d size=%s\n" % (len(size) + 9, size)
        body = record.ljust(BLOCK, b"\0")
        return header("x", tarfile.XHDTYPE, len(record)) + body + header("a.jpg")

    end = bytes(2 * BLOCK)
    extension = header("x", tarfile.XGLTYPE, BLOCK) + (b"13 comment=x\n" * 40)[:BLOCK]
    long = b"%d %s\n"
    for archive, reason in (
        (header("../a.jpg") + end, "'../a.jpg' would lie outside of the archive"),
        (header("a/../../b.jpg") + end, "would lie outside"),
        (header("a" * (MAX_NAME + 1) + ".jpg") + end, "has 4101 characters"),
        (header("a.jpg", size=1 << 28) + b"x" * 100, "truncated at byte 612, inside member 'a.jpg'"),
        (header("a.jpg", size=(1 << 28) + 1) + end, "has 268435457 bytes; a sample's file may have"),
        (header("a.jpg", **{"GNU.sparse.major": "1"}) + end, "'a.jpg' is a sparse file"),
        (sized(b"-5") + end, "has the size '-5'"),
        (sized(b"9" * 30) + end, "has the size"),
        (sized(b"1e3") + end, "has the size '1e3'"),
        (header("p", tarfile.FIFOTYPE) + end, "'p' is a named pipe"),
        (header("d", tarfile.BLKTYPE) + end, "'d' is a device"),
        (extension * 9000, "(bytes of header extensions|damaged PAX header)"),
        (header("x", tarfile.XHDTYPE, 1 << 21) + end, "a header extension of 2097152 bytes"),
        (header("x", tarfile.XHDTYPE, BLOCK) + long % (99, b"a=b") + bytes(506) + end, "damaged PAX header"),
    ):
        with pytest.raises(DataError, match=f"^s.tar: .*{reason}"):
            list(walk("s.tar", [archive]))


def test_a_sample_of_too_many_bytes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("workers.data.tar.MAX_SAMPLE_BYTES", 4 * BLOCK)
    archive = make_tar([(f"a.{number}", b"x") for number in range(10)])
    with pytest.raises(DataError, match="sample 'a' has more than 2048 bytes"):
        list(samples("s.tar", [archive]))


# Who wrote the shards.


def test_shards_by_stock_webdataset(tmp_path: Path):
    with wds.TarWriter(str(tmp_path / "w.tar")) as writer:
        for number in range(5):
            writer.write(
                {"__key__": f"dir/{number}", "png": make_png(number), "cls": number, "json": {"a": 1}}
            )
    index = build_index(tmp_path.as_uri())
    assert index.records(0, 5)[1]["label"].tolist() == list(range(5))


def test_shards_by_bsdtar(tmp_path: Path):
    """As libarchive writes PAX: times, xattrs and SCHILY fields for every member, long names."""
    buffer = io.BytesIO()
    fields = {"mtime": "1700000000.123", "LIBARCHIVE.creationtime": "1700000000.5", "SCHILY.dev": "16777220"}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (("./", b""), ("./ü" * 60 + "/k.jpg", b"image"), ("./ü" * 60 + "/k.cls", b"3")):
            member = tarfile.TarInfo(name.rstrip("/") or ".")
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            member.size, member.pax_headers = len(data), {**fields, "SCHILY.xattr.user.x": "é" * 50}
            tar.addfile(member, io.BytesIO(data))
    (tmp_path / "b.tar").write_bytes(buffer.getvalue())
    index = build_index(tmp_path.as_uri())
    _, rows = index.records(0, 1)
    start = int(rows["image_offset"][0])
    assert buffer.getvalue()[start : start + 5] == b"image" and rows["label"].tolist() == [3]


@pytest.mark.parametrize("arguments", [["./set"], ["-C", "set", "."], ["set"], ["-P", "--xattrs", "set"]])
@pytest.mark.parametrize("format", ["gnu", "pax", "ustar"])
def test_shards_by_gnu_tar(tmp_path: Path, format: str, arguments: list[str]):
    """Keys are those that stock webdataset gives."""
    long = "deep/" * 18 + "n" * 40
    for key in ("a/1", "a/2", "b/1", long):
        path = tmp_path / "set" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".jpg").write_bytes(key.encode() * 50)
        path.with_name(path.name + ".cls").write_text("2")
    command = ["tar", f"--format={format}", "--sort=name", "-cf", "s.tar", *arguments]
    subprocess.run(command, cwd=tmp_path, check=True)
    index = build_index(tmp_path.as_uri())
    archive = (tmp_path / "s.tar").read_bytes()
    stream = [{"url": "s.tar", "stream": io.BytesIO(archive)}]
    stock = list(wds.tariterators.group_by_keys(wds.tariterators.tar_file_expander(stream)))
    found = list(samples("s.tar", [archive]))
    assert [sample.key for sample in found] == [sample["__key__"] for sample in stock]
    images = [archive[row["image_offset"] :][: row["image_size"]] for row in index.records(0, 4)[1]]
    assert images == [sample["jpg"] for sample in stock]


# Cuts.


def test_every_truncation_is_found():
    """At least 2,000 places; tarfile says nothing at 38 % of them."""
    rng = random.Random(0)
    cuts = 0
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = [("d/", b"")]
        for number in range(12):
            name = "k" * (120 if format != tarfile.USTAR_FORMAT and number % 3 == 0 else 3) + str(number)
            members += [(f"{name}.png", rng.randbytes(rng.randrange(900))), (f"{name}.cls", b"1")]
        archive = make_tar(members, format)
        end = -(-len(archive.rstrip(b"\0")) // BLOCK) * BLOCK + 2 * BLOCK
        assert list(samples("s.tar", [archive[:end]])) == list(samples("s.tar", [archive]))
        for cut in range(0, end, 7):
            with pytest.raises(DataError, match=r"^s\.tar: (truncated at byte|damaged)") as caught:
                list(samples("s.tar", [archive[:cut]]))
            told = re.search(r"truncated at byte (\d+)", str(caught.value))
            assert told is None or int(told[1]) == cut
            cuts += 1
    assert cuts >= 2000


# A kill.


def write_many(tmp_path: Path, count: int, label: Callable[[int], str]) -> str:
    root = tmp_path / "many"
    root.mkdir()
    for number in range(count):
        write_shard(root, number, label(number), label(number + 1))
    return root.as_uri()


def killed_build(tmp_path: Path, url: str, workers: int) -> list[int]:
    """A build that got SIGKILL when some shards were in the journal; ids of its processes."""
    script = tmp_path / "slow_build.py"
    script.write_text(SLOW_BUILD)
    process = subprocess.Popen([sys.executable, str(script), url, str(workers)])
    try:
        deadline = time.monotonic() + 60
        while len(journal(url)) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    return [int(child) for child in children]


def journal(url: str) -> list[str]:
    """Keys of its segments."""
    return [info.key for info in open_store(url).list("_vitscale/journal/")]


def journaled(url: str) -> set[int]:
    """Marks of the shards in all segments."""
    store, keys = open_store(url), journal(url)
    (identity,) = {key.rpartition("/")[2].partition("-")[0] for key in keys}
    segments = Journal(store, "_vitscale", identity).read(keys)
    return {int(entry) for segment in segments for entry in segment.entries["mark"]}


@pytest.mark.parametrize(("workers", "named"), [(1, False), (2, True)])
def test_a_killed_build_goes_on_where_it_was(tmp_path: Path, reads: list[str], workers: int, named: bool):
    names = ["ant", "bee", "cat", "dog"]
    url = write_many(tmp_path, 60, lambda n: names[n // 15 % 4] if named else str(n % 3))
    children = killed_build(tmp_path, url, workers)
    done = journaled(url)
    infos = [info for info in open_store(url).list() if info.key.endswith(".tar")]
    finished = {info.key for info in infos if mark(info.key, info.size, info.etag) in done}
    assert 0 < len(finished) < 60
    with pytest.raises(DataError, match="is not indexed"):
        DatasetIndex.open(url)

    index = build_index(url)
    assert set(reads) == {info.key for info in infos} - finished
    assert len(reads) == len(set(reads)), "each once"
    assert not journal(url)
    clean = build_index(copied(url, tmp_path / "clean"))
    assert (index.fingerprint, index.id_sum) == (clean.fingerprint, clean.id_sum)
    assert contents(index) == contents(clean)
    assert index.classes == (tuple(names) if named else ("0", "1", "2"))
    for child in children:
        assert gone(child, 20), "processes end with the one that started them"


def gone(process: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_a_journal_is_believed_only_as_far_as_it_holds(tmp_path: Path, reads: list[str]):
    url = write_many(tmp_path, 6, lambda n: "xy"[n % 2])
    root = folder(url)
    (root / "z.tar").write_bytes(b"broken")
    with pytest.raises(DataError):
        build_index(url)
    (root / "z.tar").unlink()
    (segment,) = root.glob("_vitscale/journal/*")
    whole = segment.read_bytes()
    damaged = bytearray(whole)
    damaged[-ENTRY.itemsize] ^= 1
    for data in (bytes(damaged), whole[:-1], b"", b"\n\n"):
        segment.write_bytes(data)
        reads.clear()
        with pytest.raises(ConfigError):  # before anything is read
            build_index(url, label="nonsense")
        copy = copied(url, tmp_path / "copy")
        assert build_index(url).fingerprint == build_index(copy).fingerprint
        assert len(set(reads)) == 6
        shutil.rmtree(root / "_vitscale")
        shutil.rmtree(tmp_path / "copy")
        segment.parent.mkdir(parents=True)
    segment.write_bytes(whole)
    reads.clear()
    assert build_index(url).classes == ("x", "y")
    assert len(set(reads)) == 6, "the records are gone"


def test_journal_segments_hold_so_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index_journal, "FLUSH_SHARDS", 4)
    url = write_many(tmp_path, 10, str)
    (folder(url) / "z.tar").write_bytes(b"broken")
    with pytest.raises(DataError):
        build_index(url)
    assert len(list(folder(url).glob("_vitscale/journal/*"))) == 3
    assert len(journaled(url)) == 10


# In processes.


def test_processes_give_the_same(tmp_path: Path):
    url = write_many(tmp_path, 12, lambda n: f"name {n % 5}")
    index = build_index(url, workers=2)
    assert index.fingerprint == build_index(copied(url, tmp_path / "copy"), workers=1).fingerprint
    (folder(url) / "s-003.tar").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"^s-003\.tar: truncated"):
        build_index(url, workers=2)


def test_sums_and_ids(tiny_url: str):
    index = build_index(tiny_url, classes=TINY_CLASSES)
    _, rows = index.records(0, 13)
    parts = [id_sum(rows["id"][shard.first :][: shard.num_samples]) for shard in index.shards]
    assert index.shards.rows["id_sum"].tolist() == parts
    assert index.id_sum == sum(parts) % (1 << 64)
    assert index.shards.rows["max_label"].tolist() == [1, 1, 1]
    assert [shard.name for shard in index.shards] == list(TINY_SHARDS)
    assert np.unique(rows["id"]).size == 13


def test_a_store_that_lists_in_no_order(tiny_url: str, tiny_index: DatasetIndex, monkeypatch):
    listing = FileStore.list

    def shuffled(self, prefix: str = "") -> Iterator[object]:
        yield from sorted(listing(self, prefix), key=lambda info: info.key[::-1], reverse=True)

    monkeypatch.setattr(FileStore, "list", shuffled)
    assert build_index(tiny_url, fresh=True) == tiny_index


def test_a_name_that_is_no_text(tiny_url: str):
    (folder(tiny_url) / os.fsdecode(b"\xff.tar")).write_bytes(make_tar([]))
    with pytest.raises(DataError, match=r"\\udcff.*its name is not UTF-8"):
        build_index(tiny_url)


def test_the_command(tmp_path: Path):
    write_shard(tmp_path, 0, "dog", "cat")
    (tmp_path / "classes.json").write_text(json.dumps({"cat": 1, "dog": 0}))
    command = [sys.executable, "-m", "pipelines.cli", "index", tmp_path.as_uri(), "--json"]
    command += ["--classes", str(tmp_path / "classes.json"), "--image-key", "png", "--label", "cls"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    index = DatasetIndex.open(tmp_path.as_uri())
    assert json.loads(done.stdout) == {
        "url": tmp_path.as_uri(),
        "fingerprint": index.fingerprint,
        "num_samples": 2,
        "num_shards": 1,
        "image_key": "png",
        "label": "cls",
        "classes": ["dog", "cat"],
    }
    (tmp_path / "classes.json").write_text("[]")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --classes ")
