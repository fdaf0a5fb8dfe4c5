"""Objects in an S3 bucket: `s3://bucket/prefix`.

Reads wait for a store that is away and resume where a broken connection left them, at the same version of
the object; no answer is believed that is not exactly what was asked for. `create` writes only what is not
there, by `If-None-Match: *`.
"""

import contextlib
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from workers import outage
from workers.errors import DataError
from workers.objects import (
    AlreadyExists,
    Changed,
    NotFound,
    ObjectInfo,
    TooLarge,
    Truncated,
    Unavailable,
    Upload,
    join_url,
)
from workers.s3_client import WRITE_ATTEMPTS, OutOfRange, S3Client
from workers.s3_upload import upload_file

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 300.0
"""How long a read waits for a store that gives nothing. An outage of a minute must not end a run."""
FIRST_CONTACT_SECONDS = 15.0
"""The same for a server that never answered this process: whoever mistypes an address is told soon."""
WRONG_ANSWERS = 3
"""Answers in a row to something else than was asked, after which the server, not chance, is to blame."""
SHORTEST_WAIT, LONGEST_WAIT = 0.1, 10.0
"""Seconds: the bound of the first random wait, which doubles, and of all."""
TELL_AFTER, TELL_EVERY = 5.0, 60.0
"""Seconds of an outage until it is logged, and between two such lines."""
READ_PIECE = 1 << 18
"""Bytes; what came of a piece is lost when the connection is reset. Each costs 20 µs of CPU."""
PROGRESS = 1 << 16
"""Bytes in an answer that broke off from which on the store counts as there."""


class WrongAnswer(Unavailable):
    """Not what was asked for. Something between here and there may be confused, so it is asked again."""


class S3Store:
    def __init__(
        self,
        bucket: str,
        prefix: str,
        client: S3Client,
        *,
        patience: float = PATIENCE_SECONDS,
        stopped: Callable[[], bool] | None = None,
    ) -> None:
        """`stopped` is asked between pieces and while waiting; once true, reads end with Unavailable."""
        self.bucket = bucket
        self.prefix = prefix
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client = client
        self._patience = patience
        self._stopped = stopped

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _relative(self, key: str) -> str:
        return key.removeprefix(f"{self.prefix}/") if self.prefix else key

    def read(self, key: str, limit: int | None = None) -> bytes:
        try:
            return self._get(key, 0, None, None, limit)
        except Truncated:
            # Of an empty object there is no byte 0 to ask for.
            if self.head(key).size == 0:
                return b""
            raise

    def read_range(self, key: str, start: int, length: int, etag: str | None = None) -> bytes:
        return self._get(key, start, length, etag) if length else b""

    def forget(self, key: str, start: int, length: int, etag: str) -> None:
        """Nothing is kept here."""

    def _get(
        self, key: str, start: int, length: int | None, etag: str | None, limit: int | None = None
    ) -> bytes:
        download = _Download(join_url(self.url, key), start, length, etag, limit)
        patience = self._patiently(download.where)
        while not download.is_complete:
            had = download.size
            try:
                self._get_more(key, download)
            except Unavailable as error:
                # Else a server that breaks off after a few bytes each time would be asked forever.
                if download.size - had >= PROGRESS:
                    patience.renew()
                patience.wait(error)
        return b"".join(download.pieces)

    def _get_more(self, key: str, download: "_Download") -> None:
        """Until the body ends or breaks off; what came stays in the download."""
        client, where = self._client, download.where
        arguments = {"Range": download.range} | ({"IfMatch": download.etag} if download.etag else {})
        try:
            response = client.read("get_object", where, Bucket=self.bucket, Key=self._key(key), **arguments)
        except OutOfRange:
            raise Truncated.at(where, download.start, download.length or 1) from None
        with contextlib.closing(response["Body"]) as body:
            download.check(response)
            with client.errors(where):
                for piece in body.iter_chunks(READ_PIECE):
                    download.add(piece)
                    if self._stopped and self._stopped():
                        raise _given_up(where)
        download.check_end()

    def head(self, key: str) -> ObjectInfo:
        response = self._ask("head_object", key, Key=self._key(key))
        if not {"ContentLength", "ETag"} <= response.keys():
            raise DataError(f"{join_url(self.url, key)}: the object store does not say its size and version")
        return ObjectInfo(key, response["ContentLength"], response["ETag"])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        more: dict[str, str] | None = {}
        while more is not None:
            page = self._ask("list_objects_v2", prefix, Prefix=self._key(prefix), **more)
            for item in page.get("Contents", []):
                # Consoles mark "folders" by empty objects whose keys end in a slash.
                if not item["Key"].endswith("/"):
                    written = item.get("LastModified")
                    modified = datetime.fromisoformat(written).timestamp() if written else 0.0
                    yield ObjectInfo(self._relative(item["Key"]), item["Size"], item["ETag"], modified)
            more = {"ContinuationToken": page["NextContinuationToken"]} if page.get("IsTruncated") else None

    def write(self, key: str, data: bytes) -> None:
        self._put(key, data)

    def upload(self, key: str, path: Path) -> None:
        upload_file(self._client, join_url(self.url, key), path, self.bucket, self._key(key))

    def uploads(self, prefix: str = "") -> Iterator[Upload]:
        more: dict[str, str] | None = {}
        while more is not None:
            page = self._ask("list_multipart_uploads", prefix, Prefix=self._key(prefix), **more)
            for item in page.get("Uploads", []):
                begun = datetime.fromisoformat(item["Initiated"]).timestamp()
                yield Upload(self._relative(item["Key"]), item["UploadId"], begun)
            markers = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
            more = {ours: page[its] for ours, its in markers.items()} if page.get("IsTruncated") else None

    def abort(self, upload: Upload) -> None:
        names = {"Bucket": self.bucket, "Key": self._key(upload.key), "UploadId": upload.id}
        with contextlib.suppress(NotFound):
            self._client.write("abort_multipart_upload", join_url(self.url, upload.key), **names)

    def modified(self, key: str) -> float:
        response = self._ask("head_object", key, Key=self._key(key))
        return parsedate_to_datetime(response["LastModified"]).timestamp()

    def create(self, key: str, data: bytes) -> None:
        # The mark tells our own object from another's when the reply to a write was lost and botocore,
        # which then writes again, is told that there is one.
        mark = {"writer": secrets.token_hex(16)}
        for _ in range(WRITE_ATTEMPTS):
            try:
                self._put(key, data, IfNoneMatch="*", Metadata=mark)
            except AlreadyExists:
                # There is none if the write was refused because of a delete at the same moment.
                with contextlib.suppress(NotFound):
                    if self._ask("head_object", key, Key=self._key(key))["Metadata"] == mark:
                        return
                    raise
            else:
                return
        raise DataError(f"{join_url(self.url, key)}: the object store refuses it and holds none")

    def delete(self, key: str) -> None:
        where = join_url(self.url, key)
        self._client.write("delete_object", where, Bucket=self.bucket, Key=self._key(key))

    def _put(self, key: str, data: bytes, **arguments: Any) -> None:
        where = join_url(self.url, key)
        names = {"Bucket": self.bucket, "Key": self._key(key)}
        self._client.write("put_object", where, Body=data, **names, **arguments)

    def _ask(self, operation: str, key: str, **arguments: Any) -> Any:
        """A request that changes nothing, until it is answered."""
        where = join_url(self.url, key)
        patience = self._patiently(where)
        while True:
            try:
                return self._client.read(operation, where, Bucket=self.bucket, **arguments)
            except Unavailable as error:
                patience.wait(error)

    def _patiently(self, where: str) -> "_Patience":
        return _Patience(where, self._client, self._patience, self._stopped)


class _Download:
    """A range of one version of an object, `length` bytes or up to its end, as far as it came."""

    def __init__(
        self, where: str, start: int, length: int | None, etag: str | None, limit: int | None
    ) -> None:
        self.where = where
        self.limit = limit
        self.start = start
        self.length = length
        self.etag = etag
        self.pieces: list[bytes] = []
        self.size = 0
        """Bytes of all pieces."""
        self._checked = 0
        """Pieces that came before this answer."""

    def add(self, piece: bytes) -> None:
        self.pieces.append(piece)
        self.size += len(piece)

    @property
    def is_complete(self) -> bool:
        return self.size == self.length

    @property
    def range(self) -> str:
        """Of what is missing."""
        end = "" if self.length is None else self.start + self.length - 1
        return f"bytes={self.start + self.size}-{end}"

    def check(self, response: Any) -> None:
        """That an answer is the missing bytes of this version; its body may be read then."""
        etag, content_length = response.get("ETag"), response.get("ContentLength")
        if not etag:
            raise WrongAnswer(f"{self.where}: the object store does not say which version (ETag) it sends")
        if self.etag is not None and _bare(etag) != _bare(self.etag):
            raise Changed.at(self.where)
        at = self.start + self.size
        first, last, size = _sent_range(response) or (None, None, None)
        is_part = response["ResponseMetadata"]["HTTPStatusCode"] == 206
        if is_part and size is not None and self.length is not None and size < self.start + self.length:
            raise Truncated.at(self.where, self.start, self.length, size)
        length = size if self.length is None else self.length
        missing = 0 if length is None else self.start + length - at
        if first != at or last != at + missing - 1 or content_length not in (missing, None):
            raise WrongAnswer(f"{self.where}: the object store sends another range than it was asked for")
        if self.limit is not None and length is not None and length > self.limit:
            raise TooLarge.at(self.where, length, self.limit)
        self.length = length
        # Only now: what an answer that is refused says of the version counts for nothing.
        self.etag = self.etag or etag
        self._checked = len(self.pieces)

    def check_end(self) -> None:
        """After a body that ended as if it were complete."""
        assert self.length is not None
        if self.size > self.length:
            del self.pieces[self._checked :]
            self.size = sum(map(len, self.pieces))
            raise WrongAnswer(f"{self.where}: the object store sends more bytes than it was asked for")
        if self.size < self.length:
            raise Unavailable(f"{self.where}: the object store sends fewer bytes than it said")


class _Patience:
    """Of one call: how often nothing came, and since when."""

    def __init__(
        self, where: str, client: S3Client, seconds: float, stopped: Callable[[], bool] | None
    ) -> None:
        self._where = where
        self._client = client
        self._seconds = seconds
        self._stopped = stopped or (lambda: False)
        self.renew()

    def renew(self) -> None:
        self._since = time.monotonic()
        self._failures = self._wrong_answers = 0

    def wait(self, error: Unavailable) -> None:
        """Some time, at random, so that many readers do not come back at once; raises if it is enough."""
        self._wrong_answers = self._wrong_answers + 1 if isinstance(error, WrongAnswer) else 0
        if self._wrong_answers == WRONG_ANSWERS:
            raise DataError(str(error)) from error
        waited = time.monotonic() - self._since
        limit = self._seconds if self._client.has_answered else min(self._seconds, FIRST_CONTACT_SECONDS)
        if self._stopped():
            raise _given_up(self._where) from error
        if waited > limit:
            raise Unavailable(f"{error} (tried for {waited:.0f} s)") from error
        self._tell(error, waited)
        outage.note()
        bound = min(SHORTEST_WAIT * 2**self._failures, LONGEST_WAIT)
        self._failures += 1
        self._sleep(secrets.SystemRandom().uniform(0, bound))

    def _sleep(self, seconds: float) -> None:
        while seconds > 0 and not self._stopped():
            time.sleep(min(seconds, 0.25))
            seconds -= 0.25

    def _tell(self, error: Unavailable, waited: float) -> None:
        now = time.monotonic()
        if waited > TELL_AFTER and now - self._client.warned > TELL_EVERY:
            self._client.warned = now
            logger.warning("%s; trying again for up to %.0f s", error, self._seconds)


def _given_up(where: str) -> Unavailable:
    return Unavailable(f"{where}: the read was given up, for nobody waits for it any more")


def _bare(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _sent_range(response: Any) -> tuple[int, int, int] | None:
    """First and last byte of an answer, and the object's size, by its headers; None if they do not say."""
    if response["ResponseMetadata"]["HTTPStatusCode"] == 200:
        # Servers may take `bytes=0-` for no range.
        size = response.get("ContentLength")
        return None if size is None else (0, size - 1, size)
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.get("ContentRange") or "")
    return (int(match[1]), int(match[2]), int(match[3])) if match else None
