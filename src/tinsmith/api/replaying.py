"""Routes that the sampler recorded, added to the training requests that say where their tokens come from.

They become part of the request's payload, so that whoever computes it, and computes it again, has the same. What they
take is counted with the bodies that are held (`intake`), before it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from tinsmith.api.services import Services
from tinsmith.errors import NotFoundError, UserError, echo
from tinsmith.route_tape import OWN_CHOICE, RouteArray, RouteTape
from tinsmith.store.rows import Principal
from tinsmith.types import OpId
from tinsmith.wire.routes import Span, add_routes, decode_tape, read_spans
from tinsmith.wire.training import TrainingRequest


@dataclass(frozen=True, slots=True)
class Place:
    """Where a span's routes go: to the datum's positions from `start` on. number: of the sequence in its request."""

    index: int
    start: int
    number: int
    span: Span


def with_routes(
    services: Services, principal: Principal, body: bytes, asked: TrainingRequest, take: Callable[[int], None]
) -> bytes:
    """The body, with the routes of all positions whose samples recorded theirs. May block.

    Of what was recorded, one sample request's is in memory at a time, however many are named. `take` is told of bytes
    before they are spent, and may refuse them.

    Raises:
        UserError: spans that fit neither the datum nor the sample, or routes that have expired.
        NotFoundError: a span names no sample of the caller's.
    """
    places: dict[OpId, list[Place]] = {}
    for index, (datum, spans) in enumerate(zip(asked.data, read_spans(body), strict=True)):
        if spans and sum(span.length for span in spans) != datum.num_tokens:
            raise UserError(f"datum {index}: its provenance spans don't cover its {datum.num_tokens} tokens exactly")
        start = 0
        for span in spans:
            op_id, number = _address(span.sequence_id, index)
            places.setdefault(op_id, []).append(Place(index, start, number, span))
            start += span.length
    found: dict[int, RouteArray] = {}
    for op_id, its in places.items():
        _copy_all(_tape(services, principal, op_id, its[0].index), its, asked, found, take)
    if not found:
        return body
    take(len(body) + sum(routes.nbytes for routes in found.values()))
    return add_routes(body, found)


def _copy_all(
    tape: RouteTape | None,
    places: Sequence[Place],
    asked: TrainingRequest,
    found: dict[int, RouteArray],
    take: Callable[[int], None],
) -> None:
    if tape is not None:
        for place in places:
            _copy(tape, place, found, asked.data[place.index].num_tokens, take)


def _copy(
    tape: RouteTape, place: Place, found: dict[int, RouteArray], num_tokens: int, take: Callable[[int], None]
) -> None:
    """Into the routes of the place's datum, which may be the first of them."""
    index, span = place.index, place.span
    if place.number >= len(tape.sequences):
        raise UserError(f"datum {index}: {echo(span.sequence_id)} names no sequence of its request")
    known = tape.sequences[place.number] if span.is_sampled else tape.prompt
    end = span.offset + span.length
    if end > len(known) + span.is_sampled:
        raise UserError(f"datum {index}: {echo(span.sequence_id)} has no tokens {span.offset}..{end - 1}")
    if index not in found:
        shape = num_tokens, *known.shape[1:]
        take(prod(shape) * np.dtype(np.int16).itemsize)
        found[index] = np.full(shape, OWN_CHOICE, np.int16)
    routes = found[index]
    if routes.shape[1:] != known.shape[1:]:
        raise UserError(f"datum {index}: its samples were recorded on models of different shapes")
    part = known[span.offset : end]
    routes[place.start : place.start + len(part)] = part


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
