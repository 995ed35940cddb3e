"""Request bodies in which every field counts: one that isn't offered is refused by its name, never ignored.

A field that is null is one that is left out. A field that says what would happen anyway is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from tinsmith.api.auth import Call
from tinsmith.api.body import PICTURES_BYTES, BodyTooLarge, read_prompt_body
from tinsmith.api.services import Services
from tinsmith.errors import TooLargeError, UnsupportedError, UserError
from tinsmith.wire.media import TOO_DEEP, WireError, decode_json

MAX_BODY_BYTES = 8 * 2**20  # far beyond the text of any context; bounds what untyped JSON can take in memory
MAX_DEPTH = 64
PLACE = re.compile(r" - at `\$\.?(.*?)`$")

T = TypeVar("T", bound=Struct)


class FieldError(UserError):
    """A field with a value that can't be used. field: its place in the request, such as `messages[0].content`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class UnofferedError(UnsupportedError):
    """A field that is not offered here, or a value of it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field


async def read_text_body(request: Call, services: Services) -> bytes:
    """Raises: TooLargeError: more than a prompt needs. UserError: an encoding that isn't understood."""
    try:
        return await read_prompt_body(request, services, MAX_BODY_BYTES)
    except BodyTooLarge:
        most = PICTURES_BYTES if services.sees else MAX_BODY_BYTES
        limit = min(most, services.settings.max_body_bytes)
        raise TooLargeError(f"the request body is larger than {limit} bytes: shorten the prompt") from None


def read_fields(body: bytes, kind: type[T], unoffered: Mapping[str, str], harmless: Mapping[str, Any]) -> T:
    """The body as a `kind`.

    Args:
        unoffered: fields that the original API has and this one doesn't, and what to do instead.
        harmless: the values of such fields that ask for nothing.

    Raises:
        WireError: it is no JSON object.
        UnofferedError: a field that isn't offered.
        FieldError: an unknown field, or one with a value of another type.
    """
    value = decode_json(body, object)
    if not isinstance(value, dict):
        raise WireError("the request body must be a JSON object")
    _check_depth(value)
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    given: dict[str, Any] = {}
    for name, item in value.items():
        if item is None or (name in harmless and item == harmless[name]):
            continue
        if name in known:
            given[name] = _without_nulls(item)
        elif name in unoffered:
            raise UnofferedError(name, f"is not offered here: {unoffered[name]}")
        else:
            raise FieldError(name[:100], "there is no such field: leave it out")
    return convert(given, kind)


def convert(value: Any, kind: type[T], where: str = "") -> T:
    """Raises: FieldError: it doesn't fit; `where` is its place in the request."""
    try:
        return msgspec.convert(value, type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        place = PLACE.search(text)
        inner = place.group(1).replace("[...]", "[]") if place else ""
        named = re.search(r"field `(\w+)`", text)
        parts = [part for part in (where, inner, named.group(1) if named else "") if part]
        raise FieldError(".".join(parts) or "body", PLACE.sub("", text)[:500]) from None


def _without_nulls(value: Any) -> Any:
    """Clients send back what they were answered, with nulls for all that was not there."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _check_depth(value: Any) -> None:
    layer = [value]
    for _ in range(MAX_DEPTH):
        layer = [
            inner
            for item in layer
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, dict | list)
        ]
        if not layer:
            return
    raise WireError(TOO_DEEP)
