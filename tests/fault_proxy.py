"""An HTTP proxy in front of a real S3 server that does, once each, what networks and servers do at times.

    with FaultProxy("http://127.0.0.1:9000") as proxy:
        proxy.faults += [Cut(1000), Answer(503), LoseReply()]     # one per request, in order

Requests reach the server as they are, so signatures hold; those without a fault pass.
"""

import contextlib
import http.client
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Cut:
    """The reply's headers and so many bytes of its body, then the end of the connection."""

    after: int
    reset: bool = False
    """By RST, which takes what is under way with it, instead of FIN."""


@dataclass(frozen=True)
class Answer:
    """What some other server between here and there says."""

    status: int
    body: bytes = b""


@dataclass(frozen=True)
class LoseReply:
    """The server does what it is asked, and nobody hears of it."""


@dataclass(frozen=True)
class Meanwhile:
    """Something else happens just before the server gets the request."""

    action: Callable[[], object]


Fault = Cut | Answer | LoseReply | Meanwhile


class FaultProxy:
    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname or "", parts.port or 80)
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str | None]] = []
        """Method and range of each request, in order."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 5

    def handle(self) -> None:
        # Clients end connections as they like.
        with contextlib.suppress(ConnectionError):
            super().handle()

    def _handle(self) -> None:
        proxy = self.server.proxy
        proxy.requests.append((self.command, self.headers["Range"]))
        fault = proxy.faults.pop(0) if proxy.faults else None
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if isinstance(fault, Answer):
            self._reply(fault.status, [], fault.body)
            return
        if isinstance(fault, Meanwhile):
            fault.action()
        status, headers, data = self._ask(body)
        if isinstance(fault, LoseReply):
            self.close_connection = True
        elif isinstance(fault, Cut):
            self._reply(status, headers, data[: fault.after])
            self.close_connection = True
            if fault.reset:
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        else:
            self._reply(status, headers, data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.server.proxy.upstream, timeout=20)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        data = response.read()
        connection.close()
        return response.status, response.getheaders(), data

    def _reply(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        """The server's own Content-Length stays, however much of the body follows."""
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        if "content-length" not in {name.lower() for name, _ in headers}:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass
