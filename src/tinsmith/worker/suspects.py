"""Ops that may be what ended a worker, or made the engine raise: each is to run alone once, so that it fails alone."""

from __future__ import annotations

from collections.abc import Iterable

from tinsmith.scheduler import SAMPLE_SUSPECT, SUSPECT
from tinsmith.store.rows import OpRow
from tinsmith.types import OpId, OpKind


class Suspects(set[OpId]):
    """Those under which the engine raised; under which workers died is in their rows."""

    def attempts(self, op: OpRow) -> int:
        """Deaths under the op, and what makes it a suspect if the engine raised while it was computed."""
        least = SAMPLE_SUSPECT if op.kind is OpKind.SAMPLE else SUSPECT
        return op.attempts + (least if op.id in self else 0)

    def are_among(self, resident: Iterable[OpRow]) -> bool:
        """A suspect is being sampled: nothing else should run beside it."""
        return any(op.attempts > SAMPLE_SUSPECT or op.id in self for op in resident)
