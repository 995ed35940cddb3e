"""Outcomes of ops, as the loop hands them to the recorder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tinsmith.route_tape import RouteTape
from tinsmith.store.rows import Finished, NewCheckpoint, NewSampler, OpRow
from tinsmith.store.usage_rows import Usage
from tinsmith.types import Failure, OpState
from tinsmith.wire.media import JSON
from tinsmith.wire.routes import encode_tape

INTERNAL = Failure(
    "internal",
    "server",
    "the server failed on this request; its log has the details. Nothing of it took effect: send it again",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """encode: makes the result's bytes, or says why that can't be, on the thread that records them; num_bytes: about
    how much memory the outcome takes until then."""

    op: OpRow
    finished: Finished
    encode: Callable[[], bytes | Failure] | None = None
    num_bytes: int = 0
    routes: RouteTape | None = None

    def encoded(self) -> Outcome:
        """The same with its result's bytes."""
        if self.encode is None:
            return self
        body = self.encode()
        if isinstance(body, Failure):
            return failed(self.op, body)
        routes = None if self.routes is None else encode_tape(self.routes)
        size = 0 if routes is None else len(routes)
        finished = replace(self.finished, result=body, result_bytes=len(body), routes=routes, routes_bytes=size)
        return Outcome(self.op, finished, num_bytes=len(body) + size)


def succeeded(
    op: OpRow,
    body: bytes,
    media: str = JSON,
    *,
    checkpoint: NewCheckpoint | None = None,
    sampler: NewSampler | None = None,
) -> Outcome:
    finished = Finished(
        op_id=op.id,
        state=OpState.DONE,
        result=body,
        result_bytes=len(body),
        media=media,
        checkpoint=checkpoint,
        sampler=sampler,
    )
    return Outcome(op, finished, num_bytes=len(body))


def computed(
    op: OpRow,
    encode: Callable[[], bytes | Failure],
    num_bytes: int,
    media: str,
    usage: Usage | None = None,
    routes: RouteTape | None = None,
) -> Outcome:
    """An outcome whose result is still to be written. `usage`: what the ledger is to count for it."""
    size = num_bytes + (0 if routes is None else routes.num_bytes)
    return Outcome(op, Finished(op_id=op.id, state=OpState.DONE, media=media, usage=usage), encode, size, routes)


def failed(op: OpRow, failure: Failure) -> Outcome:
    return Outcome(op, Finished(op_id=op.id, state=OpState.FAILED, media=JSON, failure=failure))
