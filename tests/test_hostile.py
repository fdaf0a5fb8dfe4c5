"""Input that would run code, leave its place or take all memory, if anything were to open it."""

import io
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from pipelines.ingest import ingest
from tests.conftest import make_png, make_tar
from tests.test_stream import make_source, make_stream, take
from workers.data.index import DatasetIndex
from workers.data.indexing import build_index
from workers.data.verify import verify
from workers.errors import VitscaleError
from workers.storage import s3_client


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def members(proof):
    """Twelve samples, each with files that run code when a careless reader opens them."""
    payload = pickle.dumps(Runs(proof))
    array, weights = io.BytesIO(), io.BytesIO()
    np.save(array, np.array([Runs(proof)], object), allow_pickle=True)
    torch.save(Runs(proof), weights)
    bad = {
        "pyd": payload,
        "pickle": payload,
        "pkl": payload,
        "npy": array.getvalue(),
        "pth": weights.getvalue(),
    }
    bad |= {"json": b"{", "gz": b"\x1f\x8b" + b"\0" * 20, "eps": b"%!PS\n(x) run", "py": b"open('x', 'w')"}
    for number in range(12):
        yield f"{number:03d}.cls", b"%d" % (number % 2)
        yield f"{number:03d}.png", make_png(number)
        for extension, data in bad.items():
            yield f"{number:03d}.{extension}", data


@pytest.fixture
def proof(tmp_path):
    path = tmp_path / "code-ran"
    pickle.loads(pickle.dumps(Runs(path))).close()
    assert path.exists(), "the payload works"
    path.unlink()
    return path


def test_members_that_are_code_are_never_opened(tmp_path, proof):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/s.tar").write_bytes(make_tar(members(proof)))
    index = build_index((tmp_path / "data").as_uri())
    assert index.num_samples == 12
    assert verify(index.url, decode=None).problems == ()
    batches = take(make_stream([make_source(index)]), 3)
    assert {int(label) for batch in batches for label in batch.labels} == {0, 1}
    report = ingest(str(tmp_path / "data"), (tmp_path / "again").as_uri(), validation=0.4)
    assert report.num_train + report.num_validation == 12
    assert not proof.exists()


@pytest.mark.parametrize(
    "url",
    [
        "pipe:touch {proof}",
        "pipe:touch {proof}; echo x.tar",
        "file:///data/$(touch {proof})-{{000..001}}.tar",
        "s3://hostile/`touch {proof}`.tar",
        "http://127.0.0.1/x.tar",
        "gopen:touch",
    ],
)
def test_addresses_run_nothing(tmp_path, proof, url, monkeypatch, request):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    s3_client.cache_clear()
    request.addfinalizer(s3_client.cache_clear)
    address = url.format(proof=proof)
    for act in (build_index, DatasetIndex.open, verify):
        with pytest.raises(VitscaleError):
            act(address)
    with pytest.raises(VitscaleError):
        ingest(address, (tmp_path / "out").as_uri())
    assert not proof.exists()


CODE = """
import json, resource, sys
import workers.data.indexing as indexing, workers.data.stream
from workers.errors import VitscaleError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    said = str(indexing.build_index(sys.argv[1]).num_samples)
except VitscaleError as error:
    said = str(error)
print(json.dumps([said, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""


@pytest.mark.parametrize("size", ["huge member", "huge PAX header", "long name"])
def test_sizes_that_lie_take_no_memory(tmp_path, size):
    """Headers of gigabytes in an archive of kilobytes: in 100 MB, with the name of the shard."""
    block = bytearray(make_tar([("a.png", make_png(1))])[:512])
    block[124:136] = b"77777777777\0"  # 8 GB, in octal
    block[156:157] = {"huge member": b"0", "huge PAX header": b"x", "long name": b"L"}[size]
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    (tmp_path / "s.tar").write_bytes(bytes(block) + make_tar([("b.png", make_png(1)), ("b.cls", b"0")]))
    done = subprocess.run(
        [sys.executable, "-c", CODE, tmp_path.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    said, kilobytes = json.loads(done.stdout)
    assert "s.tar" in said and "bytes" in said
    assert kilobytes < 100_000
