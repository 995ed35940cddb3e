"""Routes that the sampler recorded, added to the training requests that say where their tokens come from.

They become part of the request's payload, so that whoever computes it, and computes it again, has the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tinsmith.api.services import Services
from tinsmith.errors import NotFoundError, UserError, echo
from tinsmith.route_tape import OWN_CHOICE, RouteArray, RouteTape
from tinsmith.store.rows import Principal
from tinsmith.types import OpId
from tinsmith.wire.routes import Span, add_routes, decode_tape, read_spans
from tinsmith.wire.training import TrainingRequest


def with_routes(services: Services, principal: Principal, body: bytes, asked: TrainingRequest) -> bytes:
    """The body, with the routes of all positions whose samples recorded theirs. May block.

    Raises:
        UserError: spans that fit neither the datum nor the sample, or routes that have expired.
        NotFoundError: a span names no sample of the caller's.
    """
    tapes: dict[OpId, RouteTape | None] = {}
    found: dict[int, RouteArray] = {}
    for index, (datum, spans) in enumerate(zip(asked.data, read_spans(body), strict=True)):
        if not spans:
            continue
        if sum(span.length for span in spans) != datum.num_tokens:
            raise UserError(f"datum {index}: its provenance spans don't cover its {datum.num_tokens} tokens exactly")
        routes = _of_datum(services, principal, index, spans, tapes)
        if routes is not None:
            found[index] = routes
    return add_routes(body, found) if found else body


def _of_datum(
    services: Services,
    principal: Principal,
    index: int,
    spans: Sequence[Span],
    tapes: dict[OpId, RouteTape | None],
) -> RouteArray | None:
    parts: list[RouteArray | int] = []
    for span in spans:
        op_id, number = _address(span.sequence_id, index)
        if op_id not in tapes:
            tapes[op_id] = _tape(services, principal, op_id, index)
        tape = tapes[op_id]
        if tape is None:
            parts.append(span.length)
            continue
        if number >= len(tape.sequences):
            raise UserError(f"datum {index}: {echo(span.sequence_id)} names no sequence of its request")
        known = tape.sequences[number] if span.is_sampled else tape.prompt
        end = span.offset + span.length
        if end > len(known) + span.is_sampled:
            raise UserError(f"datum {index}: {echo(span.sequence_id)} has no tokens {span.offset}..{end - 1}")
        parts.append(known[span.offset : end])
        if missing := end - max(span.offset, len(known)):
            parts.extend([missing] if missing > 0 else [])
    shapes = {part.shape[1:] for part in parts if not isinstance(part, int)}
    if not shapes:
        return None
    if len(shapes) > 1:
        raise UserError(f"datum {index}: its samples were recorded on models of different shapes")
    shape = shapes.pop()
    arrays = [np.full((part, *shape), OWN_CHOICE, np.int16) if isinstance(part, int) else part for part in parts]
    return np.concatenate(arrays)


def _address(sequence_id: str, index: int) -> tuple[OpId, int]:
    op_id, _, number = sequence_id.rpartition("-")
    if not op_id or not number.isdecimal() or len(number) > 9:
        raise UserError(f"datum {index}: {echo(sequence_id)} is no id of a sampled sequence")
    return OpId(op_id), int(number)


def _tape(services: Services, principal: Principal, op_id: OpId, index: int) -> RouteTape | None:
    try:
        recorded = services.store.routes.find(principal.tenant_id, op_id)
    except NotFoundError:
        raise UserError(
            f"datum {index}: its provenance names {echo(op_id)}, and there is no sample request of yours by that name, "
            "or no longer"
        ) from None
    if recorded.blob is not None:
        return decode_tape(services.blobs.get(recorded.blob))
    if recorded.is_expired:
        raise UserError(
            f"datum {index}: what {op_id} recorded has expired, as its result has: sample again, or leave out the "
            "provenance to have the routers choose"
        )
    return None
