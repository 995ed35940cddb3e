"""Routes of many samples in one training request: each lands where its span says, and they are not held together."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from tinsmith.api import replaying
from tinsmith.route_tape import OWN_CHOICE, RouteTape
from tinsmith.store.routes import Recorded
from tinsmith.store.rows import Principal
from tinsmith.types import BlobKey, Datum, LossSpec, RunId
from tinsmith.wire import wire_pb2 as pb
from tinsmith.wire.routes import decode_routes
from tinsmith.wire.training import TrainingRequest

ALICE = cast(Principal, SimpleNamespace(tenant_id="alice"))


def tape_of(number: int) -> RouteTape:
    known = np.full((4, 1, 2), number, np.int16)
    return RouteTape(known, (known + 10,))


def request_of(*data: list[tuple[str, bool, int, int]]) -> tuple[bytes, TrainingRequest]:
    message = pb.ForwardBackwardRequest()
    for spans in data:
        datum = message.data.add()
        for name, is_sampled, offset, length in spans:
            span = datum.model_input_spans.add()
            of = span.sampled_tokens if is_sampled else span.prompt_tokens
            of.sequence_id, of.offset, of.length = name, offset, length
    lengths = [sum(span[3] for span in spans) for spans in data]
    datums = tuple(Datum(np.zeros(length, np.int32), {}) for length in lengths)
    return message.SerializeToString(), TrainingRequest(RunId("r"), 1, datums, LossSpec("cross_entropy"), True)


def test_one_tape_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []

    def decode(data: bytes) -> RouteTape:
        assert not any(ref() is not None for ref in alive)
        tape = tape_of(int(data))
        alive.extend(weakref.ref(array) for array in (tape.prompt, *tape.sequences))
        return tape

    def find(tenant_id: str, op_id: str) -> Recorded:
        return Recorded(None if op_id == "none" else BlobKey(op_id), False)

    monkeypatch.setattr(replaying, "decode_tape", decode)
    services: Any = SimpleNamespace(
        store=SimpleNamespace(routes=SimpleNamespace(find=find)), blobs=SimpleNamespace(get=lambda key: key.encode())
    )
    body, asked = request_of(
        [("1-0", False, 0, 2), ("2-0", True, 1, 3), ("none-0", True, 0, 1), ("1-0", True, 3, 2)],
        [("2-0", False, 4, 0), ("1-0", False, 2, 1), ("3-0", False, 4, 0)],
        [("none-0", False, 0, 9)],
    )
    taken: list[int] = []
    message = pb.ForwardBackwardRequest.FromString(replaying.with_routes(services, ALICE, body, asked, taken.append))
    found = decode_routes(message)
    assert sorted(found) == [0, 1]
    assert found[0][:, 0, 0].tolist() == [1, 1, 12, 12, 12, OWN_CHOICE, 11, OWN_CHOICE]
    assert found[1][:, 0, 1].tolist() == [1]
    its, other = (routes.nbytes for routes in (found[0], found[1]))
    assert taken == [its, other, len(body) + its + other], "counted before it is made"
