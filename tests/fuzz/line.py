"""A client's line to the server's own connection class, without a socket: bytes in, statuses out."""

from __future__ import annotations

import asyncio
import random
import re
from typing import Any

from tests.fuzz.capture import IDS, read_captured
from tests.fuzz.mutate import draw
from tinsmith.api.main import Server

STATUS = re.compile(rb"(?:^|\r\n\r\n.*?)HTTP/1\.1 (\d{3}) ", re.DOTALL)
WORDS = (
    b"\r\n", b"\r\n\r\n", b"content-length: 5\r\n", b"content-length: 99999999999999\r\n", b"content-length: -1\r\n",
    b"transfer-encoding: chunked\r\n", b"0\r\n\r\n", b"ffffffff\r\n", b"expect: 100-continue\r\n", b"\x00",
    b"connection: close\r\n", b"content-encoding: zstd\r\n", b"HTTP/1.0", b"HTTP/2.0", b" ", b"range: bytes=0-\r\n",
    b"upgrade: websocket\r\n",
)  # fmt: skip
ANSWERED_S = 0.05  # what an incomplete request is waited for
END_S = 20.0


class Pipe(asyncio.Transport):
    """Takes what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self._is_closing = False

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self._is_closing

    def close(self) -> None:
        self._is_closing = True

    abort = close

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)}.get(name, default)


class Line:
    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop, key: str, session: str) -> None:
        self._server, self._loop = server, loop
        server.config.load()
        self._seeds = [request(one, key, session) for one in read_captured()]

    def send(self, number: int) -> str:
        """Send what number `number` makes of a request or two; what came of it, if that is a finding."""
        rng = random.Random(f"http:{number}")
        data = draw("http", number, self._seeds, WORDS)
        if rng.random() < 0.2:
            data += rng.choice(self._seeds)
        statuses = self._loop.run_until_complete(self._exchange(data, rng.randint(0, len(data))))
        bad = [status for status in statuses if status >= 500]
        return f"{bad} to {data!r}" if bad else ""

    async def _exchange(self, data: bytes, cut: int) -> list[int]:
        pipe, server = Pipe(), self._server
        make: Any = server.config.http_protocol_class
        connection = make(config=server.config, server_state=server.server_state, app_state={}, _loop=self._loop)
        connection.connection_made(pipe)
        for part in (data[:cut], data[cut:]):
            if part and not pipe.is_closing():
                connection.data_received(part)
        await self._until_done(ANSWERED_S)
        if not pipe.is_closing():
            connection.eof_received()
        connection.connection_lost(None)
        if not await self._until_done(END_S):
            raise TimeoutError(f"{len(server.server_state.tasks)} requests don't end with their connection")
        return [int(found) for found in STATUS.findall(bytes(pipe.written))]

    async def _until_done(self, seconds: float) -> bool:
        tasks = self._server.server_state.tasks
        if tasks:
            await asyncio.wait(list(tasks), timeout=seconds)
            await asyncio.sleep(0)
        return not tasks


def request(one: Any, key: str, session: str) -> bytes:
    path = IDS.sub(lambda found: session + found[0][25:] if found[0].startswith("s") else found[0], one.path)
    body = one.content
    headers = {"host": "x", **one.headers, "x-api-key": key, "content-length": str(len(body))}
    lines = [f"{one.method} {path}{'?' * bool(one.query)}{one.query} HTTP/1.1"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode() + body
