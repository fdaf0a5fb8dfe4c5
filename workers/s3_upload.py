"""Files to S3: small ones by one request, large ones in parts, a few at a time, none of which is left."""

import contextlib
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from workers.errors import DataError
from workers.objects import Unavailable
from workers.s3_client import S3Client

ONE_REQUEST = 64 << 20
"""Bytes of a file up to which it goes as a whole."""
PART = 16 << 20
"""Bytes; S3 takes none below 5 MiB but the last."""
MAX_PARTS = 10_000
AT_ONCE = 4
"""Parts in memory and under way."""


def upload_file(client: S3Client, where: str, path: Path, bucket: str, key: str) -> None:
    """Replaces what was there. Unavailable if what is there afterwards has not the file's size."""
    size = path.stat().st_size
    if size <= ONE_REQUEST:
        with path.open("rb") as file:
            client.write("put_object", where, Bucket=bucket, Key=key, Body=file)
        found = client.write("head_object", where, Bucket=bucket, Key=key)
    else:
        found = _Multipart(client, where, path, bucket, key).upload(size)
    if found["ContentLength"] != size:
        raise Unavailable(
            f"{where}: {size} bytes were written, the object store has {found['ContentLength']}"
        )


class _Multipart:
    def __init__(self, client: S3Client, where: str, path: Path, bucket: str, key: str) -> None:
        self._client = client
        self._where = where
        self._path = path
        self._names: dict[str, Any] = {"Bucket": bucket, "Key": key}
        self._mark = {"writer": secrets.token_hex(16)}

    def upload(self, size: int) -> Any:
        """What the store says of the object. After an error the parts that it has are removed."""
        upload = self._ask("create_multipart_upload", Metadata=self._mark)["UploadId"]
        part = max(PART, -(-size // MAX_PARTS))
        try:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                starts = range(0, size, part)
                sent = list(pool.map(lambda start: self._send(upload, start, part), starts))
            return self._complete(upload, sent)
        except BaseException:
            with contextlib.suppress(DataError):
                self._ask("abort_multipart_upload", UploadId=upload)
            raise

    def _send(self, upload: str, start: int, length: int) -> dict[str, Any]:
        with self._path.open("rb") as file:
            file.seek(start)
            data = file.read(length)
        number = start // length + 1
        etag = self._ask("upload_part", UploadId=upload, PartNumber=number, Body=data)["ETag"]
        return {"PartNumber": number, "ETag": etag}

    def _complete(self, upload: str, sent: list[dict[str, Any]]) -> Any:
        try:
            self._ask("complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": sent})
        except DataError:
            # Done all the same if only the reply was lost; asked again, the store knows of no such upload.
            with contextlib.suppress(DataError):
                found = self._ask("head_object")
                if found["Metadata"] == self._mark:
                    return found
            raise
        return self._ask("head_object")

    def _ask(self, operation: str, **arguments: Any) -> Any:
        return self._client.write(operation, self._where, **self._names, **arguments)
