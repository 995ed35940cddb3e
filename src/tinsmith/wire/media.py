"""Media types, JSON bytes, and the error of bytes that can't be read.

Owns how JSON becomes a typed request. Unknown fields are ignored on purpose: newer clients send more of them.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

import msgspec

from tinsmith.errors import UserError

PROTOBUF = "application/x-protobuf"
JSON = "application/json"
MAX_SLOW_BYTES = 256 << 10  # Python's own decoder takes a second for 10 MB, in which nothing else runs
TOO_DEEP = "the request body is nested too deeply: send a JSON object as the API page describes it"

T = TypeVar("T")


class WireError(UserError):
    """Bytes that are no request. `address` is (run, seq_id) if at least that much could be read."""

    def __init__(self, message: str, address: tuple[str, int] | None = None) -> None:
        super().__init__(message)
        self.address = address


def encode_json(value: Any) -> bytes:
    """JSON bytes of structs, dataclasses, dicts, lists and scalars."""
    return msgspec.json.encode(value)


def decode_json(body: bytes, kind: type[T]) -> T:
    """The body as a `kind`. NaN and Infinity, which JSON lacks and Python writes, are read as numbers in small bodies.

    Raises:
        WireError: not JSON, or JSON of another shape; the message says where.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise WireError(f"the request body does not fit: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        if len(body) > MAX_SLOW_BYTES:
            raise WireError("the request body is not JSON: send a JSON object; in a large one, no NaN") from None
        return _decode_python_json(body, kind)
    except RecursionError:
        raise WireError(TOO_DEEP) from None


def _decode_python_json(body: bytes, kind: type[T]) -> T:
    try:
        value = json.loads(body)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate raises here, not in the store
        return msgspec.convert(value, type=kind)
    except msgspec.ValidationError as error:
        raise WireError(f"the request body does not fit: {error}") from None
    except ValueError:
        raise WireError("the request body is not JSON: send a JSON object") from None
    except RecursionError:
        raise WireError(TOO_DEEP) from None
