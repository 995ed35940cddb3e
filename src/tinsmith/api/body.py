"""Request bodies under a bound, decompressed under the same bound before the memory is spent."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import zstandard
from litestar import Request
from litestar.datastructures import State

from tinsmith.api.auth import Call
from tinsmith.api.intake import hold_of
from tinsmith.api.services import Services
from tinsmith.errors import TooLargeError, UserError
from tinsmith.store.rows import Principal
from tinsmith.wire.media import decode_json

PLAIN_BYTES = 1 << 20  # a request without tokens in it: a name, an address, metadata of 8 KiB
TOKENS_BYTES = 8 << 20  # a JSON request with a prompt: a million token ids
PICTURES_BYTES = 64 << 20  # the same with pictures
PIECE_BYTES = 1 << 20
PREFIX_BYTES = 1 << 16
HEAD_BYTES = 1 << 18  # of a body that says itself that it is too large: enough of a zstd frame for the prefix
MAX_WINDOW_BYTES = 1 << 27
MAX_FRAMES = 64


class BodyTooLarge(TooLargeError):
    """`prefix`: the first bytes of the decompressed body, enough to find out who it was meant for."""

    def __init__(self, max_bytes: int, prefix: bytes) -> None:
        super().__init__(f"the request body is larger than {max_bytes} bytes: send fewer datums or tokens a request")
        self.prefix = prefix


class JsonRequest(Request[Principal, str, State]):
    """A request whose JSON is read with our decoder; the framework's lets some errors of bad bytes through."""

    async def json(self) -> Any:
        """Raises: WireError: not JSON."""
        return decode_json(await self.body(), object)


async def read_body(request: Call, services: Services, at_most: int = PLAIN_BYTES) -> bytes:
    """The body, decompressed if it came as zstd.

    Args:
        at_most: bytes that the route takes; never more than `max_body_bytes`.

    Raises:
        BodyTooLarge: beyond that, as sent or decompressed.
        CapacityError: the server holds too many bodies now.
        UserError: another encoding, or bytes that aren't zstd.
    """
    max_bytes = min(at_most, services.settings.max_body_bytes)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "zstd"):
        raise UserError(f"content-encoding {encoding[:50]!r} is not understood: send zstd, or no encoding")
    is_too_large = (request.content_length or 0) > max_bytes
    most = min(HEAD_BYTES, max_bytes) if is_too_large else max_bytes
    sent = io.BytesIO()
    async for piece in request.stream():
        sent.write(piece)
        if sent.tell() > most:
            break
    body = sent.getvalue()
    sent.close()
    if is_too_large or len(body) > max_bytes:
        raise BodyTooLarge(max_bytes, body[:PREFIX_BYTES] if encoding == "identity" else _first_bytes(body))
    if encoding == "identity":
        return body
    hold = hold_of(request.scope)
    inflated = await services.digest(request.user, max_bytes, inflate, body, max_bytes, hold.take)
    hold.give_back(len(body))
    return inflated


async def read_prompt_body(request: Call, services: Services, at_most: int) -> bytes:
    """The body of a JSON request with a prompt: up to `at_most` bytes, and where a base takes pictures, up to
    PICTURES_BYTES with those. Pictures are long strings; it is what stands between strings that costs many times its
    bytes to read.

    Raises:
        BodyTooLarge, CapacityError, UserError: as `read_body`.
        TooLargeError: as much is between strings as more than `at_most` bytes could hold.
    """
    body = await read_body(request, services, max(at_most, PICTURES_BYTES) if services.sees else at_most)
    if len(body) > at_most and await services.digest(request.user, len(body), num_marks, body) > at_most:
        raise TooLargeError(f"the request body holds more than {at_most} values: send fewer tokens a request")
    return body


def num_marks(body: bytes) -> int:
    """Of those that JSON puts between values, in strings or not."""
    return sum(body.count(mark) for mark in (b"[", b"{", b",", b":"))


def inflate(body: bytes, max_bytes: int, take: Callable[[int], None]) -> bytes:
    """`take` is told of the bytes that come out, before they are kept, and may refuse them.

    Raises:
        BodyTooLarge: more than `max_bytes` come out.
        UserError: it isn't zstd, or not all of it.
    """
    whole = io.BytesIO()
    try:
        with _reader(body) as reader:
            while piece := reader.read(min(PIECE_BYTES, max_bytes + 1)):
                take(len(piece))
                whole.write(piece)
                if whole.tell() > max_bytes:
                    raise BodyTooLarge(max_bytes, whole.getvalue()[:PREFIX_BYTES])
        is_whole = _is_whole(body, whole.tell())
    except zstandard.ZstdError:
        raise UserError("the request body says content-encoding zstd, but is not zstd") from None
    if not is_whole:
        raise UserError("the request body ends in the middle of a zstd frame: send it again, whole")
    return whole.getvalue()


def _is_whole(body: bytes, num_bytes: int) -> bool:
    """Whether the last frame is complete, which the reader doesn't tell; `num_bytes` came out.

    One frame that states its size, as the SDK sends it, needs no second look.
    """
    if zstandard.frame_content_size(body) == num_bytes:
        return True
    for _ in range(MAX_FRAMES):
        frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
        frame.decompress(body)
        if not frame.eof:
            return False
        body = frame.unused_data
        if not body:
            return True
    raise UserError(f"the request body holds more than {MAX_FRAMES} zstd frames: compress it as one")


def _first_bytes(body: bytes) -> bytes:
    try:
        with _reader(body) as reader:
            return reader.read(PREFIX_BYTES)
    except zstandard.ZstdError:
        return b""


def _reader(body: bytes) -> zstandard.ZstdDecompressionReader:
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    return decompressor.stream_reader(io.BytesIO(body), read_across_frames=True)
