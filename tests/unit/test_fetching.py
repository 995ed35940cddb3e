"""What is fetched comes whole, bounded, from where it was allowed, and from nowhere else."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.paint import png
from tinsmith.api.fetching import Fetcher
from tinsmith.config import Settings
from tinsmith.errors import CapacityError, TooLargeError, UserError
from tinsmith.types import TenantId

ALICE = TenantId("alice")
PICTURE = png()
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def answer(body: bytes = PICTURE, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@dataclass
class Remote:
    """An https server of one answer, on 127.0.0.1."""

    reply: bytes = answer()
    holds_s: float = 0.0
    asked: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(self.reply)
        await writer.drain()
        await asyncio.sleep(self.holds_s)
        writer.close()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def contexts(authority: trustme.CA) -> Iterator[tuple[ssl.SSLContext, ssl.SSLContext]]:
    """The server's and the client's."""
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(served)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    return served, trusting


Contexts = tuple[ssl.SSLContext, ssl.SSLContext]


def fetch(
    remote: Remote, contexts: Contexts, *paths: str, host: str = "127.0.0.1", take: Any = None, **settings: Any
) -> dict[str, bytes]:
    """From the remote at `host`, whose address the setting names."""

    async def run() -> dict[str, bytes]:
        server = await asyncio.start_server(remote.serve, "127.0.0.1", 0, ssl=contexts[0])
        port = server.sockets[0].getsockname()[1]
        base = f"https://{host}:{port}/"
        named = Settings.load({}, picture_locations=(base,), **settings)
        try:
            fetcher = Fetcher(named, contexts[1])
            found = await fetcher.fetch(ALICE, [base + path for path in paths or ("a.png",)], take or (lambda n: None))
            return {location.removeprefix(base): data for location, data in found.items()}
        finally:
            server.close()

    return asyncio.run(run())


def test_pictures_are_fetched_as_they_are(contexts: Contexts) -> None:
    remote = Remote()
    assert fetch(remote, contexts, "a.png", "b/c.png?x=1") == {"a.png": PICTURE, "b/c.png?x=1": PICTURE}
    assert sorted(request.split(b" ")[1] for request in remote.asked) == [b"/a.png", b"/b/c.png?x=1"]
    assert b"tml-" not in b"".join(remote.asked)


def test_chunked_bodies_are_read(contexts: Contexts) -> None:
    reply = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n1\r\ne\r\n0\r\n\r\n"
    assert fetch(Remote(reply), contexts) == {"a.png": b"abcde"}


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (answer(b"", "302 Found", "Location: https://127.0.0.1/b.png"), "redirects elsewhere"),
        (answer(b"", "404 Not Found"), "answers 404"),
        (answer(b"", "500 Oops"), "answers 500"),
        (answer(PICTURE, "200 OK", "Content-Encoding: gzip"), "compressed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort", "can't be fetched"),
        (b"SSH-2.0-OpenSSH\r\n", "can't be fetched"),
        (b"", "can't be fetched"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000, "can't be fetched"),
    ],
)
def test_what_is_no_answer_is_refused(contexts: Contexts, reply: bytes, words: str) -> None:
    with pytest.raises(UserError, match=words):
        fetch(Remote(reply), contexts)


def test_more_bytes_than_allowed_are_refused_by_header_and_by_count(contexts: Contexts) -> None:
    with pytest.raises(TooLargeError, match="more than 50 bytes"):
        fetch(Remote(answer(bytes(51))), contexts, max_picture_bytes=50)
    unannounced = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + bytes(51)
    with pytest.raises(TooLargeError, match="more than 50 bytes"):
        fetch(Remote(unannounced), contexts, max_picture_bytes=50)


def test_one_that_is_slow_is_given_up(contexts: Contexts) -> None:
    with pytest.raises(UserError, match=r"not fetched within 0\.2 s"):
        fetch(Remote(b"HTTP/1.1 200 OK\r\n", holds_s=5), contexts, picture_fetch_s=0.2)


def test_too_many_are_refused_before_any_is_fetched(contexts: Contexts) -> None:
    remote = Remote()
    with pytest.raises(TooLargeError, match="more than 1 pictures"):
        fetch(remote, contexts, "a", "b", max_pictures=1)
    assert remote.asked == []


def test_a_name_that_leads_to_a_private_address_is_refused_before_it_is_asked(contexts: Contexts) -> None:
    remote = Remote()
    with pytest.raises(UserError, match="private address"):
        fetch(remote, contexts, host="localhost")
    assert remote.asked == []


def test_a_server_without_a_good_certificate_is_refused(contexts: Contexts) -> None:
    with pytest.raises(UserError, match="can't be fetched"):
        fetch(Remote(), (contexts[0], ssl.create_default_context()))


def test_what_is_fetched_counts_as_what_is_sent(contexts: Contexts) -> None:
    def refuse(num_bytes: int) -> None:
        raise CapacityError("full")

    with pytest.raises(CapacityError):
        fetch(Remote(), contexts, take=refuse)


def test_a_picture_counts_as_often_as_it_is_named(contexts: Contexts) -> None:
    taken: list[int] = []
    assert fetch(Remote(), contexts, *["a.png"] * 3, take=taken.append) == {"a.png": PICTURE}
    assert sum(taken) == 3 * len(PICTURE)
    remote = Remote()
    with pytest.raises(TooLargeError, match="more than 2 pictures"):
        fetch(remote, contexts, *["a.png"] * 3, max_pictures=2)
    assert remote.asked == []
    large = Remote(answer(bytes(1 << 20)))
    with pytest.raises(TooLargeError, match="bytes together"):
        fetch(large, contexts, *["a.png"] * 65, max_pictures=100)


def test_files_are_read_from_a_named_directory(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE)
    (tmp_path / "large.png").write_bytes(bytes(2000))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    fetcher = Fetcher(Settings.load({}, picture_locations=(str(tmp_path),), max_picture_bytes=1000))

    def read(name: str) -> bytes:
        (data,) = asyncio.run(fetcher.fetch(ALICE, [f"{tmp_path}/{name}"], lambda n: None)).values()
        return data

    assert read("a.png") == PICTURE
    for name, words in (("none.png", "No such file"), ("folder", "is no file"), ("pipe", "is no file")):
        with pytest.raises(UserError, match=words):
            read(name)
    with pytest.raises(TooLargeError):
        read("large.png")
