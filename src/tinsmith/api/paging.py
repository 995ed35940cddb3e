"""Limit and offset of the lists, and the cursor that comes back."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from litestar.params import FromQuery, QueryParameter
from msgspec import Struct

Limit = Annotated[int, QueryParameter(ge=1, le=1000)]
Offset = Annotated[int, QueryParameter(ge=0, le=2**63 - 1)]
# A tenant is one user, so both are its own objects.
AccessScope = FromQuery[Literal["owned", "accessible"]]


class Cursor(Struct):
    offset: int
    limit: int
    total_count: int


def iso_time(unix_s: float) -> str:
    """A moment as ISO 8601 with its zone."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat()
