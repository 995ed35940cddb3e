"""Routes of experts as bytes: the file of a sample request's, and what the server adds to a training request.

Which positions of a datum come from which sample is said by its provenance spans. Knows no store and no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tinsmith.errors import CorruptError
from tinsmith.route_tape import RouteArray, RouteTape
from tinsmith.wire import wire_pb2 as pb
from tinsmith.wire.media import WireError

PROMPT = "prompt"


@dataclass(frozen=True, slots=True)
class Span:
    """The next `length` positions of a datum are those of a sample from `offset` on: of its prompt, or of what was
    sampled. `sequence_id`: as the answer to the sample request named it."""

    sequence_id: str
    is_sampled: bool
    offset: int
    length: int


def encode_tape(tape: RouteTape) -> bytes:
    """A safetensors file: `prompt`, then each sequence by its number."""
    return save({PROMPT: tape.prompt} | {str(i): routes for i, routes in enumerate(tape.sequences)})


def decode_tape(data: bytes) -> RouteTape:
    """Raises: CorruptError: it isn't one."""
    try:
        arrays = load(data)
        return RouteTape(arrays.pop(PROMPT), tuple(arrays[str(i)] for i in range(len(arrays))))
    except (SafetensorError, KeyError, ValueError):
        raise CorruptError("recorded routes can't be read") from None


def read_spans(body: bytes) -> list[tuple[Span, ...]]:
    """The provenance of each datum's tokens; empty for one without.

    Raises:
        WireError: no such request, or spans that can't be meant.
    """
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(body)
    except DecodeError:
        raise WireError("the request body is no ForwardBackwardRequest message") from None
    return [tuple(_span(span, index) for span in datum.model_input_spans) for index, datum in enumerate(message.data)]


def add_routes(body: bytes, routes: Mapping[int, RouteArray]) -> bytes:
    """A training request with the routes of some of its data, [N, L, K] each: protobuf messages end to end are one."""
    added = pb.ForwardBackwardRequest()
    for index, array in routes.items():
        _, routers, chosen = array.shape
        added.routes.add(datum=index, routers=routers, chosen=chosen, experts=array.astype("<i2").tobytes())
    return body + bytes(added.SerializeToString())


def decode_routes(message: pb.ForwardBackwardRequest) -> dict[int, RouteArray]:
    """By datum, [N, L, K]. Raises: WireError: sizes that don't fit together."""
    try:
        return {
            added.datum: np.frombuffer(added.experts, "<i2").astype(np.int16).reshape(-1, added.routers, added.chosen)
            for added in message.routes
        }
    except ValueError:
        raise WireError("the request's recorded routes can't be read") from None


def _span(span: pb.ProvenanceSpan, index: int) -> Span:
    kind = span.WhichOneof("span")
    if kind is None:
        raise WireError(f"datum {index}: a provenance span names no sequence")
    of = span.sampled_tokens if kind == "sampled_tokens" else span.prompt_tokens
    if of.offset < 0 or of.length < 0:
        raise WireError(f"datum {index}: a provenance span begins at {of.offset} and is {of.length} long")
    return Span(of.sequence_id, kind == "sampled_tokens", of.offset, of.length)
