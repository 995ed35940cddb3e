"""Requests with pictures, carried out again after a crash, give the same to the bit: their bytes lie with them."""

from __future__ import annotations

import base64
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.flow import house as flow
from tests.flow.house import House, settle
from tests.paint import VISION, jpeg, png
from tests.unit.test_wire_images import training_body
from tinsmith.store.rows import NewOp, OpRow
from tinsmith.types import OpKind, RunId
from tinsmith.wire import wire_pb2 as pb
from tinsmith.wire.media import PROTOBUF, encode_json
from tinsmith.wire.meta import SampleMeta, to_meta
from tinsmith.wire.sampling import decode_sample_result


@pytest.fixture(autouse=True)
def _seeing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "BASE", replace(flow.BASE, vision=VISION))


def look(house: House, run: RunId, seq: int, *pictures: bytes) -> OpRow:
    chunks: list[Any] = [[1, 2]]
    for picture in pictures:
        chunks += [(picture, "png" if picture.startswith(b"\x89") else "jpeg"), [3]]
    request = pb.ForwardBackwardRequest.FromString(training_body(chunks))
    request.model_id, request.seq_id = run, seq
    num_tokens = 2 + 5 * len(pictures)
    target = request.data[0].loss_fn_inputs["target_tokens"]
    target.dense, target.dtype = np.ones(num_tokens, "<i8").tobytes(), pb.DT_I64
    target.shape.append(num_tokens)
    body = request.SerializeToString()
    return house.enqueue(house.op(OpKind.FORWARD_BACKWARD, run, seq, payload=body, media=PROTOBUF, cost=num_tokens))


def trained(root: Path, *pictures: bytes, dies: bool = False, inline_bytes: int = 8192) -> tuple[Any, list[bytes]]:
    """State and results of a run that looked at pictures in two passes; between them, maybe, its worker was lost."""
    with closing(House(root, inline_bytes=inline_bytes)) as house:
        run = house.create_run()
        ops = [look(house, run, 1, *pictures)]
        settle(house.worker())
        ops.append(look(house, run, 2, *reversed(pictures)))
        ops.append(house.optim_step(run, 3))
        if dies:
            house.worker().step()
        settle(house.worker())
        return house.state(run).tensors, [house.result(op) for op in ops]


@pytest.mark.parametrize("inline_bytes", [1 << 20, 100])
def test_a_run_that_is_computed_again_sees_the_same_pictures(tmp_path: Path, inline_bytes: int) -> None:
    pictures = png(), jpeg(seed=2)
    expected, results = trained(tmp_path / "a", *pictures)
    found, again = trained(tmp_path / "b", *pictures, dies=True, inline_bytes=inline_bytes)
    assert again[0] == results[0]
    for name, tensor in expected.items():
        assert np.array_equal(found[name], tensor)


def test_another_picture_trains_another_adapter(tmp_path: Path) -> None:
    (one, _), (other, _) = trained(tmp_path / "a", png()), trained(tmp_path / "b", png(seed=1))
    assert any(not np.array_equal(one[name], other[name]) for name in one)


def drawn(root: Path, picture: bytes, *, dies: bool = False) -> Any:
    with closing(House(root)) as house:
        sampler = house.sampler()
        image = {"type": "image", "data": base64.b64encode(picture).decode(), "format": "png", "expected_tokens": 4}
        chunks = [{"type": "encoded_text", "tokens": [1]}, image]
        body = encode_json({"prompt": {"chunks": chunks}, "sampling_params": {"max_tokens": 40}})
        op = house.enqueue(
            NewOp(
                tenant_id=house.tenant,
                kind=OpKind.SAMPLE,
                base_model=flow.BASE.name,
                id=flow._op_id(),
                seq_id=0,
                sampler_id=sampler,
                cost_tokens=45,
                payload=body,
                payload_bytes=len(body),
                meta=to_meta(SampleMeta(3, sampler, 1)),
            )
        )
        if dies:
            house.worker().step()
            assert not house.get(op).state.is_final
        settle(house.worker())
        return decode_sample_result(house.result(op)).sequences[0].tokens.tolist()


def test_a_sample_that_is_taken_again_sees_the_same_picture(tmp_path: Path) -> None:
    expected = drawn(tmp_path / "a", png())
    assert drawn(tmp_path / "b", png(), dies=True) == expected
    assert drawn(tmp_path / "c", png(seed=1)) != expected


def test_a_picture_that_the_base_no_longer_takes_fails_its_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(House(tmp_path)) as house:
        run = house.create_run()
        bad = look(house, run, 1, png())
        good = house.forward_backward(run, 2, [1, 2, 3])
        monkeypatch.setattr(flow, "BASE", replace(flow.BASE, vision=None))
        settle(house.worker())
        failure = house.get(bad).failure
        assert failure is not None
        assert (failure.category, failure.code) == ("user", "unsupported")
        assert house.result(good)
