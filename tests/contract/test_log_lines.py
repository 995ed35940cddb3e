"""Lines of the log say whose request it was and which run's, and never what was in it or with which key it came."""

from __future__ import annotations

import io
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import structlog
from litestar.testing import TestClient

from tests.contract.conftest import Api
from tests.contract.conftest import House as ApiHouse
from tests.contract.raw import Raw
from tests.contract.standing import standing
from tests.contract.streams import Stream
from tests.contract.test_express import Wire, poll, training
from tests.contract.test_quotas import sample
from tests.contract.test_refusals import counted
from tests.flow.house import House, settle
from tests.unit.test_metrics import samples as samples_of
from tinsmith.api import app, auth
from tinsmith.api.app import build_app, with_edge
from tinsmith.api.unpolled import give_up_unpolled
from tinsmith.config import Settings
from tinsmith.errors import FencedError, StorageFullError
from tinsmith.observe import logs as observe
from tinsmith.observe.about import MAX_IDS, about
from tinsmith.types import Failure
from tinsmith.worker import recorder, samples
from tinsmith.worker.barriers import Barriers
from tinsmith.worker.outcomes import failed
from tinsmith.worker.passes import OpenPass
from tinsmith.worker.postponed import Postponed
from tinsmith.worker.samples import Samples
from tinsmith.worker.watchdog import Watchdog

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
    sampler = house.sampler()
    said = about([house.sample(sampler, seq) for seq in range(2)])
    assert said["sampler_ids"] == [sampler]
    assert "run_ids" not in said
    house.close()


def test_the_express_lane_says_who_asked_and_what_it_became(
    tmp_path: Path, lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass, a step and a poll of each, none of which the routes see."""
    monkeypatch.setattr(auth, "TTL_S", 60.0)
    by_routes: list[str] = []
    monkeypatch.setattr(app, "log_request", lambda method, path, *_: by_routes.append(path))  # and leave no line
    with standing(tmp_path) as (house, url), closing(Raw(url, house.key)) as raw:
        run_id = raw.run(raw.session()).run_id
        by_routes.clear()
        with Stream(url) as fast, Stream(url) as slow:
            wire = Wire(fast, slow, house.key, Counter())

            def ask(path: str, body: bytes, request_id: str, media: str = "application/json") -> bytes:
                status, _, answer = wire.ask(fast, path, body, media, **{"x-request-id": request_id})
                assert status == 200
                return answer

            passed = ask("forward_backward", training(run_id, 1), "one", "application/x-protobuf")
            step = {"model_id": run_id, "seq_id": 2, "adam_params": {}}
            ids = [
                json.loads(each)["request_id"] for each in (passed, ask("optim_step", json.dumps(step).encode(), "two"))
            ]
            for op_id in ids:
                ask("retrieve_future", poll(op_id), "three")
    assert by_routes == []
    told = [line for line in lines() if line["event"] == "request" and line["request_id"] in ("one", "two", "three")]
    whose = {"tenant": "alice", "tenant_id": house.tenant_id, "run_id": run_id, "process": "test"}
    assert all(line.items() >= whose.items() for line in told)
    assert [(line["path"].rpartition("/")[2], line["request_id"], line["kind"], line["op_id"]) for line in told] == [
        ("forward_backward", "one", "forward_backward", ids[0]),
        ("optim_step", "two", "optim_step", ids[1]),
        ("retrieve_future", "three", "forward_backward", ids[0]),
        ("retrieve_future", "three", "optim_step", ids[1]),
    ]


def test_what_cannot_be_recorded_is_named(tmp_path: Path, lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is tried again, and where the worker ends by it."""
    monkeypatch.setattr(recorder, "STORAGE_RETRY_S", 0.0)
    with closing(House(tmp_path)) as house:
        worker = house.worker()
        run = house.create_run()
        settle(worker)
        op = house.forward_backward(run, 1, [31, 33, 37])
        errors = [StorageFullError("full"), FencedError("taken")]

        def fail(*_: Any) -> None:
            raise errors.pop(0)

        monkeypatch.setattr(type(house.store.ops), "finish", fail)
        worker._recorder.start(lambda: None)
        worker._recorder.record([failed(op, Failure("internal", "server", "it is as good as any"))])
        with pytest.raises(FencedError):
            worker._recorder.flush()
        worker._recorder.stop()
    where = {"op_id": op.id, "run_id": run, "tenant_id": house.tenant, "kind": "forward_backward"}
    told = {line["event"]: line for line in lines() if line["level"] == "error"}
    assert told["outcomes can't be recorded; trying again"].items() >= where.items()
    assert told["outcomes were not recorded; the worker ends"].items() >= where.items()


def test_a_sample_that_fails_by_itself_is_named(tmp_path: Path, lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(result: Any) -> bytes:
        raise ValueError("too long")

    monkeypatch.setattr(samples, "encode_sample_result", fail)
    with closing(House(tmp_path)) as house:
        worker, sampler = house.worker(), house.sampler()
        op = house.sample(sampler, 0)
        settle(worker)
        failure = house.get(op).failure
    assert failure is not None
    (line,) = [line for line in lines() if line["event"] == "a sample's result could not be written"]
    assert line.items() >= {"op_id": op.id, "sampler_id": sampler, "tenant_id": house.tenant}.items()


def test_a_run_that_waits_for_memory_is_named(tmp_path: Path, lines: Any) -> None:
    with closing(House(tmp_path)) as house:
        run = house.create_run()
        op = house.forward_backward(run, 1, [1, 2])
        Postponed().add(run, op, Failure("no_memory", "server", "none is left"))
    (line,) = lines()
    assert line.items() >= {"op_id": op.id, "run_id": run, "tenant_id": house.tenant}.items()


def test_samples_that_nobody_asked_for_are_named(house: ApiHouse, lines: Any) -> None:
    with TestClient(with_edge(build_app(house.services))) as client:
        api = Api(client, house.key)
        op_id = sample(api, api.session(), 0)["request_id"]
    house.services.polls._started -= 1e4
    house.services.polls._samples.clear()
    house.services.polls._samplers.clear()
    with counted() as counting:
        assert give_up_unpolled(house.services, time.time() + 1e4) == 1
        assert give_up_unpolled(house.services, time.time() + 1e4) == 0
        assert samples_of(counting.text())["tinsmith_ops_total", ("sample", "cancelled")] == 1
    (line,) = [line for line in lines() if line["event"] == "samples that nobody asked for were cancelled"]
    assert (line["op_id"], line["tenant_id"]) == (op_id, house.tenant_id)
    assert line["sampler_id"]


def test_what_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save, a pass or a step of the sampler, while the loop is at it; and nobody afterwards."""
    dog, at = Watchdog(), {}
    with closing(House(tmp_path)) as house:
        worker = house.worker()
        monkeypatch.setattr(worker, "_watchdog", dog)
        run, sampler = house.create_run(), house.sampler()
        settle(worker)
        for of, name in ((Barriers, "carry_out"), (OpenPass, "advance"), (Samples, "step")):
            monkeypatch.setattr(of, name, _noting(getattr(of, name), dog, at))
        ops = {"advance": house.forward_backward(run, 1, [1, 2]), "carry_out": house.optim_step(run, 2)}
        ops["step"] = house.sample(sampler, 0, max_tokens=2)
        settle(worker)
        worker.close()
    assert at == {name: {op.id} for name, op in ops.items()}
    assert dog.ops == []


def _noting(call: Any, dog: Watchdog, at: dict[str, set[str]]) -> Any:
    """The same, which notes of which requests the watchdog would speak."""

    def noted(*args: Any) -> Any:
        at.setdefault(call.__name__, set()).update(op.id for op in dog.ops)
        return call(*args)

    return noted
