"""What bodies may cost: bounds by route, bytes held at one time, and nobody waits for another tenant's large ones."""

from __future__ import annotations

from typing import Any

import pytest
import zstandard

from tests.contract.raw import PROTOBUF
from tests.contract.routes import closed_routes, concrete
from tinsmith.api.body import PLAIN_BYTES, TOKENS_BYTES
from tinsmith.api.client import TELEMETRY_BYTES
from tinsmith.api.intake import Budget
from tinsmith.api.texts.fields import MAX_BODY_BYTES as TEXT_BYTES
from tinsmith.errors import CapacityError, StorageFullError, TooLargeError
from tinsmith.types import TenantId
from tinsmith.wire import wire_pb2 as pb
from tinsmith.wire.media import MAX_SLOW_BYTES

MIB = 2**20
ZSTD = {"content-encoding": "zstd"}
A, B = TenantId("a"), TenantId("b")
TAKES = {"POST /asample": TOKENS_BYTES, "POST /telemetry": TELEMETRY_BYTES}
WITH_BODY = [r for r in closed_routes() if r.startswith(("POST", "PUT")) and not r.endswith("/publish")]
BY_SETTINGS = ("POST /forward_backward", "POST /import_weights")
INFLATES = [
    f"POST /{name}" for name in ("create_model", "optim_step", "save_weights", "load_weights", "asample", "telemetry")
]


def pack(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize("route", [route for route in WITH_BODY if route not in BY_SETTINGS])
def test_each_route_takes_what_its_requests_need(api: Any, route: str) -> None:
    method, path = concrete(route)
    is_compatible = path.startswith(("/oai/", "/anthropic/"))
    path = path if is_compatible else f"/api/v1{path}"
    most = TEXT_BYTES if is_compatible else TAKES.get(route, PLAIN_BYTES)
    small, large = (b'{"x": "' + b"x" * size + b'"}' for size in (most - 20, most + 1))
    assert api.raw(method, path, content=small).status_code != 413
    refused = api.raw(method, path, content=large)
    assert refused.status_code == 413
    if not is_compatible:
        assert refused.json()["code"] == "too_large"
    if route in INFLATES:
        assert api.raw(method, path, content=pack(small), headers=ZSTD).status_code != 413
        assert api.raw(method, path, content=pack(large), headers=ZSTD).status_code == 413


def test_numbers_that_json_lacks_are_read_in_small_bodies_alone(api: Any) -> None:
    for size, words in ((3000, "user_metadata holds"), (MAX_SLOW_BYTES // 4, "no NaN")):
        body = b'{"user_metadata": {"a": [' + b"NaN," * size + b"1]}}"
        refused = api.raw("POST", "/api/v1/create_session", content=body)
        assert refused.status_code == 400
        assert words in refused.json()["detail"]


def test_too_many_datums_take_their_number(api: Any, worker: Any) -> None:
    run_id = api.create(api.session())["model_id"]
    head = pb.ForwardBackwardRequest(model_id=run_id, seq_id=1, loss_fn="cross_entropy").SerializeToString()
    body = pack(head + b"\x1a\x00" * MIB)
    promise = api.call("POST", "/forward_backward", 200, content=body, headers={**ZSTD, "content-type": PROTOBUF})
    failed = api.result(promise)
    assert failed["code"] == "too_large"
    assert "65536 datums" in failed["error"]
    worker.step()
    step = api.post("/optim_step", {"model_id": run_id, "seq_id": 2, "adam_params": {}})
    worker.step()
    assert "metrics" in api.result(step)


def test_the_budget_is_for_each_tenant_and_for_all() -> None:
    budget = Budget(max_bytes=100, max_tenant_bytes=40)
    budget.take(A, 30, 0)
    with pytest.raises(CapacityError, match="your requests under way hold 30 bytes"):
        budget.take(A, 11, 0)
    budget.take(A, 30, 30)  # what A holds is this request's own
    budget.take(B, 40, 0)
    with pytest.raises(CapacityError, match="too many large requests"):
        budget.take(TenantId("c"), 1, 0)
    budget.give_back(A, 60)
    budget.take(TenantId("c"), 1, 0)
    budget.give_back(B, 40)
    budget.give_back(TenantId("c"), 1)
    assert budget.num_bytes == 0
    with pytest.raises(TooLargeError, match="this request would hold 101 bytes"):
        budget.take(A, 61, 40)  # which no waiting would change


@pytest.mark.parametrize(
    ("seq_id", "status"), [(100_000, 200), (100_001, 400), (2_000_000_000, 400)], ids=["near", "far", "very far"]
)
def test_a_seq_id_far_ahead_is_refused(api: Any, worker: Any, seq_id: int, status: int) -> None:
    run_id = api.create(api.session())["model_id"]
    answer = api.post("/optim_step", {"model_id": run_id, "seq_id": seq_id, "adam_params": {}}, status)
    if status == 400:
        assert "the next is 1" in answer["detail"]
    head = pb.ForwardBackwardRequest(model_id=run_id, seq_id=seq_id, loss_fn="cross_entropy").SerializeToString()
    assert api.raw("POST", "/api/v1/forward_backward", content=head).status_code == status


def test_messages_repeat_little_of_what_was_sent(api: Any, worker: Any) -> None:
    long = "x" * 100_000
    run_id = api.create(api.session())["model_id"]
    sampler = api.post(
        "/create_sampling_session",
        {"session_id": api.session(), "sampling_session_seq_id": 0, "base_model": "tinsmith/tiny"},
    )["sampling_session_id"]
    chunks = {"prompt": {"chunks": [{"type": long}]}, "sampling_params": {}}
    for path, body in (
        ("/weights_info", {"tinker_path": long}),
        ("/weights_info", {"tinker_path": f"tinker://{long}/weights/a"}),
        ("/weights_info", {"tinker_path": f"tinker://a/weights/{long}"}),
        ("/load_weights", {"model_id": run_id, "seq_id": 1, "path": long}),
        ("/optim_step", {"model_id": run_id, "seq_id": 2, "optimizer_params": {"type": long}}),
        ("/asample", {"sampling_session_id": sampler, "seq_id": 0, **chunks}),
        (f"/{long[:40_000]}", {}),
    ):
        response = api.raw("POST", f"/api/v1{path}", json=body)
        answer = response.json()
        message = answer["detail"] if response.status_code >= 400 else api.result(answer)["error"]
        assert len(message) < 500, message[:1000]


def test_a_full_disk_is_said_so(api: Any, house: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise StorageFullError("the disk is full: free space, then send the request again")

    monkeypatch.setattr(type(house.store.sessions), "create", fail)
    refused = api.raw("POST", "/api/v1/create_session", json={})
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    assert refused.json()["code"] == "storage_full"
    assert refused.json()["category"] == "capacity"
