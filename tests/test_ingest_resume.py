"""An ingest that is killed, whenever that is, goes on: the same bytes in the end, no shard written twice."""

import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.ingest import ingest, processes
from pipelines.ingest.work import MARKER
from tests.conftest import make_png
from tests.s3_server import ENVIRONMENT, s3_server
from tests.test_ingest import digests, read_shards
from tests.test_sources import cifar10, python2_batch, write_parquet
from workers.errors import DataError
from workers.storage import FileStore, ensure_bucket, open_store

SHARD_BYTES = 40_000
INGEST = """
import sys
from pipelines.ingest import ingest

if __name__ == "__main__":
    ingest(sys.argv[1], sys.argv[2], shard_bytes=int(sys.argv[3]), processes=int(sys.argv[4]))
"""


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,600 JPEGs of 32 x 32, in two classes: enough for four chunks and some twenty shards."""
    root = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for number in range(800):
            image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
            image.save(root / name / f"{number:04d}.jpg", quality=80)
    return root


@pytest.fixture(scope="module")
def undisturbed(noise: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = (tmp_path_factory.mktemp("undisturbed") / "out").as_uri()
    report = ingest(noise, url, shard_bytes=SHARD_BYTES)
    assert report.num_shards > 20
    return url


def results(url: str) -> dict[str, str]:
    """Digests of all that an ingest leaves, but for the store's own versions in the index."""
    kept = {key: digest for key, digest in digests(url).items() if key != MARKER and "/_vitscale/" not in key}
    return kept | {"fingerprint": json.loads(open_store(url).read(MARKER))["report"]["train_fingerprint"]}


def start(noise: Path, url: str, count: int) -> subprocess.Popen[bytes]:
    script = noise.parent / "script.py"
    script.write_text(INGEST)
    command = [sys.executable, str(script), str(noise), url, str(SHARD_BYTES), str(count)]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)


def is_running(process: subprocess.Popen[bytes]) -> list[int]:
    """Processes of its session that are alive."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue
        if path.name.isdigit() and int(fields[3]) == process.pid and fields[0] != "Z":
            found.append(int(path.name))
    return found


def test_killed_at_random_points(noise: Path, undisturbed: str, tmp_path: Path) -> None:
    root, random_ = tmp_path / "out", random.Random(1)
    written: dict[Path, int] = {}
    kills = 0
    for attempt in range(6):
        process = start(noise, root.as_uri(), 1 + attempt % 2)
        marks = random_.randint(1, 6)
        while (
            process.poll() is None and (now := len(list(root.rglob("written/*.json")))) < len(written) + marks
        ):
            if not now and random_.random() < 0.02 and kills < 2:
                break  # while it examines
            time.sleep(0.01)
        process.kill()
        _, error = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), error.decode()
        deadline = time.monotonic() + 20
        while is_running(process):
            assert time.monotonic() < deadline, "processes of a killed ingest end with it"
            time.sleep(0.02)
        if process.returncode == 0:
            break
        kills += 1
        recorded = {path.name.removesuffix(".json") for path in root.rglob("written/*.json")}
        shards = {path: path.stat().st_mtime_ns for path in root.rglob("*.tar") if path.name in recorded}
        assert written.items() <= shards.items(), "a finished shard was written again"
        written = shards
    assert kills >= 2
    report = ingest(noise, root.as_uri(), shard_bytes=SHARD_BYTES)
    assert written.items() <= {path: path.stat().st_mtime_ns for path in root.rglob("*.tar")}.items()
    assert results(root.as_uri()) == results(undisturbed)
    assert report.num_train + report.num_validation == 1600


def test_the_number_of_processes_changes_nothing(noise: Path, undisturbed: str, tmp_path: Path) -> None:
    url = (tmp_path / "out").as_uri()
    steps: list[tuple[str, int, int]] = []
    ingest(noise, url, shard_bytes=SHARD_BYTES, processes=3, progress=lambda *step: steps.append(step))
    assert results(url) == results(undisturbed)
    examined = [done for phase, done, total in steps if (phase, total) == ("examine", 1600)]
    assert examined == sorted(examined)
    assert (examined[0], examined[-1]) == (0, 1600)


def test_a_process_that_is_killed_is_told_and_the_next_attempt_goes_on(
    noise: Path, undisturbed: str, tmp_path: Path
) -> None:
    root = tmp_path / "out"
    process = start(noise, root.as_uri(), 2)
    while len(list(root.rglob("written/*.json"))) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    children = [pid for pid in is_running(process) if pid != process.pid]
    workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(workers[0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    if process.returncode:  # else all shards were given out already
        assert (
            "DataError: a process that was reading shards died (out of memory?); run it again"
            in error.decode()
        )
    ingest(noise, root.as_uri(), shard_bytes=SHARD_BYTES)
    assert results(root.as_uri()) == results(undisturbed)


def test_an_error_in_a_process_is_raised_here(noise: Path, tmp_path: Path) -> None:
    url = (tmp_path / "out").as_uri()
    with pytest.raises(DataError, match=r"no object .*out/_vitscale/ingest/x/listed/00000[01]\.parquet"):
        processes.map_in_processes("examine", [[url, "x", 0], [url, "x", 1]], 2, lambda images: None)


def test_what_was_found_out_serves_other_options(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ingest that stopped because of broken images does not examine all the others again."""
    broken = noise / "cat" / "broken.jpg"
    broken.write_bytes(b"?")
    url = (tmp_path / "out").as_uri()
    try:
        with pytest.raises(DataError, match="1 of 1601 images cannot be read"):
            ingest(noise, url)
        examined = digests(url)
        phases: list[tuple[str, int, int]] = []
        report = ingest(noise, url, skip_unreadable=True, progress=lambda *step: phases.append(step))
        assert [step for step in phases if step[0] == "examine"] == [("examine", 1601, 1601)]
        assert len([key for key in examined if "/examined/" in key]) == 4
        assert report.skipped == ("cat/broken.jpg: not a JPEG, PNG or WebP image",)
    finally:
        broken.unlink()


def test_what_is_left_when_all_is_done(undisturbed: str, noise: Path) -> None:
    """The shards, their index, the class map, the marker, and where each image went."""
    keys = {key for key in digests(undisturbed) if not key.endswith(".tar")}
    assert {key for key in keys if "/" not in key or key.startswith("_vitscale")} == {
        "classes.json",
        "_vitscale/ingest.json",
        "_vitscale/ingest/items.parquet",
    }
    assert json.loads(open_store(undisturbed).read("classes.json")) == {"cat": 0, "dog": 1}
    root = Path(undisturbed.removeprefix("file://"))
    rows = pq.read_table(root / "_vitscale" / "ingest" / "items.parquet").to_pylist()
    assert {row["name"] for row in rows} == {p.relative_to(noise).as_posix() for p in noise.rglob("*.jpg")}
    assert {(row["label"], row["class"], row["name"].split("/")[0]) for row in rows} == {
        (0, "cat", "cat"),
        (1, "dog", "dog"),
    }
    for row in rows[::200]:
        with tarfile.open(root / row["split"] / row["shard"]) as tar:
            assert tar.extractfile(f"{row['key']}.jpg").read() == (noise / row["name"]).read_bytes()
            assert tar.extractfile(f"{row['key']}.cls").read() == str(row["label"]).encode()


def test_a_record_that_no_longer_fits_its_shard(
    noise: Path, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that somebody replaced or removed before the end is written again."""
    url, root = (tmp_path / "out").as_uri(), tmp_path / "out"

    def fail(self: FileStore, key: str, *arguments: object) -> None:
        if key == "classes.json":
            raise DataError("the store is down")
        write(self, key, *arguments)

    write = FileStore.write
    with monkeypatch.context() as patch, pytest.raises(DataError, match="the store is down"):
        patch.setattr(FileStore, "write", fail)
        ingest(noise, url, shard_bytes=SHARD_BYTES)
    shards = sorted(root.rglob("*.tar"))
    shards[0].unlink()
    shards[1].write_bytes(b"other")
    (root / "train" / "train-000999.tar").write_bytes(b"stray")
    ingest(noise, url, shard_bytes=SHARD_BYTES)
    assert results(url) == results(undisturbed)


# From and to S3.


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as endpoint, pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | {"AWS_ENDPOINT_URL_S3": endpoint}).items():
            patch.setenv(name, value)
        ensure_bucket("s3://bucket")
        yield "s3://bucket"


def copy(folder: Path, url: str) -> str:
    store = open_store(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.upload(path.relative_to(folder).as_posix(), path)
    return url


def test_s3_gives_what_the_disk_gives(s3: str, photos: Callable[..., Path], tmp_path: Path) -> None:
    root = photos(cat=20, dog=20)
    local = ingest(root, (tmp_path / "a").as_uri())
    source = copy(root, f"{s3}/photos")
    report = ingest(source, f"{s3}/out")
    assert (report.train_fingerprint, report.classes) == (local.train_fingerprint, ("cat", "dog"))
    assert ingest(source, f"{s3}/out") == report
    again = ingest(f"{s3}/out", f"{s3}/again", format="wds")
    assert set(read_shards(again.train_url)) == set(read_shards(report.train_url))
    table = "".join(f"cat/{n:03d}.png,a\n{s3}/photos/dog/{n:03d}.png,b\n" for n in range(20))
    open_store(source).write("labels.csv", f"image,label\n{table}".encode())
    named = ingest(f"{source}/labels.csv", f"{s3}/table")
    assert set(read_shards(named.train_url)) == set(read_shards(report.train_url))
    with pytest.raises(
        DataError, match=r"labels\.csv names 1 files that are not there:\n  line 2: cat/99\.png"
    ):
        open_store(source).write("labels.csv", b"image,label\ncat/99.png,a\n")
        ingest(f"{source}/labels.csv", f"{s3}/no")


def test_parquet_and_cifar_from_s3(s3: str, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    write_parquet(folder / "p" / "x.parquet", [{"image": make_png(n), "label": n % 2} for n in range(30)])
    (folder / "c" / "cifar-10-batches-py").mkdir(parents=True)
    (folder / "c" / "cifar-10-batches-py" / "data_batch_1").write_bytes(python2_batch(cifar10(1, 60, 2)[0]))
    source = copy(folder, f"{s3}/sources")
    for name, kind in (("p", "parquet"), ("c", "cifar"), ("p/x.parquet", "parquet")):
        local = ingest(folder / name, (tmp_path / "out" / name).as_uri(), validation=0.4)
        report = ingest(f"{source}/{name}", f"{s3}/out-{name}", validation=0.4)
        assert (report.format, report.train_fingerprint) == (kind, local.train_fingerprint)
