"""A server that answers passes, steps and polls from memory, and hands every other call on to a real one.

It checks nothing, keeps nothing and computes nothing: what a client needs with it is what the client itself costs. With
a file it writes to that before it acknowledges a pass or a step, and waits for the disk: what durability alone costs.

    python benchmarks/memory_server.py URL RESULTS RUN [--sync FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import urllib.error
import urllib.request
from itertools import count
from pathlib import Path

POLL = b"/api/v1/retrieve_future"
POSTS = {b"/api/v1/forward_backward": b"p", b"/api/v1/optim_step": b"o"}
PASSED_ON = ("x-api-key", "content-type", "content-encoding")
SYNC_BYTES = 32 << 10  # what our server's database writes for a request
FILE_BYTES = 128 * SYNC_BYTES  # written over and over, as its log is


class SyncedFile:
    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.pwrite(self._fd, bytes(FILE_BYTES), 0)
        os.fsync(self._fd)
        self._at = 0

    def append(self) -> None:
        """It is on disk when this returns."""
        os.pwrite(self._fd, bytes(SYNC_BYTES), self._at)
        os.fdatasync(self._fd)
        self._at = (self._at + SYNC_BYTES) % FILE_BYTES


class Memory:
    """results: by the letter that a request's id begins with, the media type and bytes of every result.

    The letters are no hexadecimal digits, with which the real server's ids begin.
    """

    def __init__(self, url: str, results: dict[bytes, tuple[str, bytes]], run: str, log: SyncedFile | None) -> None:
        self._url, self._results, self._run, self._log = url, results, run, log
        self._numbers = count()

    def answer(self, path: bytes, body: bytes) -> tuple[str, bytes] | None:
        letter = POSTS.get(path)
        if letter is not None:
            if self._log is not None:
                self._log.append()
            request_id = f"req-{letter.decode()}{next(self._numbers):031x}"
            return "application/json", f'{{"request_id":"{request_id}","model_id":"{self._run}"}}'.encode()
        if path == POLL:
            return self._results.get(body[body.find(b"req-") + 4 :][:1])
        return None

    def hand_on(self, method: str, path: bytes, headers: dict[str, str], body: bytes) -> tuple[int, str, bytes]:
        passed = {name: headers[name] for name in PASSED_ON if name in headers}
        request = urllib.request.Request(self._url + path.decode(), body or None, passed, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers["content-type"], answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers["content-type"], error.read()


class Connection(asyncio.Protocol):
    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, rest = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", "0"))
        if len(rest) < length:
            return
        self._received = rest[length:]
        method, path, _ = first.split(" ")
        answer = self._memory.answer(path.encode(), rest[:length])
        if answer is not None:
            self._write(200, *answer)
            return
        loop = asyncio.get_running_loop()
        handed = loop.run_in_executor(None, self._memory.hand_on, method, path.encode(), headers, rest[:length])
        handed.add_done_callback(lambda done: self._write(*done.result()))

    def _write(self, status: int, media: str, body: bytes) -> None:
        head = f"HTTP/1.1 {status} OK\r\ncontent-type: {media}\r\ncontent-length: {len(body)}\r\n\r\n"
        self._transport.write(head.encode() + body)


async def serve(memory: Memory) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Connection(memory), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("results", help="JSON: by letter, [media type, result in hexadecimal digits]")
    parser.add_argument("run")
    parser.add_argument("--sync", type=Path, default=None, help="file that is written before a POST is answered")
    args = parser.parse_args()
    log = None if args.sync is None else SyncedFile(args.sync)
    results = {k.encode(): (media, bytes.fromhex(body)) for k, (media, body) in json.loads(args.results).items()}
    asyncio.run(serve(Memory(args.url, results, args.run, log)))


if __name__ == "__main__":
    main()
