"""Custom losses from the upload to the op that uses one, over the API with a hand-driven worker."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from litestar.testing import TestClient

from tests.contract.conftest import Api, House
from tests.contract.routes import custom_loss
from tinsmith.api.app import build_app
from tinsmith.api.losses import MAX_LOSSES
from tinsmith.types import OpKind
from tinsmith.upkeep.janitor import sweep
from tinsmith.wire import wire_pb2 as pb
from tinsmith.wire.custom_loss import MAX_BYTES

DAY = 86400.0


def upload(api: Api, session: str, seq: int = 0, **changes: Any) -> Any:
    return api.result(api.post("/create_custom_loss", {**custom_loss(session, seq), **changes}))


def train(api: Api, run_id: str, seq: int, loss_id: Any, num_targets: int = 0, **inputs: Any) -> Any:
    message = pb.ForwardBackwardRequest(model_id=run_id, seq_id=seq, loss_fn="custom")
    if isinstance(loss_id, str):
        message.loss_fn_config_v2["loss_id"].text = loss_id
    elif loss_id is not None:
        message.loss_fn_config["loss_id"] = loss_id
    datum = message.data.add()
    datum.model_input.add().encoded_text.tokens = np.ones(3, "<i4").tobytes()
    shape = (3, num_targets) if num_targets else (3,)
    arrays = {"target_tokens": np.ones(shape, np.int64), **inputs}
    for name, array in arrays.items():
        tensor = datum.loss_fn_inputs[name]
        tensor.dense = array.tobytes()
        tensor.dtype = pb.DT_I64 if array.dtype == np.int64 else pb.DT_F32
        tensor.shape.extend(array.shape)
    body = message.SerializeToString()
    return api.call("POST", "/forward_backward", 200, content=body, headers={"Content-Type": "application/x-protobuf"})


def failure(api: Api, promise: Any) -> str:
    answer = api.result(promise)
    assert answer["category"] == "user", answer
    return str(answer["error"])


@pytest.fixture
def session(api: Api) -> str:
    return api.session()


@pytest.fixture
def run_id(api: Api, session: str, worker: Any) -> str:
    promise = api.create(session)
    worker.step()
    return str(promise["model_id"])


def test_an_upload_and_the_op_that_uses_it(api: Api, house: House, session: str, run_id: str, worker: Any) -> None:
    made = upload(api, session)
    assert made == {"type": "create_custom_loss", "loss_id": f"{session}:loss:0"}
    promise = train(api, run_id, 1, made["loss_id"])
    worker.step()
    op = worker.seen[-1]
    assert (op.id, op.kind) == (promise["request_id"], OpKind.FORWARD_BACKWARD)
    assert op.meta["loss_id"] == made["loss_id"]
    assert b"logprobs" in house.blobs.get(op.meta["blob"])


def test_an_upload_that_is_sent_twice_is_one(api: Api, house: House, session: str) -> None:
    first = api.post("/create_custom_loss", custom_loss(session))
    assert api.post("/create_custom_loss", custom_loss(session)) == first
    files = list((house.settings.data_dir / "blobs").rglob("losses/*"))
    assert len(files) == 1
    assert upload(api, session, 1)["loss_id"] == f"{session}:loss:1"


def test_a_bad_upload_fails_its_future_and_takes_its_number(api: Api, session: str, house: House) -> None:
    for _ in range(2):
        answer = upload(api, session, inputs=[])
        assert (answer["code"], answer["category"]) == ("invalid_request", "user")
        assert "the first input must be logprobs" in answer["error"]
    answer = upload(api, session, 1, name="x" * MAX_BYTES)
    assert answer["code"] == "too_large"
    assert not list((house.settings.data_dir / "blobs").rglob("losses/*"))


def test_uploads_without_an_address_or_a_session(api: Api, session: str) -> None:
    api.post("/create_custom_loss", {"session_id": session}, 400)
    api.post("/create_custom_loss", custom_loss("s0"), 404)
    api.post(f"/sessions/{session}/finish", {})
    assert api.post("/create_custom_loss", custom_loss(session), 410)["code"] == "gone"


def test_a_session_holds_a_bounded_number(api: Api, session: str) -> None:
    for seq in range(MAX_LOSSES):
        api.post("/create_custom_loss", custom_loss(session, seq))
    assert "at most 256 custom losses" in upload(api, session, MAX_LOSSES)["error"]


@pytest.mark.parametrize(
    ("loss_id", "options", "words"),
    [
        (None, {}, "takes the setting loss_id alone"),
        (3.0, {}, "takes the setting loss_id alone"),
        ("s0:loss:0", {}, "no custom loss 's0:loss:0' in session"),
        ("", {"num_targets": 2}, "datum 0: target_tokens has shape [3, 2], the custom loss 'mean' declared rank 1"),
        ("", {"target_tokens": np.ones(3, np.float32)}, "must be int64"),
        ("", {"target_tokens": np.ones(2, np.int64)}, "one target a token"),
    ],
)
def test_requests_that_do_not_fit_their_loss(
    api: Api, session: str, run_id: str, loss_id: Any, options: Any, words: str
) -> None:
    made = upload(api, session)["loss_id"]
    assert words in failure(api, train(api, run_id, 1, made if loss_id == "" else loss_id, **options))


def test_inputs_have_the_declared_rank(api: Api, session: str, run_id: str, worker: Any) -> None:
    body = custom_loss(session)
    nodes = body["graph"]["nodes"]
    nodes.insert(1, {"op": "placeholder", "name": "beta", "target": "beta"})
    nodes.insert(2, {"op": "placeholder", "name": "mask", "target": "mask"})
    inputs = [*body["inputs"], {"name": "beta", "rank": 0}, {"name": "mask", "rank": 1}]
    made = upload(api, session, inputs=inputs, graph=body["graph"])["loss_id"]
    beta, mask = np.array(0.5, np.float32), np.ones(5, np.int64)
    assert "needs the input mask" in failure(api, train(api, run_id, 1, made, beta=beta))
    wide = train(api, run_id, 2, made, beta=np.ones(2, np.float32), mask=mask)
    assert "beta has shape [2], the custom loss 'mean' declared rank 0" in failure(api, wide)
    good = train(api, run_id, 3, made, beta=beta, mask=mask, weights=np.full(3, np.nan, np.float32))
    worker.step()
    assert worker.seen[-1].id == good["request_id"]


def test_a_loss_belongs_to_its_session(api: Api, other: Api, session: str, run_id: str, worker: Any) -> None:
    """Of a tenant's other sessions as of other tenants: it isn't there."""
    theirs = upload(api, api.session())["loss_id"]
    foreign = upload(other, other.session())["loss_id"]
    for seq, loss_id in enumerate((theirs, foreign), start=1):
        assert failure(api, train(api, run_id, seq, loss_id)) == f"no custom loss '{loss_id}' in session {session}"


def test_a_file_stays_while_an_op_may_need_it(api: Api, house: House, session: str, run_id: str, worker: Any) -> None:
    """The session has ended, its losses are gone; a replay still finds the graph, until a snapshot covers the op."""
    made = upload(api, session)["loss_id"]
    train(api, run_id, 1, made)
    worker.step()
    blob = worker.seen[-1].meta["blob"]
    api.post(f"/sessions/{session}/finish", {})
    later = time.time() + 2 * DAY
    sweep(house.store, house.blobs, house.settings, later)
    sweep(house.store, house.blobs, house.settings, later + DAY)
    assert "no custom loss" in failure(api, train(api, run_id, 2, made))
    assert house.blobs.exists(blob)
    (replayed,) = [op for op in house.store.ops.replayable(run_id, 0) if op.kind is OpKind.FORWARD_BACKWARD]
    assert replayed.meta["blob"] == blob
    me = worker._me
    for seq in (1, 2):  # without the newest snapshot the run is computed again from the one before
        assert house.blobs.exists(blob)
        house.store.runs.record_snapshot(me, run_id, seq, f"tenants/{house.tenant_id}/snapshots/{seq}", 1, later)
        sweep(house.store, house.blobs, house.settings, later + DAY)
    sweep(house.store, house.blobs, house.settings, later + 2 * DAY)
    assert not house.blobs.exists(blob)


def test_turned_off(make_house: Any) -> None:
    house = make_house(custom_losses=False)
    with TestClient(build_app(house.services)) as client:
        api = Api(client, house.key)
        assert api.post("/client/config", {"sdk_version": "0.38.0"})["custom_loss_server_side"] is False
        session = api.session()
        answer = upload(api, session)
        assert answer["code"] == "unsupported"
        assert "--no-custom-losses" in answer["error"]
        worker = house.make_worker()
        run_id = api.create(session)["model_id"]
        worker.step()
        assert "--no-custom-losses" in failure(api, train(api, run_id, 1, f"{session}:loss:0"))


def test_turned_on_by_default(api: Api) -> None:
    assert api.post("/client/config", {"sdk_version": "0.38.0"})["custom_loss_server_side"] is True
