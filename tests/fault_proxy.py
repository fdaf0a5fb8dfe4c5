"""An HTTP proxy in front of a real S3 server that does what networks and servers do at times.

    with FaultProxy("http://127.0.0.1:9000") as proxy:
        proxy.faults += [Cut(1000), Answer(503), LoseReply()]     # one per request, in order
        proxy.chances = Chances(busy=20, reset=5, seed=1)         # percent of the reads, at random places
        with proxy.outage():
            ...

Requests reach the server as they are, so signatures hold; those without a fault pass.
"""

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self
from urllib.parse import urlsplit

SLOW_DOWN = (
    b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your rate.</Message></Error>'
)


@dataclass(frozen=True)
class Cut:
    """The reply's headers and so many bytes of its body, then the end of the connection."""

    after: int
    reset: bool = False
    """By RST, which takes what is under way with it, instead of FIN."""


@dataclass(frozen=True)
class Stall:
    """So many bytes of the reply's body, then nothing, on a connection that stays open."""

    after: int


@dataclass(frozen=True)
class Flip:
    """A bit of the reply's body is another."""

    bits: tuple[int, ...]


@dataclass(frozen=True)
class Length:
    """The reply says that its body has so many bytes more, or fewer, than it has."""

    more: int


@dataclass(frozen=True)
class Headers:
    """The reply has these headers instead of its own; None: lacks it."""

    headers: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class Answer:
    """What some other server between here and there says."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class LoseReply:
    """The server does what it is asked, and nobody hears of it."""


@dataclass(frozen=True)
class Meanwhile:
    """Something else happens just before the server gets the request."""

    action: Callable[[], object]


Fault = Cut | Stall | Flip | Length | Headers | Answer | LoseReply | Meanwhile


@dataclass(frozen=True)
class Chances:
    """Percent of the requests, exact in each 100, in an order that `seed` shuffles."""

    seed: int
    busy: int = 0
    """503 SlowDown."""
    reset: int = 0
    """RST within the body."""
    close: int = 0
    """The body ends too early."""
    stall: int = 0
    """The body stops, the connection stays open."""
    flip: int = 0
    """One to eight bits of the body are others."""
    short: int = 0
    """Content-Length is too small."""
    long: int = 0
    """Content-Length is too large."""
    lose: int = 0
    """The server does what it is asked, and nobody hears of it."""
    methods: tuple[str, ...] = ("GET",)
    """Of these requests."""
    latency: float = 0
    """Seconds before each request."""

    def deck(self) -> list[str]:
        kinds = ("busy", "reset", "close", "stall", "flip", "short", "long", "lose")
        cards = [kind for kind in kinds for _ in range(getattr(self, kind))]
        return cards + [""] * (100 - len(cards))


class FaultProxy:
    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname or "", parts.port or 80)
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str | None]] = []
        """Method and range of each request, in order."""
        self.given: Counter[str] = Counter()
        """Faults given at random, by kind; `bits` counts those flipped."""
        self.lose_replies_to = ""
        """Part of the path of requests whose replies all get lost."""
        self.moved = 0
        """Bytes of all requests and replies, with their headers."""
        self.ended = threading.Event()
        self._chances: Chances | None = None
        self._cards: list[str] = []
        self._random = random.Random(0)
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._server = self._listen(0)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def chances(self) -> Chances | None:
        return self._chances

    @chances.setter
    def chances(self, chances: Chances | None) -> None:
        self._chances = chances
        self._cards = []
        self._random = random.Random(chances.seed if chances else 0)

    def __enter__(self) -> Self:
        self._serve()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._end()

    @contextlib.contextmanager
    def outage(self) -> Iterator[None]:
        """All connections are reset, new ones refused."""
        port = self._server.server_port
        self._end()
        try:
            yield
        finally:
            self._server = self._listen(port)
            self._serve()

    def _listen(self, port: int) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        server.proxy = self
        return server

    def _serve(self) -> None:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def _end(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        with self._lock:
            for connection in self._connections:
                # Wakes the thread that reads from it, which then closes it.
                with contextlib.suppress(OSError):
                    reset(connection)
                    connection.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def connected(self, connection: socket.socket) -> Iterator[None]:
        with self._lock:
            self._connections.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._connections.remove(connection)

    def draw(self, method: str) -> str:
        """The kind of fault that a request gets, or none."""
        if self._chances is None or method not in self._chances.methods:
            return ""
        with self._lock:
            if not self._cards:
                self._cards = self._chances.deck()
                self._random.shuffle(self._cards)
            kind = self._cards.pop()
            self.given[kind] += bool(kind)
        return kind

    def make(self, kind: str, size: int) -> Fault | None:
        """A fault within a body of `size` bytes."""
        with self._lock:
            after, bits = self._random.randrange(size), self._random.randint(1, 8)
            if kind == "flip":
                self.given["bits"] += bits
                return Flip(tuple(self._random.sample(range(8 * size), bits)))
        match kind:
            case "reset" | "close":
                return Cut(after, reset=kind == "reset")
            case "stall":
                return Stall(after)
            case "short" | "long":
                return Length(size - after if kind == "long" else after - size)
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 5
    disable_nagle_algorithm = True

    def handle(self) -> None:
        # Clients end connections as they like.
        with contextlib.suppress(ConnectionError, TimeoutError), self.server.proxy.connected(self.connection):
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().finish()

    def _handle(self) -> None:
        proxy = self.server.proxy
        proxy.requests.append((self.command, self.headers["Range"]))
        fault = proxy.faults.pop(0) if proxy.faults else None
        kind = "" if fault else proxy.draw(self.command)
        if kind == "busy":
            fault = Answer(503, SLOW_DOWN)
        if proxy.lose_replies_to and proxy.lose_replies_to in self.path:
            kind = "lose"
            proxy.given[kind] += 1
        if kind == "lose":
            fault = LoseReply()
        if proxy.chances and proxy.chances.latency:
            time.sleep(proxy.chances.latency)
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if isinstance(fault, Answer):
            self._reply(fault.status, list(fault.headers), fault.body)
            return
        if isinstance(fault, Meanwhile):
            fault.action()
        status, headers, data = self._ask(body)
        told = [*self.headers.items(), *headers]
        proxy.moved += len(body) + len(data) + sum(len(name) + len(value) + 4 for name, value in told)
        if kind and data and fault is None:
            fault = proxy.make(kind, len(data))
        self._answer(fault, status, headers, data)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _handle

    def _answer(self, fault: Fault | None, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.close_connection = isinstance(fault, LoseReply | Cut | Stall | Length)
        match fault:
            case LoseReply():
                return
            case Cut(after) | Stall(after):
                self._reply(status, headers, data[:after])
            case Length(more):
                self._reply(status, replaced(headers, "content-length", str(len(data) + more)), data)
            case Headers(others):
                for name, value in others:
                    headers = replaced(headers, name, value)
                self._reply(status, headers, data)
            case Flip(bits):
                flipped = bytearray(data)
                for bit in bits:
                    flipped[bit // 8] ^= 1 << bit % 8
                self._reply(status, headers, flipped)
            case _:
                self._reply(status, headers, data)
        if isinstance(fault, Cut) and fault.reset:
            reset(self.connection)
        if isinstance(fault, Stall):
            # Until the client has enough of it.
            self.connection.settimeout(0.05)
            while not self.server.proxy.ended.is_set():
                with contextlib.suppress(TimeoutError):
                    if not self.connection.recv(1):
                        return

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
        # After the reply to HEAD, a body would be read as the next reply.
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def reset(connection: socket.socket) -> None:
    """Once it is closed, by RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def replaced(headers: list[tuple[str, str]], name: str, value: str | None) -> list[tuple[str, str]]:
    others = [(known, old) for known, old in headers if known.lower() != name.lower()]
    return others if value is None else [*others, (name, value)]
