"""What a forward_backward body may hold, found out before anything is built from it.

Walks tags and lengths by the protobuf encoding rules (https://protobuf.dev/programming-guides/encoding) and builds
nothing: two bytes can stand for an object of a hundred, so a small body could cost gigabytes to read.
"""

from __future__ import annotations

from typing import TypeAlias

from tinsmith.errors import TooLargeError
from tinsmith.wire.media import WireError

MAX_DATUMS = 1 << 16
MAX_CHUNKS = 1 << 12  # of one datum
MAX_FIELDS = 32 * MAX_DATUMS  # of all messages together
MAX_SHAPE_BYTES = 64
MAX_ID_BYTES = 256
VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5
TOKEN_BYTES = 4
ROUTES = 1000  # field of a request, see `wire.routes`

# The messages within a message, by field number; what isn't listed is a value, and is skipped by its length.
Message: TypeAlias = "dict[int, Message]"
TEXT: Message = {}
IMAGE: Message = {4: {}}
TENSOR: Message = {2: {}}
CHUNK: Message = {1: TEXT, 2: IMAGE, 3: {}}
SPAN: Message = {1: {}, 2: {}}
DATUM: Message = {1: CHUNK, 2: {2: TENSOR}, 3: SPAN, 4: SPAN}
REQUEST: Message = {3: DATUM, 5: {}, 7: {2: {}}}


def check_bounds(body: bytes, max_tokens: int, max_pictures: int = MAX_FIELDS, max_picture_bytes: int = 2**31) -> None:
    """Pass a ForwardBackwardRequest that is cheap enough to be read.

    Raises:
        TooLargeError: too many datums, chunks, tokens, pictures, or fields in all; too large a picture.
        WireError: the bytes are no message.
    """
    num_fields = num_datums = num_chunks = num_token_bytes = num_pictures = at = 0
    message, end = REQUEST, len(body)
    outer: list[tuple[Message, int]] = []
    try:
        while at < end or outer:
            if at >= end:
                if at > end:
                    raise IndexError(at)
                message, end = outer.pop()
                continue
            tag, at = (body[at], at + 1) if body[at] < 0x80 else varint(body, at)
            num_fields += 1
            if num_fields > MAX_FIELDS:
                raise TooLargeError(f"the request holds more than {MAX_FIELDS} fields: send fewer datums at once")
            if tag & 7 != LENGTH_DELIMITED:
                at = _after_scalar(body, at, tag & 7)
                continue
            number = tag >> 3
            size, at = (body[at], at + 1) if body[at] < 0x80 else varint(body, at)
            if at + size > end:
                raise IndexError(at)
            inner = message.get(number)
            if message is REQUEST and number == ROUTES:
                raise WireError("field 1000 is the server's own: leave it out")
            if inner is None:
                at += size
                if message is TEXT and number == 1:
                    num_token_bytes += size
                elif message is IMAGE and number == 1 and size > max_picture_bytes:
                    raise TooLargeError(
                        f"a picture has {size} bytes, at most {max_picture_bytes} are taken: send a smaller one"
                    )
                elif message is TENSOR and number == 4 and size > MAX_SHAPE_BYTES:
                    raise WireError("a tensor has more dimensions than [N, K]")
                continue
            if inner is DATUM:
                num_datums, num_chunks = num_datums + 1, 0
                if num_datums > MAX_DATUMS:
                    raise TooLargeError(f"the request holds more than {MAX_DATUMS} datums: send fewer at once")
            elif inner is CHUNK:
                num_chunks += 1
                if num_chunks > MAX_CHUNKS:
                    raise TooLargeError(
                        f"datum {num_datums - 1} holds more than {MAX_CHUNKS} chunks: join its tokens into fewer"
                    )
            elif inner is IMAGE:
                num_pictures += 1
                if num_pictures > max_pictures:
                    raise TooLargeError(f"the request holds more than {max_pictures} pictures: send fewer at once")
            outer.append((message, end))
            message, end = inner, at + size
    except IndexError:
        raise WireError("the request body is no ForwardBackwardRequest message") from None
    if num_token_bytes > TOKEN_BYTES * max_tokens:
        raise TooLargeError(
            f"the request holds {num_token_bytes // TOKEN_BYTES} tokens, at most {max_tokens} are allowed: "
            "send it in several calls; gradients add up until optim_step"
        )


def read_address(data: bytes) -> tuple[str, int] | None:
    """(model_id, seq_id) of a request, wherever its fields stand; `data` may be its first bytes alone.

    The first of each counts; None if one isn't there, or stands behind more datums than a request may hold.
    """
    model_id, seq_id, at = "", 0, 0
    try:
        for _ in range(MAX_DATUMS + MAX_ID_BYTES):
            if model_id and seq_id:
                break
            tag, at = varint(data, at)
            if tag & 7 == LENGTH_DELIMITED:
                size, at = varint(data, at)
                if tag >> 3 == 1 and at + size <= len(data) and size <= MAX_ID_BYTES:
                    model_id = data[at : at + size].decode()
                at += size
            elif tag >> 3 == 2 and tag & 7 == VARINT:
                seq_id, at = varint(data, at)
            else:
                at = _after_scalar(data, at, tag & 7)
    except (IndexError, UnicodeDecodeError):
        return None
    return (model_id, seq_id) if model_id and 1 <= seq_id < 2**31 else None


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where the next field begins. Raises: IndexError: there's none."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError(at)


def _after_scalar(data: bytes, at: int, kind: int) -> int:
    if kind == VARINT:
        return at + 1 if data[at] < 0x80 else varint(data, at)[1]
    if kind in (FIXED64, FIXED32):
        return at + (8 if kind == FIXED64 else 4)
    raise IndexError(at)
