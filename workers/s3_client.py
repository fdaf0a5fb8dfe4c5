"""The only file that knows boto3: clients, one request at a time, and what its errors mean.

boto3 is imported on first use: a machine with local files alone need not have it.
"""

import configparser
import contextlib
import functools
import os
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workers.errors import DataError
from workers.objects import AlreadyExists, Changed, NotFound, Unavailable

READ_TIMEOUT = 20.0
"""Seconds without a byte, after which a connection is given up."""
WRITE_ATTEMPTS = 5
BUSY = ("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded")


class OutOfRange(DataError):
    """416: the object ends before the first byte that was asked for."""


class S3Client:
    """boto3's clients of one S3 server; threads share them."""

    def __init__(self, environment: Mapping[str, str], read_timeout: float = READ_TIMEOUT) -> None:
        self._environment = dict(environment)
        self._read_timeout = read_timeout
        self._lock = threading.Lock()
        self._clients: dict[bool, Any] = {}
        self.has_answered = False
        """Whether the server ever did. One that never did may have another address."""
        self.warned = float("-inf")
        """When somebody was last told that the server is away, time.monotonic()."""

    def read(self, operation: str, where: str, **arguments: Any) -> Any:
        """One request and no more: S3Store asks again itself, and attempts must not multiply."""
        with self.errors(where):
            answer = getattr(self._boto(retries=False), operation)(**arguments)
        self.has_answered = True
        return answer

    def write(self, operation: str, where: str, **arguments: Any) -> Any:
        """With botocore's own attempts, some 10 s of them."""
        with self.errors(where):
            return getattr(self._boto(retries=True), operation)(**arguments)

    def _boto(self, *, retries: bool) -> Any:
        with self._lock:
            if retries not in self._clients:
                self._clients[retries] = _boto_client(self._environment, retries, self._read_timeout)
            return self._clients[retries]

    @contextlib.contextmanager
    def errors(self, where: str) -> Iterator[None]:
        """Exceptions of boto3 and what is below it as ours, naming the object and what to do."""
        from botocore import exceptions as boto
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        passing = (
            *(boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError, ResponseParserError),
            *(boto.CredentialRetrievalError, HTTPError, ConnectionError, TimeoutError),
        )

        try:
            yield
        except boto.ClientError as error:
            self.has_answered = True
            raise _refusal(where, error) from error
        except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound) as error:
            raise DataError(
                f"{where}: no S3 credentials ({error}); set up an AWS profile or run `vitscale up`"
            ) from error
        except passing as error:
            raise _no_answer(where, error) from error
        except boto.BotoCoreError as error:
            raise DataError(f"{where}: the request cannot be made: {error}") from error


@functools.cache
def s3_client(read_timeout: float = READ_TIMEOUT) -> S3Client:
    """This process's own."""
    return S3Client(os.environ, read_timeout)


def ensure_bucket(url: str, *, environment: Mapping[str, str] | None = None) -> None:
    """Create the bucket of an `s3://` URL if it is not there."""
    bucket = urllib.parse.urlsplit(url).netloc
    client = s3_client() if environment is None else S3Client(environment)
    try:
        client.write("head_bucket", url, Bucket=bucket)
    except NotFound:
        client.write("create_bucket", url, Bucket=bucket)


def _boto_client(environment: Mapping[str, str], retries: bool, read_timeout: float) -> Any:
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
    # Its mode "standard" silently ends all retries of a client after 100 that came to nothing (measured).
    config = botocore.config.Config(
        signature_version="s3v4",
        s3={"addressing_style": _addressing_style(environment)},
        retries={"mode": "legacy", "total_max_attempts": WRITE_ATTEMPTS if retries else 1},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=64,
        connect_timeout=10,
        read_timeout=60 if retries else read_timeout,
    )
    # Nobody reads when an object was last modified; making a date of it takes 50 µs of each answer.
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
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


def _no_answer(where: str, error: Exception) -> Unavailable:
    return Unavailable(f"{where}: the object store cannot be reached ({error}); is it up? `vitscale up`")


def _refusal(where: str, error: Any) -> DataError:
    """What a botocore ClientError means."""
    code = error.response["Error"]["Code"]
    status = error.response["ResponseMetadata"].get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return NotFound(f"no bucket for {where}")
    if code in ("404", "NoSuchKey", "NotFound", "NoSuchUpload"):
        return NotFound(f"no object {where}")
    if code in ("412", "PreconditionFailed", "ConditionalRequestConflict"):
        return AlreadyExists(f"{where} exists") if error.operation_name == "PutObject" else Changed.at(where)
    if code in ("416", "InvalidRange"):
        return OutOfRange(f"{where}: it ends before the bytes that were asked for; the object is truncated")
    if code in ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        return DataError(f"{where}: the object store refused the credentials ({code}); check the AWS profile")
    is_busy = code in BUSY or status in (408, 429) or (status >= 500 and status != 501)
    message = f"{where}: the object store answered {code} {error.response['Error'].get('Message', '')}"
    return Unavailable(message) if is_busy else DataError(message)
