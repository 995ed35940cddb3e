"""Requests that name pictures instead of holding them: the named ones are fetched and put in their place.

The rewritten body is what is recorded, so a request that is carried out again sees the same bytes.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from tinsmith.api.fetching import Take
from tinsmith.api.services import LIGHT_BYTES, Services
from tinsmith.config import Settings
from tinsmith.store.rows import Principal
from tinsmith.wire.bounds import check_bounds
from tinsmith.wire.media import WireError, decode_json, encode_json
from tinsmith.wire.named_pictures import may_name_pictures, named_pictures, with_named_pictures
from tinsmith.wire.sampling import POINTER


class Pointer(Struct):
    location: str
    format: str
    expected_tokens: int | None = None


async def with_pictures(services: Services, principal: Principal, body: bytes, take: Take) -> bytes:
    """The body of a sample request with the pictures that it names in it; as it is, if it names none, or if no
    locations are allowed.

    Raises:
        UserError: it can't be read, or a picture can't be fetched.
        TooLargeError: more or larger pictures than are taken.
    """
    if not services.fetcher.is_on or not (POINTER.encode() in body or b"\\u" in body):
        return body
    weight = max(len(body), LIGHT_BYTES + 1)
    request, pointers = await services.digest(principal, weight, _pointers, body)
    if not pointers:
        return body
    named = [pointer.location for pointer in pointers.values()]
    files = await services.fetcher.fetch(principal.tenant_id, named, take)
    return await services.digest(principal, weight, _filled, request, pointers, files)


async def with_training_pictures(services: Services, principal: Principal, body: bytes, take: Take) -> bytes:
    """The same of a training request.

    Raises:
        UserError: it can't be read, or a picture can't be fetched.
        TooLargeError: more or larger pictures than are taken.
    """
    if not services.fetcher.is_on or not may_name_pictures(body):
        return body
    weight = max(len(body), LIGHT_BYTES + 1)
    named = await services.digest(principal, weight, _named, services.settings, body)
    if not named:
        return body
    files = await services.fetcher.fetch(principal.tenant_id, named, take)
    return await services.digest(principal, weight, with_named_pictures, body, files)


def _named(settings: Settings, body: bytes) -> list[str]:
    check_bounds(body, settings.max_request_tokens, settings.max_pictures, settings.max_picture_bytes)
    return named_pictures(body)


def _pointers(body: bytes) -> tuple[dict[str, Any], dict[int, Pointer]]:
    """The request, and the pointers among the chunks of its prompt."""
    request = decode_json(body, dict[str, Any])
    try:
        chunks = request["prompt"]["chunks"]
        found = {
            index: msgspec.convert(chunk, type=Pointer)
            for index, chunk in enumerate(chunks)
            if chunk.get("type") == POINTER
        }
    except (KeyError, TypeError, AttributeError):
        return request, {}  # for the decoder to say what is wrong
    except msgspec.ValidationError as error:
        raise WireError(f"an {POINTER} chunk does not fit: {error}") from None
    return request, found


def _filled(request: dict[str, Any], pointers: Mapping[int, Pointer], files: Mapping[str, bytes]) -> bytes:
    encoded = {location: base64.b64encode(data).decode("ascii") for location, data in files.items()}
    chunks = request["prompt"]["chunks"]
    for index, pointer in pointers.items():
        chunks[index] = {"type": "image", "data": encoded[pointer.location], "format": pointer.format}
        if pointer.expected_tokens is not None:
            chunks[index]["expected_tokens"] = pointer.expected_tokens
    return encode_json(request)
