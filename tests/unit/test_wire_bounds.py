"""What a training request may hold is found out without building any of it."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from tinsmith.errors import TooLargeError
from tinsmith.wire import wire_pb2 as pb
from tinsmith.wire.bounds import MAX_CHUNKS, MAX_DATUMS, check_bounds, read_address
from tinsmith.wire.media import WireError
from tinsmith.wire.training import decode_training

HEAD = pb.ForwardBackwardRequest(model_id="s1:train:0", seq_id=3, loss_fn="cross_entropy").SerializeToString()
MAX_TOKENS = 1000


def good(num_datums: int = 2, num_tokens: int = 5) -> pb.ForwardBackwardRequest:
    message = pb.ForwardBackwardRequest.FromString(HEAD)
    for _ in range(num_datums):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.ones(num_tokens, "<i4").tobytes()
        targets = datum.loss_fn_inputs["target_tokens"]
        targets.dense, targets.dtype = np.ones(num_tokens, "<i8").tobytes(), pb.DT_I64
        targets.shape.append(num_tokens)
    message.loss_fn_config["beta"] = 0.1
    message.loss_fn_config_v2["name"].text = "x"
    return message


def field(number: int, inner: bytes) -> bytes:
    """A length-delimited field of fewer than 16,384 bytes."""
    return bytes([number << 3 | 2, len(inner) & 0x7F | 0x80, len(inner) >> 7]) + inner


def test_good_requests_pass() -> None:
    check_bounds(HEAD, MAX_TOKENS)
    check_bounds(good().SerializeToString(), MAX_TOKENS)
    check_bounds(good(num_datums=1, num_tokens=MAX_TOKENS).SerializeToString(), MAX_TOKENS)
    check_bounds(HEAD + field(3, b"") * MAX_DATUMS, MAX_TOKENS)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (lambda: good(2, MAX_TOKENS).SerializeToString(), "holds 2000 tokens, at most 1000 are allowed"),
        (lambda: HEAD + b"\x1a\x00" * (16 << 20), f"more than {MAX_DATUMS} datums"),
        (lambda: HEAD + field(3, b"\x0a\x00" * (MAX_CHUNKS + 1)), f"datum 0 holds more than {MAX_CHUNKS} chunks"),
        (lambda: HEAD + b"\x28\x01" * (16 << 20), "fields"),
        (lambda: HEAD + field(3, field(1, field(1, b"\x08\x01" * 2000))) * 2000, "fields"),
    ],
    ids=["tokens", "datums", "chunks", "fields", "fields within"],
)
def test_too_much_is_refused_at_little_cost(body: Callable[[], bytes], words: str) -> None:
    sent = body()
    started = time.process_time()
    with pytest.raises(TooLargeError, match=words):
        check_bounds(sent, MAX_TOKENS)
    assert time.process_time() - started < 3.0
    tracemalloc.start()  # apart, since it takes eight times as long
    with pytest.raises(TooLargeError, match=words):
        check_bounds(sent, MAX_TOKENS)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_shape_of_a_million_dimensions_is_refused() -> None:
    message = good(1)
    message.data[0].loss_fn_inputs["target_tokens"].shape.extend([1] * 1_000_000)
    with pytest.raises(WireError, match="dimensions"):
        check_bounds(message.SerializeToString(), MAX_TOKENS)


@pytest.mark.parametrize("cut", [1, 2, 5, 20, 40, 60])
def test_what_is_cut_short_is_no_message(cut: int) -> None:
    with pytest.raises(WireError, match="no ForwardBackwardRequest"):
        check_bounds(good().SerializeToString()[:-cut], MAX_TOKENS)


@pytest.mark.parametrize("end", [b"\xff" * 11, b"\x1a\xff\xff\xff\xff\x07abc", b"\x1b", b"\x1a", b"\x0b\x0c"])
def test_bytes_that_are_no_fields(end: bytes) -> None:
    with pytest.raises(WireError, match="no ForwardBackwardRequest"):
        check_bounds(HEAD + end, MAX_TOKENS)


def test_a_field_may_not_reach_beyond_its_message() -> None:
    with pytest.raises(WireError, match="no ForwardBackwardRequest"):
        check_bounds(HEAD + b"\x1a\x02\x0a\x05" + bytes(20), MAX_TOKENS)


def test_the_address_is_found_wherever_it_stands() -> None:
    data = pb.ForwardBackwardRequest(data=good().data).SerializeToString()
    assert read_address(data + HEAD) == read_address(HEAD + data) == ("s1:train:0", 3)
    assert read_address(data) is None
    started = time.process_time()
    assert read_address(b"\x1a\x00" * (16 << 20) + HEAD) is None
    assert time.process_time() - started < 2.0


def test_a_long_name_of_a_run_is_none() -> None:
    assert read_address(pb.ForwardBackwardRequest(model_id="x" * 257, seq_id=1).SerializeToString()) is None


@pytest.mark.parametrize(
    "second", [pb.ForwardBackwardRequest(model_id="s2:train:0"), pb.ForwardBackwardRequest(seq_id=4)]
)
def test_a_request_that_names_two_runs_is_refused(second: pb.ForwardBackwardRequest) -> None:
    """Protobuf takes the last of a repeated field; the caller's right to a run was checked for the first."""
    body = good().SerializeToString() + second.SerializeToString()
    with pytest.raises(WireError, match="more than one model_id or seq_id") as caught:
        decode_training(body)
    assert caught.value.address == ("s1:train:0", 3)
