"""Strategies for protobuf: any message of a type, near misses of training requests, and what spoils good bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

from tinsmith.validate.requests import LOSSES
from tinsmith.wire import wire_pb2 as pb

MAX_REPEATED = 3
I32, I64, U32 = (-(2**31), 2**31 - 1), (-(2**63), 2**63 - 1), (0, 2**32 - 1)
BYTES = st.binary(max_size=24) | st.integers(0, 6).map(lambda n: np.arange(n, dtype="<i8").tobytes())
TEXT = st.text(max_size=8) | st.sampled_from([*LOSSES, "target_tokens", "weights", "logprobs", "advantages", "custom"])
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_STRING: TEXT.filter(lambda text: text.isprintable()),
    FieldDescriptor.TYPE_BYTES: BYTES,
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_DOUBLE: st.floats(),
    FieldDescriptor.TYPE_INT32: st.integers(0, 4) | st.integers(*I32),
    FieldDescriptor.TYPE_INT64: st.integers(0, 4) | st.integers(*I64),
    FieldDescriptor.TYPE_UINT32: st.integers(0, 4) | st.integers(*U32),
    FieldDescriptor.TYPE_ENUM: st.integers(0, 5) | st.integers(*I32),
}


@st.composite
def messages(draw: st.DrawFn, descriptor: Descriptor) -> Message:
    """Any message of the type, with some of its fields."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if draw(st.booleans()):
            _fill(draw, message, field)
    return message


def _fill(draw: st.DrawFn, message: Any, field: FieldDescriptor) -> None:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        keys, values = kind.fields_by_name["key"], kind.fields_by_name["value"]
        for _ in range(draw(st.integers(0, MAX_REPEATED))):
            key, place = draw(SCALARS[keys.type]), getattr(message, field.name)
            if values.message_type is None:
                place[key] = draw(SCALARS[values.type])
            else:
                place[key].CopyFrom(draw(messages(values.message_type)))
    elif field.is_repeated:
        items = st.lists(SCALARS[field.type] if kind is None else messages(kind), max_size=MAX_REPEATED)
        getattr(message, field.name).extend(draw(items))
    elif kind is not None:
        getattr(message, field.name).CopyFrom(draw(messages(kind)))
    else:
        setattr(message, field.name, draw(SCALARS[field.type]))


@st.composite
def near_misses(draw: st.DrawFn) -> pb.ForwardBackwardRequest:
    """Training requests that could be carried out but for a field or two, and some that can."""
    loss = draw(st.sampled_from([*LOSSES]))
    inputs = set(LOSSES[loss].required) | draw(st.just(set()) | st.sets(st.sampled_from(["weights", "advantages"])))
    message = pb.ForwardBackwardRequest(loss_fn=loss, forward_only=draw(st.booleans()))
    for _ in range(draw(st.integers(1, MAX_REPEATED))):
        size = draw(st.integers(1, 5))
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.arange(size, dtype="<i4").tobytes()
        for name in sorted(inputs):
            is_target = name == "target_tokens"
            datum.loss_fn_inputs[name].dense = np.ones(size, "<i8" if is_target else "<f4").tobytes()
            datum.loss_fn_inputs[name].dtype = pb.DT_I64 if is_target else pb.DT_F32
    if draw(st.sampled_from([False, False, True])):
        message.MergeFrom(draw(messages(pb.ForwardBackwardRequest.DESCRIPTOR)))
    return message


@st.composite
def unknown_fields(draw: st.DrawFn) -> bytes:
    """Fields that no message of ours has, of every wire type."""
    number = draw(st.integers(64, 2**29 - 1))
    value = draw(st.binary(min_size=1, max_size=20))
    kind, body = draw(
        st.sampled_from([(0, varint(value[0])), (1, bytes(8)), (2, varint(len(value)) + value), (5, bytes(4))])
    )
    return varint(number << 3 | kind) + body


@st.composite
def spoiled(draw: st.DrawFn, body: bytes) -> bytes:
    """The bytes cut, with bits turned, with bytes put in or taken out, or sent twice over."""
    at = draw(st.integers(0, max(0, len(body) - 1)))
    more = draw(st.binary(min_size=1, max_size=8))
    bit = bytes([body[at] ^ 1 << draw(st.integers(0, 7))]) if body else b""
    changed = [body[:at], body[:at] + bit + body[at + 1 :], body[:at] + more + body[at:], body[:at] + body[at + 1 :]]
    return draw(st.sampled_from([*changed, body + body, body + draw(unknown_fields())]))


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
