"""The express lane gives the answers that the routes give, to the byte; what isn't plain goes to the routes."""

from __future__ import annotations

import asyncio
import errno
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import zstandard
from sqlalchemy import text

from tests.contract.conftest import BASE
from tests.contract.streams import Stream
from tests.paint import png
from tinsmith.api import auth
from tinsmith.api.express import Express
from tinsmith.files.blobs import Blobs
from tinsmith.ipc.bell import Ringer
from tinsmith.wire import wire_pb2 as pb

WITHIN_S = 10.0
OWN = {"x-request-id", "date"}


@dataclass
class Wire:
    """Two connections with one key: what goes by `fast` is plain, what goes by `slow` is not."""

    fast: Stream
    slow: Stream
    key: str
    taken: Counter[str]

    def ask(
        self, stream: Stream, path: str, body: bytes, media: str, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        odd = "te: trailers\r\n" if stream is self.slow else ""
        head = (
            f"Host: x\r\nX-API-Key: {self.key}\r\nContent-Type: {media}\r\nContent-Length: {len(body)}\r\n{more}{odd}"
        )
        stream.send(f"POST /api/v1/{path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        return read(stream)

    def both(self, path: str, body: bytes, media: str = "application/json", **headers: str) -> Any:
        """The answer that either way gives, which must be the same."""
        taken = self.taken[path]
        fast = self.ask(self.fast, path, body, media, **headers)
        assert self.taken[path] == taken + 1, "it came by the lane"
        slow = self.ask(self.slow, path, body, media, **headers)
        assert self.taken[path] == taken + 1, "and this one didn't"
        assert (fast[0], own(fast[1]), fast[2]) == (slow[0], own(slow[1]), slow[2])
        assert fast[1].keys() >= OWN
        return fast


def own(headers: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name not in OWN}


def read(stream: Stream) -> tuple[int, dict[str, str], bytes]:
    head = stream._until(b"\r\n\r\n", WITHIN_S)
    assert head is not None
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}
    body = b""
    while len(body) < int(headers["content-length"]):
        more = stream._sock.recv(int(headers["content-length"]) - len(body))
        assert more, "closed before the end of the answer"
        body += more
    return int(first.split()[1]), headers, body


@pytest.fixture
def wire(live: Any, house: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    taken: Counter[str] = Counter()
    answered = Express._answered

    async def counted(self: Express, request: Any, principal: Any) -> Any:
        found = await answered(self, request, principal)
        taken[request.path.decode().rpartition("/")[2]] += found is not None
        return found

    monkeypatch.setattr(Express, "_answered", counted)
    monkeypatch.setattr(auth, "TTL_S", 60.0)
    with Stream(live.url) as fast, Stream(live.url) as slow:
        made = Wire(fast, slow, house.key, taken)
        made.ask(slow, "retrieve_future", b"{}", "application/json")  # the key is known from now on
        yield made


@pytest.fixture
def run_id(api: Any, worker: Any) -> str:
    made = api.create(api.session())["model_id"]
    worker.step()
    return str(made)


def training(
    run_id: str, seq_id: int, *, loss: str = "cross_entropy", tokens: int = 4, picture: bytes | None = None
) -> bytes:
    request = pb.ForwardBackwardRequest(model_id=run_id, seq_id=seq_id, loss_fn=loss)
    datum = request.data.add()
    datum.model_input.add().encoded_text.tokens = np.arange(tokens, dtype="<i4").tobytes()
    if picture is not None:
        datum.model_input.add().image.data = picture
    target = datum.loss_fn_inputs["target_tokens"]
    target.dense, target.dtype = np.arange(tokens, dtype="<i8").tobytes(), pb.DT_I64
    target.shape.append(tokens)
    return request.SerializeToString()


def poll(request_id: str) -> bytes:
    return json.dumps({"request_id": request_id}).encode()


def test_a_step_goes_through_and_its_results_are_the_same_either_way(wire: Wire, run_id: str, worker: Any) -> None:
    status, _, body = wire.both("forward_backward", training(run_id, 1), "application/x-protobuf")
    passed = json.loads(body)
    assert (status, passed["model_id"]) == (200, run_id)
    step = json.dumps({"model_id": run_id, "seq_id": 2, "adam_params": {"learning_rate": 0.1}}).encode()
    stepped = json.loads(wire.both("optim_step", step)[2])
    worker.step()
    for promise in (passed, stepped):
        assert wire.both("retrieve_future", poll(promise["request_id"]))[0] == 200


def test_a_compressed_pass_is_the_same_pass(wire: Wire, run_id: str) -> None:
    plain = training(run_id, 1, tokens=40)
    promise = json.loads(wire.both("forward_backward", plain, "application/x-protobuf")[2])
    packed = zstandard.ZstdCompressor().compress(plain)
    again = wire.both("forward_backward", packed, "application/x-protobuf", **{"content-encoding": "zstd"})
    assert json.loads(again[2]) == promise


def test_mistakes_are_answered_alike(wire: Wire, run_id: str, worker: Any) -> None:
    media = "application/x-protobuf"
    assert wire.both("forward_backward", training("nobody:train:0", 1), media)[0] == 404
    assert wire.both("forward_backward", training(run_id, 10**9), media)[0] == 400
    assert wire.both("retrieve_future", poll("req-" + "0" * 32))[0] == 410
    assert wire.both("optim_step", json.dumps({"model_id": "nobody", "seq_id": 1}).encode())[0] == 404
    broken = zstandard.ZstdCompressor().compress(training(run_id, 1))[:-3]
    assert wire.both("forward_backward", broken, media, **{"content-encoding": "zstd"})[0] == 400
    for seq_id, (path, body, kind) in enumerate(
        (
            ("forward_backward", training(run_id, 1, loss="no such loss"), media),
            ("optim_step", json.dumps({"model_id": run_id, "seq_id": 2}).encode(), "application/json"),
        ),
        1,
    ):
        promise = json.loads(wire.both(path, body, kind)[2])
        failed = wire.both("retrieve_future", poll(promise["request_id"]))
        assert json.loads(failed[2])["category"] == "user", seq_id


def test_a_poll_that_ends_without_a_result_is_answered_alike(wire: Wire, run_id: str, house: Any) -> None:
    object.__setattr__(house.settings, "poll_hold_s", 0.1)
    promise = json.loads(wire.both("forward_backward", training(run_id, 1), "application/x-protobuf")[2])
    status, _, body = wire.both("retrieve_future", poll(promise["request_id"]))
    assert (status, json.loads(body)["type"]) == (408, "try_again")


def test_a_result_that_changed_in_its_row_is_not_handed_out(wire: Wire, run_id: str, worker: Any, house: Any) -> None:
    step = json.dumps({"model_id": run_id, "seq_id": 1, "adam_params": {"learning_rate": 0.1}}).encode()
    request_id = json.loads(wire.both("optim_step", step)[2])["request_id"]
    worker.step()
    assert wire.both("retrieve_future", poll(request_id))[0] == 200
    with house.store._database.write() as conn:
        changed = text("UPDATE ops SET result = result || x'20' WHERE op_id = :id")
        assert conn.execute(changed, {"id": request_id}).rowcount == 1
    status, _, body = wire.both("retrieve_future", poll(request_id))
    assert (status, json.loads(body)["category"]) == (200, "server")
    assert f"the result of {request_id} was changed" in json.loads(body)["error"]


def test_what_is_not_plain_goes_to_the_routes(wire: Wire, run_id: str, house: Any) -> None:
    taken = wire.taken.total()
    for path, body, media, headers in (
        ("retrieve_future", b"{", "application/json", {}),
        ("retrieve_future", poll("x"), "text/plain", {}),
        ("optim_step", b"[]", "application/json", {}),
        ("forward_backward", b"\xff\xff", "application/x-protobuf", {}),
        ("forward_backward", training(run_id, 1, loss="custom"), "application/x-protobuf", {}),
        ("forward_backward", training(run_id, 1), "application/x-protobuf", {"content-encoding": "br"}),
        ("forward_backward", training(run_id, 2, picture=png()), "application/x-protobuf", {}),
        ("create_session", b"{}", "application/json", {}),
    ):
        assert wire.ask(wire.fast, path, body, media, **headers)[0] in (200, 400, 410), path
    wire.key = "tml-wrong"
    assert wire.ask(wire.fast, "retrieve_future", poll("x"), "application/json")[0] == 401
    assert wire.taken.total() == taken


def test_what_names_samples_goes_to_the_routes_where_routes_are_replayed(wire: Wire, run_id: str, house: Any) -> None:
    """What they recorded is read from disk, which isn't for the event loop."""
    request = pb.ForwardBackwardRequest.FromString(training(run_id, 1))
    span = request.data[0].model_input_spans.add().sampled_tokens
    span.sequence_id, span.length = f"req-{'0' * 32}-0", 4
    body = request.SerializeToString()
    assert wire.ask(wire.fast, "forward_backward", body, "application/x-protobuf")[0] == 200
    assert wire.taken["forward_backward"] == 1
    object.__setattr__(house.services.settings, "router_replay", True)
    request.seq_id = 2
    assert wire.ask(wire.fast, "forward_backward", request.SerializeToString(), "application/x-protobuf")[0] == 200
    assert wire.taken["forward_backward"] == 1


def test_another_tenants_requests_are_nobodys(wire: Wire, run_id: str, house: Any) -> None:
    promise = json.loads(wire.both("forward_backward", training(run_id, 1), "application/x-protobuf")[2])
    wire.key = house.other_key
    wire.ask(wire.slow, "retrieve_future", b"{}", "application/json")
    assert wire.both("retrieve_future", poll(promise["request_id"]))[0] == 410
    assert wire.both("forward_backward", training(run_id, 2), "application/x-protobuf")[0] == 404


def test_requests_that_come_before_their_turn_are_answered_in_order(wire: Wire, run_id: str) -> None:
    requests = []
    for seq_id in range(1, 5):
        body = json.dumps({"model_id": run_id, "seq_id": seq_id, "adam_params": {}}).encode()
        head = f"Host: x\r\nX-API-Key: {wire.key}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        requests.append(f"POST /api/v1/optim_step HTTP/1.1\r\n{head}\r\n".encode() + body)
    wire.fast.send(requests[0])
    for request in requests[1:]:
        wire.fast.send(request[:30])
        time.sleep(0.01)
        wire.fast.send(request[30:])
    wire.fast.send(b"".join(requests))
    answers = [read(wire.fast) for _ in range(8)]
    assert [status for status, _, _ in answers] == [200] * 8
    ids = [json.loads(body)["request_id"] for _, _, body in answers]
    assert ids[:4] == ids[4:]
    assert len(set(ids)) == 4


def test_a_request_id_of_the_clients_is_kept(wire: Wire) -> None:
    headers = wire.both("retrieve_future", poll("req-" + "0" * 32), **{"x-request-id": "mine-1"})[1]
    assert headers["x-request-id"] == "mine-1"


def test_a_stopping_server_ends_a_poll_and_says_so(wire: Wire, run_id: str, live: Any) -> None:
    promise = json.loads(wire.both("forward_backward", training(run_id, 1), "application/x-protobuf")[2])
    body = poll(promise["request_id"])
    head = f"Host: x\r\nX-API-Key: {wire.key}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    wire.fast.send(f"POST /api/v1/retrieve_future HTTP/1.1\r\n{head}\r\n".encode() + body)
    time.sleep(0.2)
    live.server.should_exit = True
    status, headers, _ = read(wire.fast)
    assert (status, headers["connection"]) == (408, "close")
    assert wire.fast.is_closed(WITHIN_S)


def test_the_worker_is_rung_after_the_answer_and_once_a_turn(house: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(Ringer, "ring", lambda self, note: order.append("ring"))

    async def scenario() -> None:
        for _ in range(3):
            house.services.ring(BASE)
        order.append("answer")
        await asyncio.sleep(0)
        house.services.ring(BASE)
        await asyncio.sleep(0)

    asyncio.run(scenario())
    assert order == ["answer", "ring", "ring"]


def test_a_lack_of_the_machine_is_said_alike(wire: Wire, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk under payload files is no fault of the server's that a client can't understand."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Blobs, "put", full)
    body = training(run_id, 1, tokens=1000)
    status, headers, answer = wire.both("forward_backward", body, "application/x-protobuf")
    assert (status, json.loads(answer)["code"]) == (503, "storage_full")
    assert "retry-after" in headers
