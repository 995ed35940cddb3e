"""Lines of the log say whose request it was and which run's, and never what was in it or with which key it came."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from litestar.testing import TestClient

from tests.contract.conftest import House as ApiHouse
from tests.flow.house import House, settle
from tinsmith.api.app import build_app, with_edge
from tinsmith.config import Settings
from tinsmith.observe import logs as observe
from tinsmith.worker.watch import MAX_IDS, about

SECRET_TOKENS = [31337, 27182, 16180]
SECRET_TEXT = "the eagle has landed"


@pytest.fixture
def lines() -> Iterator[Any]:
    """A call that gives all lines until now, as JSON, at the level of debug."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    structlog.reset_defaults()
    stream = io.StringIO()
    observe.configure(Settings(log_format="json", log_level="debug"), "test", stream)
    structlog.configure(cache_logger_on_first_use=False)  # other tests of this process look at the same loggers
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:], level = before[0], before[1]
    root.setLevel(level)
    structlog.reset_defaults()


def test_a_request_says_who_asked_and_what_it_became(house: ApiHouse, lines: Any, worker: Any) -> None:
    with TestClient(with_edge(build_app(house.services))) as client:
        client.headers.update({"X-API-Key": house.key, "X-Request-Id": "mine"})
        session = client.post(
            "/api/v1/create_session", json={"tags": [], "user_metadata": {}, "sdk_version": "0"}
        ).json()
        body = {"session_id": session["session_id"], "model_seq_id": 0, "base_model": "tinsmith/tiny"}
        made = client.post("/api/v1/create_model", json=body).json()
        body = {"session_id": session["session_id"], "sampling_session_seq_id": 0, "base_model": "tinsmith/tiny"}
        sampler = client.post("/api/v1/create_sampling_session", json=body).json()["sampling_session_id"]
        prompt = {"chunks": [{"type": "encoded_text", "tokens": SECRET_TOKENS}]}
        body = {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt, "sampling_params": {"max_tokens": 2}}
        client.post("/api/v1/asample", json=body)
        client.post("/oai/api/v1/completions", json={"model": "no such", "prompt": SECRET_TEXT, "max_tokens": 1})
        client.post("/api/v1/asample", content=SECRET_TEXT.encode(), headers={"X-Other": house.key})
        client.get("/api/v1/healthz")
    told = {line["path"]: line for line in lines() if line["event"] == "request"}
    line = told["/api/v1/create_model"]
    assert (line["request_id"], line["tenant"], line["op_id"]) == ("mine", "alice", made["request_id"])
    assert (line["run_id"], line["kind"], line["process"]) == (made["model_id"], "create", "test")
    assert line["tenant_id"]
    assert "op_id" not in told["/api/v1/healthz"]
    text = json.dumps(lines())
    assert not [secret for secret in (*map(str, SECRET_TOKENS), SECRET_TEXT, house.key) if secret in text]


def test_a_worker_says_of_what_it_speaks(tmp_path: Path, lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(tmp_path)
    worker = house.worker()
    run = house.create_run()
    settle(worker)

    def fail(items: Any) -> Any:
        raise RuntimeError("the engine broke")

    monkeypatch.setattr(house.engine, "start_pass", fail)
    op = house.forward_backward(run, 1, [31, 33, 37])
    settle(worker)
    (line,) = [line for line in lines() if line["event"] == "batch failed"]
    assert (line["op_id"], line["run_id"], line["tenant_id"]) == (op.id, run, house.tenant)
    assert (line["seq_id"], line["kind"]) == (1, "forward_backward")
    assert "the engine broke" in line["exception"]
    monkeypatch.undo()
    house.optim_step(run, 2)
    settle(worker)
    worker.close()
    (line,) = [line for line in lines() if line["event"] == "run snapshotted"]
    assert (line["run_id"], line["tenant_id"]) == (run, house.tenant)
    house.close()


def test_of_many_requests_some_are_named(tmp_path: Path) -> None:
    house = House(tmp_path)
    ops = [house.forward_backward(house.create_run(), 1, [1, 2]) for _ in range(MAX_IDS + 3)]
    said = about(ops)
    assert said["ops"] == MAX_IDS + 3
    assert said["op_ids"] == [op.id for op in ops[:MAX_IDS]]
    assert said["tenant_ids"] == [house.tenant]
    house.close()
