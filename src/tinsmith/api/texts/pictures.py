"""Pictures in messages: `data:` URLs and base64 as they are, other URLs fetched from where the operator allows."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tinsmith.api.auth import Call
from tinsmith.api.intake import hold_of
from tinsmith.api.services import LIGHT_BYTES, Services
from tinsmith.api.texts.fields import FieldError, UnofferedError
from tinsmith.wire.media import decode_json

DATA_URL = re.compile(r"data:image/(\w+);base64,")
KINDS: Mapping[str, str] = {"png": "png", "jpeg": "jpeg", "jpg": "jpeg"}
PLACEHOLDER: Mapping[str, Any] = {"type": "image"}  # how a chat template knows that a picture comes here


@dataclass(frozen=True, slots=True)
class File:
    """kind: the format that the client says it has; None: it said nothing."""

    data: bytes
    kind: str | None


class Gallery:
    """The pictures of a chat, in the order of its messages. is_open: the model takes any. fetched: by the URLs that its
    request names."""

    def __init__(self, *, is_open: bool, fetched: Mapping[str, bytes] | None = None) -> None:
        self.is_open = is_open
        self._fetched = fetched or {}
        self.files: list[File] = []

    def add_url(self, url: str, where: str) -> None:
        """Raises: FieldError, UnofferedError: no picture, or not from there."""
        found = DATA_URL.match(url)
        if found is not None:
            self.add_base64(f"image/{found.group(1)}", url[found.end() :], where)
        elif url in self._fetched:
            self.files.append(File(self._fetched[url], None))
        else:
            raise UnofferedError(
                where,
                "other than data:image/png;base64, and data:image/jpeg;base64, is not offered here: this server names "
                "no locations to fetch pictures from (--picture-locations)",
            )

    def add_base64(self, media_type: str, text: str, where: str) -> None:
        """Raises: FieldError, UnofferedError: no base64, or another kind of picture."""
        kind = KINDS.get(media_type.removeprefix("image/"))
        if kind is None:
            raise UnofferedError(
                where, f"of type {media_type[:100]!r} is not offered here: send image/png or image/jpeg"
            )
        try:
            self.files.append(File(base64.b64decode(text, validate=True), kind))
        except (binascii.Error, ValueError):
            raise FieldError(where, "must be base64") from None


def is_picture(part: Any) -> bool:
    """A part of OpenAI's content, or a block of Anthropic's."""
    return isinstance(part, dict) and part.get("type") in ("image_url", "image")


async def fetch_named(request: Call, services: Services, body: bytes) -> Mapping[str, bytes]:
    """The files at the URLs that a chat names, by these.

    Raises:
        UserError: one that isn't allowed, or can't be fetched.
    """
    if not (services.fetcher.is_on and services.sees):
        return {}
    named = await services.digest(request.user, max(len(body), LIGHT_BYTES + 1), _named, body)
    if not named:
        return {}
    return await services.fetcher.fetch(request.user.tenant_id, named, hold_of(request.scope).take)


def _named(body: bytes) -> list[str]:
    """As often as they are named."""
    value = decode_json(body, object)
    messages = value.get("messages") if isinstance(value, dict) else None
    contents = [message.get("content") for message in messages or () if isinstance(message, dict)]
    urls = [url for content in contents if isinstance(content, list) for part in content for url in _urls(part)]
    return [url for url in urls if not url.startswith("data:")]


def _urls(part: Any) -> Iterator[str]:
    if is_picture(part):
        for holder in (part.get("image_url"), part.get("source")):
            url = holder.get("url") if isinstance(holder, dict) else None
            if isinstance(url, str):
                yield url
