"""`vitscale verify`: whatever is wrong with a data set is found and named, all of it at once."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from tests.conftest import make_png, make_tar
from workers.data import shard_rows
from workers.data import verify as verify_module
from workers.data.index import STORED, DatasetIndex, records_key
from workers.data.indexing import build_index
from workers.data.tar import BLOCK
from workers.data.verify import Problem, ShardCheck, verify, verify_shard
from workers.errors import DataError
from workers.storage import FileStore

IMAGES = 6
"""Of each shard."""


def folder(url: str) -> Path:
    return Path(urlsplit(url).path)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Three indexed shards of six PNGs each, keys k<shard>-<place>, with directories amid them."""
    root = tmp_path / "set"
    root.mkdir()
    for shard in range(3):
        members = [("d/", b"")]
        for place in range(IMAGES):
            key = f"d/k{shard}-{place}"
            members += [(f"{key}.cls", b"1"), (f"{key}.png", make_png(10 * shard + place, size=20))]
        (root / f"s{shard}.tar").write_bytes(make_tar([*members, ("e/", b"")]))
    build_index(root.as_uri())
    return root.as_uri()


def check(url: str, number: int) -> ShardCheck:
    index = DatasetIndex.open(url)
    return ShardCheck(index.url, index.home, index.shards[number], (0,))


def row_of(url: str, ordinal: int) -> tuple[int, int]:
    """Its byte range."""
    row = DatasetIndex.open(url).records(ordinal, 1)[1][0]
    return int(row["offset"]), int(row["size"])


def test_a_whole_data_set(url: str):
    steps: list[tuple[int, int]] = []
    report = verify(url, progress=lambda *step: steps.append(step))
    index = DatasetIndex.open(url)
    assert report.problems == ()
    assert (report.num_shards, report.num_samples, report.num_decoded) == (3, 18, 18)
    assert report.num_bytes == sum(shard.size for shard in index.shards)
    assert (report.fingerprint, report.num_rewritten) == (index.fingerprint, 0)
    assert steps == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("wanted", "places"), [(0, []), (1, [9]), (3, [3, 9, 15]), (6, [1, 4, 7, 10, 13, 16]), (None, range(18))]
)
def test_images_to_decode_are_spread_evenly(
    url: str, wanted: int | None, places: list[int], monkeypatch: pytest.MonkeyPatch
):
    seen = []
    decode = verify_module.decode_image

    def spy(data, *, channels):
        seen.append(data)
        return decode(data, channels=channels)

    monkeypatch.setattr(verify_module, "decode_image", spy)
    report = verify(url, decode=wanted)
    images = [make_png(10 * (place // IMAGES) + place % IMAGES, size=20) for place in places]
    assert sorted(seen) == sorted(images)
    assert report.num_decoded == len(images)


def test_all_problems_at_once(url: str):
    root = folder(url)
    whole = {path.name: path.read_bytes() for path in root.glob("*.tar")}
    start, size = row_of(url, 2)
    damaged = bytearray(whole["s0.tar"])
    damaged[start + size - 100] ^= 1
    (root / "s0.tar").write_bytes(damaged)
    cut, _ = row_of(url, IMAGES + 3)
    (root / "s1.tar").write_bytes(whole["s1.tar"][: cut + 700])
    (root / "s2.tar").unlink()
    (root / "s9.tar").write_bytes(whole["s0.tar"])
    report = verify(url)
    assert report.problems == (
        Problem("s0.tar", f"bytes {start} to {start + size} are not what was indexed", "d/k0-2", start),
        Problem(
            "s1.tar",
            f"truncated: {cut + 700} of {len(whole['s1.tar'])} bytes, 3 of its samples are cut off",
            byte=cut + 700,
        ),
        Problem("s2.tar", "missing"),
        Problem("s9.tar", "not in the index; run `vitscale index` if it belongs there"),
    )


def test_bytes_that_were_added(url: str):
    path = folder(url) / "s1.tar"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + bytes(BLOCK))
    assert verify(url).problems == (
        Problem("s1.tar", "512 bytes longer than when it was indexed", byte=size),
    )


def test_damage_outside_of_all_samples(url: str):
    path = folder(url) / "s1.tar"
    damaged = bytearray(path.read_bytes())
    damaged[-1] = 1
    path.write_bytes(damaged)
    said = "its sha256 is another; what differs lies in no sample"
    assert verify(url).problems == (Problem("s1.tar", said),)


def test_a_header_that_cannot_be_read_leaves_the_key_out(url: str):
    path = folder(url) / "s0.tar"
    start, size = row_of(url, 1)
    damaged = bytearray(path.read_bytes())
    damaged[start] ^= 1
    path.write_bytes(damaged)
    said = f"bytes {start} to {start + size} are not what was indexed"
    assert verify(url).problems == (Problem("s0.tar", said, None, start),)


def test_images_that_are_none(tmp_path: Path):
    members = []
    for number in range(4):
        image = make_png(number) if number % 2 else b"\x89PNG no image"
        members += [(f"{number}.png", image), (f"{number}.cls", b"0")]
    (tmp_path / "s.tar").write_bytes(make_tar(members))
    build_index(tmp_path.as_uri())
    report = verify(tmp_path.as_uri(), decode=None)
    assert [(problem.shard, problem.key) for problem in report.problems] == [("s.tar", "0"), ("s.tar", "2")]
    assert all("its image cannot be decoded: no JPEG" in problem.what for problem in report.problems)
    assert verify(tmp_path.as_uri(), decode=0).problems == ()


def test_damaged_rows(url: str):
    index = DatasetIndex.open(url)
    for number, damage in enumerate(("flip", "cut", "gone")):
        shard = index.shards[number]
        path = folder(url) / records_key(index.home, shard.name, shard.records_sha256)
        data = bytearray(path.read_bytes())
        data[2 * STORED.itemsize + 5] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-1])
        if damage == "gone":
            path.unlink()
    found = [(problem.shard, problem.what) for problem in verify(url).problems]
    keys = [records_key("_vitscale", shard.name, shard.records_sha256) for shard in index.shards]
    assert found == [
        ("s0.tar", f"its rows, {keys[0]}, are damaged; run `vitscale index`"),
        ("s0.tar", f"row 2 of {keys[0]} is damaged; run `vitscale index`"),
        ("s1.tar", f"its rows, {keys[1]}, are damaged; run `vitscale index`"),
        ("s1.tar", f"row 2 of {keys[1]} is damaged; run `vitscale index`"),
        ("s2.tar", f"its rows, {keys[2]}, are missing; run `vitscale index`"),
    ]


def test_the_same_bytes_written_anew(url: str):
    os.utime(folder(url) / "s1.tar", (1, 1))
    report = verify(url)
    assert (report.problems, report.num_rewritten) == ((), 1)


@pytest.mark.parametrize("piece", [100, 512, 5000])
def test_pieces_of_any_size_find_the_same(url: str, piece: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shard_rows, "PIECE_BYTES", piece)
    assert verify(url).problems == ()
    test_all_problems_at_once(url)


def test_every_bit_flip_is_found(url: str):
    """1,200 of them, all over a shard and its padding; each in a process's own function."""
    task, path = check(url, 1), folder(url) / "s1.tar"
    whole = path.read_bytes()
    assert verify_shard(task).problems == []
    rng = random.Random(1)
    for bit in rng.sample(range(8 * len(whole)), 1200):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        (problem,) = verify_shard(task).problems
        assert problem.byte is None or problem.byte <= bit // 8


def test_every_truncation_is_found(url: str):
    """Every 5th byte, some 2,900 places; the byte where it ends is named."""
    task, path = check(url, 0), folder(url) / "s0.tar"
    whole = path.read_bytes()
    cuts = range(0, len(whole), max(1, len(whole) // 2100))
    assert len(cuts) >= 2000
    for cut in reversed(cuts):
        os.truncate(path, cut)
        (problem,) = verify_shard(task).problems
        assert problem.what.startswith(f"truncated: {cut} of {len(whole)} bytes")
        assert problem.byte == cut


def test_many_problems_of_one_shard_are_summed_up(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verify_module, "MAX_TOLD", 2)
    path = folder(url) / "s0.tar"
    damaged = bytearray(path.read_bytes())
    for ordinal in range(IMAGES):
        start, size = row_of(url, ordinal)
        damaged[start + size - 1] ^= 1
    path.write_bytes(damaged)
    assert sorted(problem.what for problem in verify(url).problems)[0] == "and 4 more samples"
    assert len(verify(url).problems) == 3


def test_a_store_that_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for number in range(40):
        (tmp_path / f"{number:02d}.tar").write_bytes(make_tar([("a.jpg", b"?"), ("a.cls", b"0")]))
    build_index(tmp_path.as_uri())

    def down(self, key, *range):
        raise DataError(f"{key}: the object store cannot be reached")

    monkeypatch.setattr(FileStore, "read_range", down)
    with pytest.raises(
        DataError, match=r"20 shards in a row cannot be read, the last because: .* be reached"
    ):
        verify(tmp_path.as_uri())


def test_a_brace_list(url: str):
    pattern = f"{url}/s{{0..1}}.tar"
    build_index(pattern)
    assert verify(pattern).problems == ()
    (folder(url) / "s1.tar").unlink()
    assert verify(pattern).problems == (Problem("s1.tar", "missing"),)


def test_processes_find_the_same(url: str):
    (folder(url) / "s1.tar").unlink()
    assert verify(url, workers=2).problems == (Problem("s1.tar", "missing"),)


def test_the_command(url: str):
    done = CliRunner().invoke(app, ["verify", url, "--decode", "all", "--json"])
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert (report["num_samples"], report["num_decoded"], report["problems"]) == (18, 18, [])

    (folder(url) / "s1.tar").write_bytes((folder(url) / "s1.tar").read_bytes()[:3000])
    command = [sys.executable, "-m", "pipelines.cli", "verify", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "s1.tar" in done.stdout and "3000" in done.stdout and "truncated: 3000 of" in done.stdout
    assert done.stdout.splitlines()[-1].endswith(", 1 problem")
    assert CliRunner().invoke(app, ["verify", url, "--json"]).exit_code == 1
    for wrong in ("-1", "some"):
        refused = subprocess.run([*command, f"--decode={wrong}"], capture_output=True, text=True, timeout=60)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert f"--decode {wrong}: expected a number, or all" in refused.stderr
