"""Tells a chat or an alarm, by HTTP, what became of jobs: done, failed for good, stopped.

The address is a secret, since whoever has it can write there: it is in a file of its own, and no message of
ours names more of it than the host. What was told is a record in the store of runs, written after the other
side has answered 2xx: at least once, and twice only if a process dies between the two, or if two supervisors
see the same end at once. Both messages have the same id then.
"""

import contextlib
import functools
import http.client
import json
import logging
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from orchestrator.exposure import is_private
from orchestrator.job import JobSpec
from orchestrator.job_records import is_told, last_noted, read_wish_id, write_told
from orchestrator.site import Site
from workers.errors import ConfigError, DataError, root_cause
from workers.storage import AlreadyExists, open_store

log = logging.getLogger(__name__)

SECONDS = 10.0
"""For an answer."""
MIN_DELAY_SECONDS, MAX_DELAY_SECONDS = 1.0, 600.0
"""Between attempts; each doubles it."""
MAX_TEXT = 300
SINCE = "jobs/webhook-since"
"""Made by the first supervisor with a webhook that looks at a store: what ended before is old news."""

End = Literal["done", "failed", "stopped"]


@dataclass(frozen=True)
class Message:
    id: str
    body: bytes
    record: Callable[[], None]
    """Notes in the store that it was told."""


class Webhook:
    """Of one address. Sends from a thread of its own: nobody waits for it, and nothing fails of it."""

    def __init__(self, address: str, ca_file: Path | None, mlflow: str) -> None:
        """`mlflow`: where a reader finds more."""
        self._address, self._mlflow = address, mlflow
        self._host = urlsplit(address).hostname or ""
        https = urllib.request.HTTPSHandler(context=_context(ca_file))
        self._opener = urllib.request.build_opener(https, _NoRedirects())
        self._since: dict[str, float] = {}
        """By the stores' URLs."""
        self._pending: dict[str, Message] = {}
        """By their ids; a thread sends as long as there are any."""
        self._sent: set[str] = set()
        """Ids of messages that need only be noted."""
        self._changed = threading.Condition()
        self._problem = ""

    def begin(self, runs: str) -> None:
        """What ends there from now on is told; DataError if the store of runs does not answer."""
        if runs not in self._since:
            store = open_store(runs)
            with contextlib.suppress(AlreadyExists):
                store.create(SINCE, b"")
            self._since[runs] = store.modified(SINCE)

    def tell(self, spec: JobSpec, job: str, end: End, reason: str) -> None:
        """Soon, unless it was told or ended before `begin`; DataError if the store does not answer.

        `job`: Ray's name, as far as it is known.
        """
        store, digest = open_store(spec.runs), spec.digest
        event = f"{digest[:16]}-{read_wish_id(store, digest)}-{end}"
        if is_told(store, digest, event) or last_noted(store, digest) < self._since[spec.runs]:
            return
        body: dict[str, Any] = {
            "text": describe(spec, end, reason),
            "event": end,
            "runs": [config.run for config in spec.configs],
            "job": job,
            "id": event,
        }
        if self._mlflow.startswith("http"):
            body["mlflow"] = self._mlflow
        record = functools.partial(write_told, store, digest, event)
        self._add(Message(event, json.dumps(body).encode(), record))

    def settle(self, seconds: float = SECONDS) -> None:
        """Wait until all is told, but no longer than that; what is not is told by the next supervisor."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._pending, seconds):
                why = self._problem or "no answer yet"
                log.warning("webhook on %s: not told (%s); `vitscale supervise` tries on", self._host, why)

    def _add(self, message: Message) -> None:
        with self._changed:
            if not self._pending:
                threading.Thread(target=self._send_all, name="webhook", daemon=True).start()
            self._pending.setdefault(message.id, message)

    def _send_all(self) -> None:
        delay = MIN_DELAY_SECONDS
        while True:
            with self._changed:
                waiting = list(self._pending.values())
            for message in waiting:
                self._note(message, self._send(message))
            with self._changed:
                if not self._pending:
                    return
                failed = not {message.id for message in waiting}.isdisjoint(self._pending)
            if failed:
                time.sleep(delay)
                delay = min(2 * delay, MAX_DELAY_SECONDS)

    def _note(self, message: Message, problem: str) -> None:
        if problem and problem != self._problem:
            log.warning("webhook on %s: %s; trying again", self._host, problem)
        with self._changed:
            self._problem = problem
            if not problem:
                del self._pending[message.id]
            self._changed.notify_all()

    def _send(self, message: Message) -> str:
        """What went wrong; empty if nothing did."""
        if message.id not in self._sent and (problem := self._post(message.body)):
            return problem
        self._sent.add(message.id)
        try:
            message.record()
        except DataError as error:
            return f"told, but that is not noted yet: {error}"
        return ""

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json", "User-Agent": "vitscale"}
        request = urllib.request.Request(self._address, body, headers)  # noqa: S310 - see read_address
        try:
            self._opener.open(request, timeout=SECONDS).close()
        except urllib.error.HTTPError as error:
            error.close()
            moved = ", to another address, which is not followed" if 300 <= error.code < 400 else ""
            return f"it answers {error.code}{moved}"
        except (OSError, ValueError, http.client.HTTPException) as error:
            # ValueError: of a host whose name cannot be one. Only what an OSError says is shown; other text
            # may repeat the address.
            cause = root_cause(error)
            return str(cause) if isinstance(cause, OSError) else type(cause).__name__
        return ""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The address is for one host alone."""

    def redirect_request(self, *arguments: Any, **more: Any) -> None:
        return None


def webhook_of(site: Site) -> Webhook | None:
    """This process's, None if the site has none; ConfigError names what is wrong with its file."""
    if site.webhook_file is None:
        return None
    return _webhook(read_address(site.webhook_file), site.ca_file, site.mlflow)


@functools.cache
def _webhook(address: str, ca_file: Path | None, mlflow: str) -> Webhook:
    return Webhook(address, ca_file, mlflow)


def read_address(file: Path) -> str:
    """The one address in a file; ConfigError, which does not show it, if it is none."""
    try:
        address = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"site field `webhook_file`: {file} cannot be read ({type(error).__name__})"
        ) from None
    if not re.fullmatch(r"https?://[\w.\[\]:-]+(/[!-~]*)?", address, re.ASCII) or not is_private(address):
        raise ConfigError(
            f"site field `webhook_file`: {file} is to hold one address, https://..., and nothing else "
            "(http only for this machine itself)"
        )
    return address


def describe(spec: JobSpec, end: End, reason: str) -> str:
    """One line for a person."""
    first, *others = (config.run for config in spec.configs)
    runs = f"{first} and {len(others)} more" if others else first
    reason = reason.strip().partition("\n")[0]
    # A stop's reason says so itself.
    became = {"done": "is done", "failed": f"failed: {reason}", "stopped": reason}[end]
    line = f"vitscale: {runs} {became}"
    # In Slack's markup `<!channel>` calls everybody, and a reason may name a file of somebody else's.
    return line[:MAX_TEXT].replace("<", "(").replace(">", ")")


def _context(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
    except ssl.SSLError:
        raise ConfigError(f"site field `ca_file`: {ca_file} holds no certificate in PEM") from None
