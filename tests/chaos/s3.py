"""The S3 server of the trials: Ceph's RADOS Gateway where it is installed, else moto's."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.benchmarks import rgw
from tests.s3_server import ENVIRONMENT, s3_server
from workers.storage import s3_client


@contextlib.contextmanager
def real_store() -> Iterator[dict[str, str]]:
    """What its clients have in their environment. moto's refuses nothing and forgets all when it ends."""
    try:
        rgw.check()
    except rgw.CannotStart:
        with s3_server() as endpoint:
            yield ENVIRONMENT | {"AWS_ENDPOINT_URL_S3": endpoint}
        return
    with (
        tempfile.TemporaryDirectory(prefix="vitscale-rgw-") as folder,
        rgw.running(Path(folder) / "rgw") as server,
    ):
        yield server.environment()


@contextlib.contextmanager
def as_client(environment: Mapping[str, str]) -> Iterator[None]:
    """This process, and those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        s3_client.cache_clear()
        yield
    s3_client.cache_clear()
