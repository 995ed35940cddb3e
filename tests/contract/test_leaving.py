"""Who leaves has given up: clients of compatible endpoints, and sessions that end, cancel what they asked for."""

from __future__ import annotations

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.contract.answers import TOKENIZER, Answers
from tests.contract.raw import PROTOBUF
from tests.contract.routes import training
from tests.contract.streams import Stream
from tests.service import until
from tinsmith.api.waiters import Waiters
from tinsmith.store.rows import OpRow
from tinsmith.types import OpId
from tinsmith.upkeep.janitor import sweep

BASE = "tinsmith/tiny"
USER = {"role": "user", "content": "Tell me a story."}
BODIES: dict[str, dict[str, Any]] = {
    "/oai/api/v1/chat/completions": {"model": BASE, "messages": [USER]},
    "/oai/api/v1/completions": {"model": BASE, "prompt": ["Once", "There"], "max_tokens": 50},
    "/anthropic/api/v1/messages": {"model": BASE, "messages": [USER], "max_tokens": 50},
}
SAMPLE = {"prompt": {"chunks": [{"tokens": [1]}]}, "sampling_params": {"max_tokens": 5}}
WITHIN_S = 10.0


def begin(url: str, key: str, path: str, **changes: Any) -> Stream:
    """A connection on which the request was sent."""
    content = json.dumps({**BODIES[path], **changes}).encode()
    stream = Stream(url)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\nContent-Length: {len(content)}\r\n\r\n"
    stream.send(head.encode() + content)
    return stream


def states(data_dir: Path) -> list[str]:
    """Of the sample requests that there are."""
    with closing(sqlite3.connect(data_dir / "tinsmith.db")) as database:
        return [state for (state,) in database.execute("SELECT state FROM ops WHERE kind = 'sample' ORDER BY num")]


def become(data_dir: Path, *expected: str) -> None:
    until(lambda: states(data_dir) == [*expected], WITHIN_S, lambda: str(states(data_dir)))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
def test_a_client_that_leaves_while_it_waits(house: Any, live: Any, worker: Any, path: str, stream: bool) -> None:
    data_dir = house.settings.data_dir
    num = 2 if path.endswith("/completions") and "chat" not in path else 1
    with begin(live.url, house.key, path, stream=stream):
        become(data_dir, *["queued"] * num)
    become(data_dir, *["cancelled"] * num)
    assert worker.step() == 0
    until(lambda: not house.services.pieces.num_followed, WITHIN_S)
    assert house.services.waiters.num_waiting == 0


@pytest.mark.parametrize("odd", ["", "te: trailers\r\n"], ids=["express", "routes"])
def test_a_poll_ends_with_its_connection(
    house: Any, api: Any, live: Any, monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    """Else whoever asks and leaves has the server hold polls for nobody, as many as it can ask for in a hold."""
    run_id = api.create(api.session())["model_id"]
    path, headers = "/forward_backward", {"content-type": PROTOBUF}
    early = api.call("POST", path, 200, content=training(run_id, 7), headers=headers)["request_id"]
    body = json.dumps({"request_id": early})
    head = (
        f"Host: x\r\nX-API-Key: {house.key}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{odd}"
    )
    waiters, hold = live.server._waiters, Waiters.hold
    monkeypatch.setattr(Waiters, "hold", lambda self, future, _: hold(self, future, 60.0))
    for _ in range(2):  # the second one's key is known
        with Stream(live.url) as stream:
            stream.send(f"POST /api/v1/retrieve_future HTTP/1.1\r\n{head}\r\n{body}".encode())
            until(lambda: waiters.num_waiting == 1, WITHIN_S)
        until(lambda: waiters.num_waiting == 0, WITHIN_S)


@pytest.mark.parametrize("path", BODIES)
def test_a_client_that_leaves_in_the_middle(house: Any, live: Any, path: str) -> None:
    """Of a stream whose first pieces it has read; what the worker makes of it later is dropped, and nothing metered."""
    worker = house.make_worker()
    ops: list[OpRow] = []

    class Halfway(Answers):
        def _outcome(self, op: OpRow) -> Any:
            self.pieces = [TOKENIZER.encode("Once upon a time there was a fox.")]
            self._tell(op.id)
            ops.append(op)
            until(lambda: "running" not in states(house.settings.data_dir), WITHIN_S)
            return super()._outcome(op)

    one = {"prompt": "Once"} if "prompt" in BODIES[path] else {}
    with begin(live.url, house.key, path, stream=True, **one) as stream:
        Halfway(house, worker)
        until(lambda: b"fox" in stream.bytes(), WITHIN_S)
    become(house.settings.data_dir, "cancelled")
    until(lambda: len(worker.seen) == 1, WITHIN_S)
    op = house.store.ops.get(house.tenant_id, ops[0].id)
    assert (op.state, op.result) == ("cancelled", None)
    assert house.store.ledger.usage(None, 0, 2**40, 100) == []


@pytest.fixture
def busy(api: Any, worker: Any) -> dict[str, Any]:
    """A session with a run, training that waits, a sample that waits and one that runs."""
    session = api.session()
    run = api.create(session)["model_id"]
    worker.step()
    made = {"session_id": session, "sampling_session_seq_id": 0, "base_model": BASE}
    sampler = api.post("/create_sampling_session", made)["sampling_session_id"]
    running, waiting = (
        api.post("/asample", {"sampling_session_id": sampler, "seq_id": seq, **SAMPLE})["request_id"] for seq in (1, 2)
    )
    assert worker._store.ops.claim(worker._me, [OpId(running)], time.time())
    body = training(run, 1)
    trained = api.call("POST", "/forward_backward", 200, content=body, headers={"content-type": PROTOBUF})
    step = api.post("/optim_step", {"model_id": run, "seq_id": 2, "adam_params": {}})
    return {"session": session, "sampler": sampler, "samples": [running, waiting], "training": [trained, step]}


def end_by_finish(house: Any, api: Any, session: str) -> None:
    api.post(f"/sessions/{session}/finish", {"reason": {"type": "success"}})


def end_by_silence(house: Any, api: Any, session: str) -> None:
    swept = sweep(house.store, house.blobs, house.settings, time.time() + house.settings.session_timeout_s + 1)
    assert swept.num_sessions == 1


@pytest.mark.parametrize("end", [end_by_finish, end_by_silence])
def test_a_session_that_ends(house: Any, api: Any, worker: Any, busy: dict[str, Any], end: Any) -> None:
    """Its samples are cancelled and cost nothing; training that was acknowledged is carried out."""
    end(house, api, busy["session"])
    assert states(house.settings.data_dir) == ["cancelled", "cancelled"]
    for op_id in busy["samples"]:
        failed = api.post("/retrieve_future", {"request_id": op_id})
        assert (failed["code"], failed["category"]) == ("cancelled", "user")
        assert "session" in failed["error"]
    while worker.step():
        pass
    assert [op.kind for op in worker.seen][1:] == ["forward_backward", "optim_step"]
    for promise in busy["training"]:
        op = house.store.ops.get(house.tenant_id, promise["request_id"])
        assert op.state == "done"
    kinds = {row.kind for row in house.store.ledger.usage(None, 0, 2**40, 100)}
    assert not any("sampl" in str(kind) for kind in kinds)


def test_a_second_end_cancels_nothing(house: Any, api: Any, worker: Any, busy: dict[str, Any]) -> None:
    """A copy of the client in another process may go on with the sampler; what it asks for later is computed."""
    end_by_finish(house, api, busy["session"])
    later = api.post("/asample", {"sampling_session_id": busy["sampler"], "seq_id": 9, **SAMPLE})
    end_by_finish(house, api, busy["session"])
    worker.step()
    assert house.store.ops.get(house.tenant_id, later["request_id"]).state == "done"


def test_waiting_for_an_answer_keeps_the_session(house: Any, live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinsmith.api.texts.asking.TICK_S", 0.1)
    object.__setattr__(house.settings, "session_timeout_s", 0.8)
    with begin(live.url, house.key, "/oai/api/v1/chat/completions"):
        become(house.settings.data_dir, "queued")
        for _ in range(8):
            time.sleep(0.3)
            sweep(house.store, house.blobs, house.settings, time.time())
        assert states(house.settings.data_dir) == ["queued"]
    become(house.settings.data_dir, "cancelled")
