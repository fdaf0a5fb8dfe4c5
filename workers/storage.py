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
import io
import os
import re
import secrets
import shutil
import stat
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from workers.errors import ConfigError, DataError

READ_ATTEMPTS = 5
READ_PIECE = 1 << 16
"""Bytes; what came of a piece is lost when the connection is reset. Smaller ones cost CPU."""
TEMPORARY = ".tmp-"
"""How files begin that are being written; they are no objects."""
RACERS, RACES = 16, 8
"""Writers in each create-once race of the probe, and races; Swift loses 3 of 4 races of this width."""


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


def open_store(url: str, *, environment: Mapping[str, str] | None = None) -> Store:
    """A store below `s3://bucket[/prefix]` or `file:///directory`.

    `environment` says where S3 is and who asks, in AWS's variables; by default this process's own does.
    """
    if match := re.fullmatch(r"s3://([A-Za-z0-9][A-Za-z0-9._-]+)(/[^?#]*)?", url):
        client = s3_client if environment is None else functools.partial(_new_client, dict(environment))
        return S3Store(match[1], (match[2] or "").strip("/"), client)
    if match := re.fullmatch(r"file://(?:localhost)?(/[^?#]*)", url):
        return FileStore(Path(urllib.parse.unquote(match[1])))
    shown = re.sub("//.*@", "//...@", url)
    raise ConfigError(f"{shown!r} is not a store: expected s3://bucket/prefix or file:///absolute/path")


def join_url(root: str, *keys: str) -> str:
    return "/".join([root.rstrip("/"), *(key.strip("/") for key in keys)])


class FileStore:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = root.as_uri()

    def _path(self, key: str) -> Path:
        if key.startswith("/") or ".." in key.split("/") or "\0" in key:
            raise DataError(f"{key!r} would leave the store {self.url}")
        return self.root / key

    def read(self, key: str) -> bytes:
        with _file_errors("read", join_url(self.url, key)):
            return self._path(key).read_bytes()

    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        where = join_url(self.url, key)
        with _file_errors("read", where), self._path(key).open("rb") as file:
            _check_etag(where, _file_etag(os.fstat(file.fileno())), etag)
            file.seek(start)
            data = file.read(length)
        return _exactly(data, length, where, start)

    def head(self, key: str) -> ObjectInfo:
        with _file_errors("read", join_url(self.url, key)):
            found = self._path(key).stat()
            if not stat.S_ISREG(found.st_mode):
                raise IsADirectoryError
        return ObjectInfo(key, found.st_size, _file_etag(found))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        start = self._path(prefix.rpartition("/")[0])
        keys = [
            Path(folder, name).relative_to(self.root).as_posix()
            for folder, _, names in os.walk(start, onerror=self._cannot_list)
            for name in names
            if not name.startswith(TEMPORARY)
        ]
        for key in sorted(key for key in keys if key.startswith(prefix)):
            # Others may delete meanwhile.
            with contextlib.suppress(NotFound):
                yield self.head(key)

    def _cannot_list(self, error: OSError) -> None:
        with contextlib.suppress(NotFound), _file_errors("list", self.url):
            raise error

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
                # NFS says so also of the link that it made for us, if its first reply was lost.
                if temporary.stat().st_nlink != 2:
                    raise AlreadyExists(f"{join_url(self.url, key)} exists") from None

    def delete(self, key: str) -> None:
        with contextlib.suppress(NotFound), _file_errors("delete", join_url(self.url, key)):
            self._path(key).unlink()

    @contextlib.contextmanager
    def _temporary(self, key: str, source: BinaryIO) -> Iterator[Path]:
        """A complete file beside the key's, with the rights that the umask leaves; gone afterwards."""
        parent = self._path(key).parent
        temporary = parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "no space left; free some and run again" if full else error.strerror
            raise DataError(f"cannot write {join_url(self.url, key)}: {reason}") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


class S3Store:
    def __init__(self, bucket: str, prefix: str, client: Callable[[], Any]) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self._client = functools.cache(client)
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _call(self, operation: str, key: str, **arguments: Any) -> Any:
        with _s3_errors(join_url(self.url, key)):
            return getattr(self._client(), operation)(Bucket=self.bucket, Key=self._key(key), **arguments)

    def read(self, key: str) -> bytes:
        return self._get(key, 0, None, None)

    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        return self._get(key, start, length, etag) if length else b""

    def _get(self, key: str, start: int, length: int | None, etag: str | None) -> bytes:
        """A body that breaks off keeps what came; the next attempt asks for the rest of the same version."""
        where = join_url(self.url, key)
        data = bytearray()
        for attempt in range(READ_ATTEMPTS):
            if attempt:
                time.sleep(min(0.1 * 2**attempt, 2.0))
            arguments = {"IfMatch": etag} if etag else {}
            if length is not None:
                arguments["Range"] = f"bytes={start + len(data)}-{start + length - 1}"
            response = self._call("get_object", key, **arguments)
            with contextlib.closing(response["Body"]) as body:
                coming = len(data) + response["ContentLength"]
                if length is None:
                    length = coming
                elif not response.get("ContentRange", "").startswith(f"bytes {start + len(data)}-"):
                    raise DataError(f"{where}: the object store sends another range than it was asked for")
                elif coming < length:
                    raise _truncated(where, start, length, coming)
                etag = etag or response["ETag"]
                with contextlib.suppress(*_broken_body()):
                    for piece in body.iter_chunks(READ_PIECE):
                        data += piece
            if len(data) >= length:
                return bytes(data)
        raise DataError(f"{where}: the connection broke {READ_ATTEMPTS} times; run the same command again")

    def head(self, key: str) -> ObjectInfo:
        response = self._call("head_object", key)
        return ObjectInfo(key, response["ContentLength"], response["ETag"])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        skip = len(self.prefix) + 1 if self.prefix else 0
        with _s3_errors(join_url(self.url, prefix)):
            paginator = self._client().get_paginator("list_objects_v2")
            for page in paginator.paginate(Bucket=self.bucket, Prefix=self._key(prefix)):
                for item in page.get("Contents", []):
                    # Consoles mark "folders" by empty objects whose keys end in a slash.
                    if not item["Key"].endswith("/"):
                        yield ObjectInfo(item["Key"][skip:], item["Size"], item["ETag"])

    def write(self, key: str, data: bytes) -> None:
        self._call("put_object", key, Body=data)

    def upload(self, key: str, path: Path) -> None:
        with _s3_errors(join_url(self.url, key)):
            self._client().upload_file(str(path), self.bucket, self._key(key))

    def create(self, key: str, data: bytes) -> None:
        # The mark tells our own object from another's when the reply to a write was lost and botocore,
        # which then writes again, is told that there is one.
        mark = {"writer": secrets.token_hex(16)}
        for _ in range(READ_ATTEMPTS):
            try:
                self._call("put_object", key, Body=data, IfNoneMatch="*", Metadata=mark)
            except AlreadyExists:
                # There is none if the write was refused because of a delete at the same moment.
                with contextlib.suppress(NotFound):
                    if self._call("head_object", key)["Metadata"] == mark:
                        return
                    raise
            else:
                return
        raise DataError(f"{join_url(self.url, key)}: the object store refuses it and holds none")

    def delete(self, key: str) -> None:
        self._call("delete_object", key)


def ensure_bucket(url: str, *, environment: Mapping[str, str] | None = None) -> None:
    """Create the bucket of an `s3://` URL if it is not there."""
    bucket = urllib.parse.urlsplit(url).netloc
    with _s3_errors(url):
        client = _new_client(environment) if environment is not None else s3_client()
        try:
            client.head_bucket(Bucket=bucket)
        except client.exceptions.ClientError as error:
            if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
                raise
            client.create_bucket(Bucket=bucket)


def probe(store: Store) -> str | None:
    """Can this store hold runs? None if it can, else what it gets wrong.

    Checks create-once races of 16 writers (one may win), a ranged read, and that the bytes that come back
    are those that went.
    """
    with concurrent.futures.ThreadPoolExecutor(RACERS) as pool:
        for _ in range(RACES):
            key = f"probe/{secrets.token_hex(8)}"
            problem = _race(store, key, pool)
            store.delete(key)
            if problem:
                return problem
    return None


def _race(store: Store, key: str, pool: concurrent.futures.Executor) -> str | None:
    payload = [secrets.token_bytes(4096) for _ in range(RACERS)]
    start = threading.Barrier(RACERS)

    def race(writer: int) -> int | None:
        start.wait()
        try:
            store.create(key, payload[writer])
        except AlreadyExists:
            return None
        return writer

    winners = [w for w in pool.map(race, range(RACERS)) if w is not None]
    if len(winners) != 1:
        return f"{len(winners)} of {RACERS} create-once writers of one object were told that they had won"
    whole = store.read(key)
    if whole != payload[winners[0]]:
        return "an object did not come back as it was written"
    if store.read_range(key, 1000, 100) != whole[1000:1100]:
        return "a ranged read returned other bytes"
    return None


def _file_etag(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns:x}-{found.st_size:x}"


def _check_etag(where: str, found: str, expected: str | None) -> None:
    if expected is not None and found != expected:
        raise DataError(f"{where} changed since it was indexed; run `vitscale index` again")


def _exactly(data: bytes, length: int, where: str, start: int) -> bytes:
    if len(data) != length:
        raise _truncated(where, start, length, len(data))
    return data


def _truncated(where: str, start: int, length: int, found: int) -> DataError:
    return DataError(
        f"{where}: wanted {length} bytes from byte {start}, got {found}; the object is truncated"
    )


@contextlib.contextmanager
def _file_errors(verb: str, where: str) -> Iterator[None]:
    """The operating system's errors as ours; what is no file is no object."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise NotFound(f"no object {where}") from None
    except OSError as error:
        raise DataError(f"cannot {verb} {where}: {error.strerror}") from error


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
    if not environment.get("AWS_ACCESS_KEY_ID"):
        # An explicit profile keeps botocore from keys that this process's own environment may hold.
        session.set_config_variable("profile", environment.get("AWS_PROFILE") or None)
    # Newer botocore adds checksum trailers that Ceph 16, R2 and others refuse; our digests guard the bytes.
    config = botocore.config.Config(
        signature_version="s3v4",
        s3={"addressing_style": _addressing_style(environment)},
        retries={"mode": "standard", "total_max_attempts": READ_ATTEMPTS},
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
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        PartialCredentialsError,
        ProfileNotFound,
    )

    try:
        yield
    except ClientError as error:
        raise _refusal(where, error) from error
    except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
        raise DataError(
            f"{where}: no S3 credentials ({error}); set up an AWS profile or run `vitscale up`"
        ) from error
    except (BotoCoreError, S3UploadFailedError) as error:
        if isinstance(error.__context__, ClientError):
            # What the server answered to a multipart upload.
            raise _refusal(where, error.__context__) from error
        raise DataError(
            f"{where}: the object store cannot be reached ({error}); is it up? `vitscale up`"
        ) from error


def _refusal(where: str, error: Any) -> DataError:
    """What a botocore ClientError means."""
    code = error.response["Error"]["Code"]
    if code == "NoSuchBucket":
        return NotFound(f"no bucket for {where}")
    if code in ("404", "NoSuchKey", "NotFound"):
        return NotFound(f"no object {where}")
    if code in ("412", "PreconditionFailed", "ConditionalRequestConflict"):
        if error.operation_name == "PutObject":
            return AlreadyExists(f"{where} exists")
        return DataError(f"{where} changed since it was indexed; run `vitscale index` again")
    if code in ("416", "InvalidRange"):
        return DataError(f"{where}: it ends before the bytes that were asked for; the object is truncated")
    if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return DataError(f"{where}: the object store refused the credentials ({code}); check the AWS profile")
    return DataError(
        f"{where}: the object store answered {code} {error.response['Error'].get('Message', '')}"
    )
