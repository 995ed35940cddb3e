"""A client of the socket itself, for requests that come in piece by piece."""

from __future__ import annotations

import json
import select
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

READ_S = 6.0


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: Any


class Stream:
    """A connection that has sent nothing."""

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        self._sock = socket.create_connection((str(place.hostname), place.port or 80), timeout=20)
        self._come = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._sock.close()

    def send(self, data: bytes) -> None:
        self._sock.settimeout(20)
        self._sock.sendall(data)

    def end(self) -> None:
        """Say that nothing more is sent; answers can still be read."""
        self._sock.shutdown(socket.SHUT_WR)

    def bytes(self) -> bytes:
        """All that has come so far, of an answer that is read in no other way."""
        while self.has_answer() and (more := self._sock.recv(65536)):
            self._come += more
        return self._come

    def has_answer(self) -> bool:
        return bool(select.select([self._sock], [], [], 0)[0])

    def answer(self, within_s: float) -> Answer | None:
        """The next answer, or None if none comes in time. Raises: EOFError: the connection was closed without one."""
        head = self._until(b"\r\n\r\n", within_s)
        if head is None:
            return None
        lines = head.decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        body = b""
        while len(body) < int(headers["content-length"]):
            more = self._sock.recv(65536)
            if not more:
                raise EOFError(body)
            body += more
        return Answer(int(lines[0].split()[1]), headers, json.loads(body) if body else None)

    def is_closed(self, within_s: float) -> bool:
        """Whether the server ends the connection in time, with nothing more to say."""
        self._sock.settimeout(within_s)
        try:
            return self._sock.recv(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False

    def _until(self, end: bytes, within_s: float) -> bytes | None:
        deadline = time.monotonic() + within_s
        data = b""
        while not data.endswith(end):
            self._sock.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                piece = self._sock.recv(1)
            except TimeoutError:
                return None
            if not piece:
                raise EOFError(data)
            data += piece
        return data


class Upload(Stream):
    """A connection that has stated a body of `num_bytes` and sent none of it."""

    def __init__(self, url: str, key: str, path: str, num_bytes: int) -> None:
        super().__init__(url)
        headers = f"Host: x\r\nX-API-Key: {key}\r\nContent-Length: {num_bytes}\r\n\r\n"
        self.send(f"POST /api/v1{path} HTTP/1.1\r\n{headers}".encode())


class Reader(Stream):
    """Takes little at a time."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)

    def send_while_taken(self, data: bytes) -> None:
        """As much of it as the server reads within a second."""
        self._sock.settimeout(1.0)
        with suppress(OSError):
            self._sock.sendall(data)

    def some(self, num_bytes: int) -> int:
        """How many bytes came of so many."""
        self._sock.settimeout(READ_S)
        return len(self._sock.recv(num_bytes))

    def rest(self) -> int:
        """How many bytes come until the connection is closed, or none does for a while."""
        size = 0
        with suppress(OSError):
            while more := self.some(1 << 20):
                size += more
        return size
