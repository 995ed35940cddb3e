"""Answers of the express lane, as they go over the wire; refusals are made beforehand but for their id and the date."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from types import MappingProxyType
from typing import NamedTuple

from tinsmith.types import TenantId
from tinsmith.wire.media import JSON

ID = "the-id-of-the-request"  # stands for it in a refusal that is made beforehand
PHRASES = {status.value: status.phrase for status in HTTPStatus}
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Answer(NamedTuple):
    status: int
    body: bytes
    media: str = JSON
    headers: Mapping[str, str] = NO_HEADERS


class Answered(NamedTuple):
    """An answer to a request, with the id that both bear. security: header lines of every answer."""

    answer: Answer
    request_id: str
    security: bytes

    @property
    def closes(self) -> bool:
        """The connection has to be closed after it."""
        return self.answer.headers.get("connection") == "close"

    def to_bytes(self, dated: bytes, *, is_last: bool) -> bytes:
        """As it goes over the wire. dated: headers that the server adds to each; is_last: the connection is closed."""
        status, body, media, own = self.answer
        headers = {**own, "connection": "close"} if is_last else own
        extra = "".join([f"{name}: {value}\r\n" for name, value in headers.items()]) if headers else ""
        head = (
            f"HTTP/1.1 {status} {PHRASES[status]}\r\ncontent-type: {media}\r\n"
            f"content-length: {len(body)}\r\n{extra}x-request-id: {self.request_id}\r\n"
        )
        return b"".join((head.encode("latin-1"), dated, self.security, b"\r\n", body))


@dataclass(frozen=True, slots=True)
class Refusal:
    """What all refusals have in common that tell to wait so long: the bytes before their id, and those behind the
    date."""

    head: bytes
    tail: bytes
    wait_s: int

    @classmethod
    def of(cls, answer: Answer, security: bytes, wait_s: int) -> Refusal:
        head, _, tail = Answered(answer, ID, security).to_bytes(b"", is_last=False).partition(ID.encode())
        return cls(head, tail.removeprefix(b"\r\n"), wait_s)


class Refused(NamedTuple):
    """A refusal of a tenant's request, with the id that it bears."""

    refusal: Refusal
    request_id: str
    tenant_id: TenantId

    def to_bytes(self, dated: bytes) -> bytes:
        """As it goes over the wire. dated: headers that the server adds to each."""
        return b"%b%b\r\n%b%b" % (self.refusal.head, self.request_id.encode(), dated, self.refusal.tail)
