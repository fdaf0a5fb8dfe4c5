"""Object stores: `s3://bucket/prefix` through boto3 and `file:///path`, one small interface for both.

Reads of a range resume where a broken connection left them, because botocore never retries a body
(boto3 issue 4111). `create` writes an object only if it does not exist: on `file://` by linking a
complete temporary file, on S3 by `If-None-Match: *`. Not every S3 server keeps that promise under
races, so a store that is to hold runs must pass `probe` first. boto3 is imported on first use: a
machine with local files alone need not have it.
"""

import concurrent.futures
import configparser
import contextlib
import errno
import functools
import hashlib
import io
import os
import secrets
import shutil
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from workers.errors import ConfigError, DataError

READ_ATTEMPTS = 5
RACERS = 16
"""Writers in each create-once race of the probe; Swift loses 3 of 4 races of this width."""


class NotFound(DataError):
    """No object at this key."""


class AlreadyExists(DataError):
    """A create-once write found the object there."""


@dataclass(frozen=True)
class ObjectInfo:
    key: str
    size: int
    """Bytes."""
    etag: str
    """Changes whenever the content may have: the ETag on S3, mtime and size for a file."""


class Store(Protocol):
    """The objects below one URL; keys are relative to it and use `/`."""

    url: str

    def read(self, key: str) -> bytes: ...
    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        """Exactly `length` bytes from byte `start`; DataError if too short or no longer the `etag` one."""

    def head(self, key: str) -> ObjectInfo:
        """NotFound if there is no such object."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]: ...
    def write(self, key: str, data: bytes) -> None:
        """Whole or not at all; replaces what was there."""

    def upload(self, key: str, path: Path) -> None:
        """The file's bytes as an object, without holding them in memory; replaces what was there."""

    def create(self, key: str, data: bytes) -> None:
        """AlreadyExists if the object is there; whoever returns is the only writer."""

    def delete(self, key: str) -> None: ...


def open_store(url: str) -> Store:
    """A store below `s3://bucket[/prefix]` or `file:///directory`."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "s3" and parts.netloc:
        return S3Store(parts.netloc, parts.path.strip("/"))
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return FileStore(Path(urllib.parse.unquote(parts.path)))
    raise ConfigError(f"{url!r} is not a store: expected s3://bucket/prefix or file:///absolute/path")


def join_url(root: str, *keys: str) -> str:
    return "/".join([root.rstrip("/"), *(key.strip("/") for key in keys)])


class FileStore:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = root.as_uri()

    def _path(self, key: str) -> Path:
        if key.startswith("/") or ".." in key.split("/"):
            raise DataError(f"{key!r} would leave the store {self.url}")
        return self.root / key

    def read(self, key: str) -> bytes:
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise NotFound(f"no object {join_url(self.url, key)}") from None

    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        try:
            with self._path(key).open("rb") as file:
                _check_etag(self.url, key, _file_etag(os.fstat(file.fileno())), etag)
                file.seek(start)
                data = file.read(length)
        except FileNotFoundError:
            raise NotFound(f"no object {join_url(self.url, key)}") from None
        return _exactly(data, length, join_url(self.url, key), start)

    def head(self, key: str) -> ObjectInfo:
        try:
            stat = self._path(key).stat()
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"no object {join_url(self.url, key)}") from None
        return ObjectInfo(key, stat.st_size, _file_etag(stat))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        start = self._path(prefix.rpartition("/")[0])
        for path in sorted(start.rglob("*")):
            key = path.relative_to(self.root).as_posix()
            if key.startswith(prefix) and not path.name.startswith(".tmp-") and path.is_file():
                yield self.head(key)

    def write(self, key: str, data: bytes) -> None:
        with self._temporary(key, io.BytesIO(data)) as temporary:
            temporary.replace(self._path(key))

    def upload(self, key: str, path: Path) -> None:
        with path.open("rb") as source, self._temporary(key, source) as temporary:
            temporary.replace(self._path(key))

    def create(self, key: str, data: bytes) -> None:
        with self._temporary(key, io.BytesIO(data)) as temporary:
            try:
                # link() fails if the name exists and, unlike O_EXCL, never shows a half-written file.
                os.link(temporary, self._path(key))
            except FileExistsError:
                raise AlreadyExists(f"{join_url(self.url, key)} exists") from None

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _temporary(self, key: str, source: BinaryIO) -> Iterator[Path]:
        target = self._path(key)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=target.parent, prefix=".tmp-")
        except OSError as error:
            raise DataError(f"cannot write {join_url(self.url, key)}: {error.strerror}") from error
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(
                    f"no space left for {join_url(self.url, key)}; free some and run again"
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)


class S3Store:
    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _call(self, operation: str, key: str, **arguments: Any) -> Any:
        with _s3_errors(join_url(self.url, key)):
            return getattr(s3_client(), operation)(Bucket=self.bucket, Key=self._key(key), **arguments)

    def read(self, key: str) -> bytes:
        return self._get(key, 0, None, None)

    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        return self._get(key, start, length, etag) if length else b""

    def _get(self, key: str, start: int, length: int | None, etag: str | None) -> bytes:
        """A body that breaks off keeps what came; the next attempt asks for the rest of the same version."""
        data = bytearray()
        for attempt in range(READ_ATTEMPTS):
            if attempt:
                time.sleep(min(0.1 * 2**attempt, 2.0))
            arguments = {"IfMatch": etag} if etag else {}
            if length is not None:
                arguments["Range"] = f"bytes={start + len(data)}-{start + length - 1}"
            response = self._call("get_object", key, **arguments)
            length = response["ContentLength"] if length is None else length
            etag = etag or response["ETag"]
            with contextlib.suppress(*_broken_body()):
                for piece in response["Body"].iter_chunks(1 << 20):
                    data += piece
            if len(data) >= length:
                break
        return _exactly(bytes(data), length or 0, join_url(self.url, key), start)

    def head(self, key: str) -> ObjectInfo:
        response = self._call("head_object", key)
        return ObjectInfo(key, response["ContentLength"], response["ETag"])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        pages = (
            s3_client()
            .get_paginator("list_objects_v2")
            .paginate(Bucket=self.bucket, Prefix=self._key(prefix))
        )
        skip = len(self.prefix) + 1 if self.prefix else 0
        with _s3_errors(join_url(self.url, prefix)):
            for page in pages:
                for item in page.get("Contents", []):
                    yield ObjectInfo(item["Key"][skip:], item["Size"], item["ETag"])

    def write(self, key: str, data: bytes) -> None:
        self._call("put_object", key, Body=data)

    def upload(self, key: str, path: Path) -> None:
        with _s3_errors(join_url(self.url, key)):
            s3_client().upload_file(str(path), self.bucket, self._key(key))

    def create(self, key: str, data: bytes) -> None:
        self._call("put_object", key, Body=data, IfNoneMatch="*")

    def delete(self, key: str) -> None:
        self._call("delete_object", key)


def ensure_bucket(url: str, *, environment: Mapping[str, str] | None = None) -> None:
    """Create the bucket of an `s3://` URL if it is not there."""
    bucket = urllib.parse.urlsplit(url).netloc
    client = _new_client(environment) if environment is not None else s3_client()
    with _s3_errors(url):
        try:
            client.head_bucket(Bucket=bucket)
        except client.exceptions.ClientError as error:
            if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
                raise
            client.create_bucket(Bucket=bucket)


def probe(store: Store) -> str | None:
    """Can this store hold runs? None if it can, else what it gets wrong.

    Checks a create-once race of 16 writers (at most one may win), a ranged read, and that the bytes
    that come back are those that went.
    """
    key = f"probe/{secrets.token_hex(8)}"
    payload = [secrets.token_bytes(4096) for _ in range(RACERS)]

    def race(writer: int) -> int | None:
        try:
            store.create(key, payload[writer])
        except AlreadyExists:
            return None
        return writer

    try:
        with concurrent.futures.ThreadPoolExecutor(RACERS) as pool:
            winners = [w for w in pool.map(race, range(RACERS)) if w is not None]
        if len(winners) != 1:
            return f"{len(winners)} of {RACERS} create-once writers of one object were told that they had won"
        whole = store.read(key)
        if hashlib.sha256(whole).digest() != hashlib.sha256(payload[winners[0]]).digest():
            return "an object did not come back as it was written"
        if store.read_range(key, 1000, 100) != whole[1000:1100]:
            return "a ranged read returned other bytes"
    finally:
        store.delete(key)
    return None


def _file_etag(stat: os.stat_result) -> str:
    return f"{stat.st_mtime_ns:x}-{stat.st_size:x}"


def _check_etag(url: str, key: str, found: str, expected: str | None) -> None:
    if expected is not None and found != expected:
        raise DataError(f"{join_url(url, key)} changed since it was indexed; run `vitscale index` again")


def _exactly(data: bytes, length: int, where: str, start: int) -> bytes:
    if len(data) != length:
        raise DataError(
            f"{where}: wanted {length} bytes from byte {start}, got {len(data)}; the object is truncated"
        )
    return data


@functools.cache
def s3_client() -> Any:
    """The process's S3 client; boto3 clients are safe to share between threads."""
    return _new_client(os.environ)


def _new_client(environment: Mapping[str, str]) -> Any:
    import botocore.config
    import botocore.session

    session = botocore.session.Session()
    for variable, name in (
        ("AWS_CONFIG_FILE", "config_file"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials_file"),
    ):
        if variable in environment:
            session.set_config_variable(name, environment[variable])
    # Newer botocore adds checksum trailers that Ceph 16, R2 and others refuse; our digests guard the bytes.
    config = botocore.config.Config(
        signature_version="s3v4",
        s3={"addressing_style": _addressing_style(environment)},
        retries={"mode": "standard", "max_attempts": READ_ATTEMPTS},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=64,
        connect_timeout=10,
        read_timeout=60,
    )
    import boto3

    return boto3.session.Session(botocore_session=session).client(
        "s3",
        endpoint_url=environment.get("AWS_ENDPOINT_URL_S3"),
        region_name=environment.get("AWS_REGION", "us-east-1"),
        config=config,
    )


def _addressing_style(environment: Mapping[str, str]) -> str:
    """`path` for a server of one's own, which seldom has a DNS name per bucket; AWS's default otherwise."""
    if environment.get("AWS_ENDPOINT_URL_S3"):
        return "path"
    file = configparser.ConfigParser()
    file.read(Path(environment.get("AWS_CONFIG_FILE", "~/.aws/config")).expanduser())
    return "path" if file.has_option("default", "endpoint_url") else "auto"


def _broken_body() -> tuple[type[Exception], ...]:
    from botocore.exceptions import (
        ConnectionClosedError,
        IncompleteReadError,
        ReadTimeoutError,
        ResponseStreamingError,
    )

    return (ConnectionClosedError, IncompleteReadError, ReadTimeoutError, ResponseStreamingError)


@contextlib.contextmanager
def _s3_errors(where: str) -> Iterator[None]:
    """botocore's exceptions as ours, naming the object and what to do."""
    from boto3.exceptions import S3UploadFailedError
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        yield
    except ClientError as error:
        code = error.response["Error"]["Code"]
        message = error.response["Error"].get("Message", "")
        if code in ("404", "NoSuchKey", "NoSuchBucket", "NotFound"):
            raise NotFound(
                f"no object {where}" + (" (no such bucket)" if code == "NoSuchBucket" else "")
            ) from error
        if code in ("412", "PreconditionFailed", "ConditionalRequestConflict"):
            if error.operation_name == "PutObject":
                raise AlreadyExists(f"{where} exists") from error
            raise DataError(f"{where} changed since it was indexed; run `vitscale index` again") from error
        if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
            raise DataError(
                f"{where}: the object store refused the credentials ({code}); check the AWS profile"
            ) from error
        raise DataError(f"{where}: the object store answered {code} {message}") from error
    except NoCredentialsError as error:
        raise DataError(
            f"{where}: no S3 credentials found; set up an AWS profile or run `vitscale up`"
        ) from error
    except (BotoCoreError, S3UploadFailedError) as error:
        raise DataError(
            f"{where}: the object store cannot be reached ({error}); is it up? `vitscale up`"
        ) from error
