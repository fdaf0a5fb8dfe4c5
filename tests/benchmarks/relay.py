"""A relay in front of an S3 server that notes which bytes of which object every GET asks for."""

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from typing import NamedTuple

REQUEST = re.compile(rb"^GET (/[^? ]*)", re.MULTILINE)
RANGE = re.compile(rb"\r\nRange: bytes=(\d+)-(\d+)\r\n", re.IGNORECASE)


class Read(NamedTuple):
    path: str
    """/bucket/key"""
    start: int
    stop: int


class Relay:
    def __init__(self, target: tuple[str, int]) -> None:
        self.reads: list[Read] = []
        """GETs with a range, in the order in which they came."""
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                threading.Thread(target=self._requests, args=(client, server), daemon=True).start()
                threading.Thread(target=_copy, args=(server, client), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        head = b""
        for data in _received(client):
            *complete, head = (head + data).split(b"\r\n\r\n")
            for request in complete:
                path, wanted = REQUEST.search(request), RANGE.search(request + b"\r\n")
                if path and wanted:
                    self.reads.append(Read(path[1].decode(), int(wanted[1]), int(wanted[2]) + 1))
            server.sendall(data)
        _end(server)


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the reader is gone
        for data in _received(source):
            sink.sendall(data)
    _end(sink)


def _received(source: socket.socket) -> Iterator[bytes]:
    with contextlib.suppress(ConnectionError):
        while data := source.recv(1 << 18):
            yield data


def _end(sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
