"""Protobuf bodies of every making: each is computed or refused as the user's mistake, at once and in little memory."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.contract.depth import depth
from tests.contract.raw import PROTOBUF
from tests.contract.routes import training
from tests.messages import messages, near_misses, spoiled, unknown_fields
from tinsmith.errors import UserError
from tinsmith.types import OpKind
from tinsmith.wire import wire_pb2 as pb
from tinsmith.wire.bounds import check_bounds, read_address
from tinsmith.wire.training import decode_training

ANY = messages(pb.ForwardBackwardRequest.DESCRIPTOR)
WITHIN_S = 2.0  # on a busy machine
MAX_TOKENS = 1000


@pytest.fixture
def run(api: Any, worker: Any) -> str:
    run_id = str(api.create(api.session())["model_id"])
    worker.step()
    return run_id


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """Of requests for run `s1:train:0`, or for any."""
    message = draw(ANY | near_misses())
    if draw(st.booleans()):
        message.model_id, message.seq_id = "s1:train:0", draw(st.integers(1, 9))
    body = message.SerializeToString()
    return draw(spoiled(body)) if draw(st.booleans()) else body


@settings(**depth(times=40))
@given(body=bodies())
def test_bytes_are_read_or_refused(body: bytes) -> None:
    """What is read out of them is in proportion to them."""
    tracemalloc.start()
    started = time.process_time()
    try:
        read_address(body)
        check_bounds(body, MAX_TOKENS)
        asked = decode_training(body)
        assert (asked.run_id, asked.seq_id) == read_address(body)
    except UserError as error:
        text = error.message
        assert 0 < len(text) < 1000
    finally:
        elapsed_s, (_, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 200_000 + 100 * len(body)
    assert elapsed_s < 0.5


@settings(**depth(times=40))
@given(message=ANY | near_misses(), unknown=unknown_fields())
def test_unknown_fields_change_nothing(message: pb.ForwardBackwardRequest, unknown: bytes) -> None:
    """Newer clients send more of them, in front, behind, and in the messages within."""
    message.model_id, message.seq_id = "s1:train:0", 1
    body = message.SerializeToString()
    for datum in message.data:
        datum.MergeFromString(unknown)
    expected = outcome(body)
    assert outcome(unknown + body) == outcome(body + unknown) == outcome(message.SerializeToString()) == expected


def outcome(body: bytes) -> str:
    try:
        check_bounds(body, MAX_TOKENS)
        return repr(decode_training(body))
    except UserError as error:
        return error.message


def test_every_body_is_computed_or_refused(house: Any, api: Any, worker: Any, run: str) -> None:
    """And the run goes on: whatever number was taken ends, but for those beyond a gap; the next one is computed."""

    def send(body: bytes) -> dict[str, Any] | None:
        """The promise, if a number was taken."""
        started = time.monotonic()
        answer = api.raw("POST", "/api/v1/forward_backward", content=body, headers={"content-type": PROTOBUF})
        assert time.monotonic() - started < WITHIN_S
        assert answer.status_code in (200, 400, 404, 413), answer.text
        found = dict(answer.json())
        if answer.status_code == 200:
            return found
        assert found["category"] == "user"
        return None

    def next_seq() -> int:
        return int(house.store.runs.get(house.tenant_id, run).head_seq) + 1

    @settings(**depth(times=20))
    @given(message=ANY | near_misses(), data=st.data(), is_addressed=st.integers(0, 9))
    def check(message: pb.ForwardBackwardRequest, data: st.DataObject, is_addressed: int) -> None:
        if is_addressed:
            message.model_id, message.seq_id = run, next_seq()
        body = message.SerializeToString()
        promise = send(data.draw(spoiled(body)) if data.draw(st.booleans()) else body)
        worker.step()
        if promise is None:
            return
        op = house.store.ops.get(house.tenant_id, promise["request_id"])
        assert op.state.is_final or op.seq_id > next_seq()
        if op.state.is_final:
            result = api.raw("POST", "/api/v1/retrieve_future", json={"request_id": op.id})
            assert result.headers["content-type"] == PROTOBUF or result.json()["category"] == "user", result.text

    check()
    promise = send(training(run, next_seq()))
    worker.step()
    assert promise is not None
    op = house.store.ops.get(house.tenant_id, promise["request_id"])
    assert op.state == "done", op.failure
    assert [seen.kind for seen in worker.seen].count(OpKind.FORWARD_BACKWARD) > 1
