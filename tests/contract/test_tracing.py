"""Traces from the client's span through both processes, with an exporter in memory: nothing is sent anywhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from litestar.testing import TestClient
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.contract.conftest import House as ApiHouse
from tests.flow.house import House, settle
from tinsmith.api.app import build_app, with_edge
from tinsmith.config import Settings
from tinsmith.errors import ConfigError
from tinsmith.observe import tracing

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT = f"00-{TRACE}-00f067aa0ba902b7-01"
UNWANTED = f"00-{TRACE}-00f067aa0ba902b7-00"


class Spans:
    """What was traced; `all` ends the tracing."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        tracing.start(Settings(), "test", self._exporter)

    def all(self) -> list[Any]:
        tracing.stop()
        return sorted(self._exporter.get_finished_spans(), key=lambda span: (span.start_time, span.end_time))


@pytest.fixture
def spans() -> Iterator[Spans]:
    yield Spans()
    tracing.stop()


def trace_of(span: Any) -> str:
    return f"{span.context.trace_id:032x}"


@pytest.fixture
def client(house: ApiHouse) -> Iterator[Any]:
    with TestClient(with_edge(build_app(house.services))) as made:
        made.headers["X-API-Key"] = house.key
        yield made


def ask(client: Any, path: str, body: dict[str, Any], traceparent: str = "") -> Any:
    return client.post(f"/api/v1{path}", json=body, headers={"traceparent": traceparent} if traceparent else {})


def test_a_request_hangs_below_its_clients_span_and_its_op_carries_the_place(
    house: ApiHouse, client: Any, spans: Spans
) -> None:
    session = ask(client, "/create_session", {"tags": [], "user_metadata": {}, "sdk_version": "0"})
    body = {"session_id": session.json()["session_id"], "model_seq_id": 0, "base_model": "tinsmith/tiny"}
    made = ask(client, "/create_model", body, CLIENT)
    refused = ask(client, "/optim_step", {"model_id": "nobody", "seq_id": 1, "adam_params": {}}, CLIENT)
    ask(client, "/retrieve_future", {"request_id": "nobody"})
    alice = house.store.tenants.by_name("alice")
    assert alice is not None
    op = house.store.ops.get(alice.tenant_id, made.json()["request_id"])
    found = {span.name: span for span in spans.all()}
    assert set(found) == {"POST /api/v1/create_session", "POST /api/v1/create_model", "POST /api/v1/optim_step"}
    span = found["POST /api/v1/create_model"]
    assert trace_of(span) == TRACE
    assert f"{span.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert span.attributes["tinsmith.tenant"] == "alice"
    assert span.attributes["http.response.status_code"] == 200
    assert span.attributes["tinsmith.request_id"] == made.headers["x-request-id"]
    assert op.meta["traceparent"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert found["POST /api/v1/optim_step"].attributes["http.response.status_code"] == refused.status_code == 404
    assert trace_of(found["POST /api/v1/create_session"]) != TRACE


@pytest.mark.parametrize("traceparent", ["", "nonsense", UNWANTED])
def test_what_is_not_to_be_kept_is_not(client: Any, spans: Spans, traceparent: str) -> None:
    ask(client, "/session_heartbeat", {"session_id": "x"}, traceparent)
    assert all(trace_of(span) != TRACE for span in spans.all())


@pytest.fixture
def work(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    made.close()


def placed(number: int) -> dict[str, Any]:
    return {"traceparent": f"00-{TRACE[:-1]}{number:x}-{number:016x}-01"}


def test_a_worker_tells_what_was_waited_and_with_whom_it_was_computed(work: House, spans: Spans) -> None:
    worker = work.worker()
    runs = [work.create_run(), work.create_run(), work.create_run()]
    ops = []
    for number, run in enumerate(runs):
        draft = work.forward_backward
        meta = placed(number + 1) if number < 2 else {}
        ops.append(_with_meta(work, lambda run=run, draft=draft: draft(run, 1, [1, 2, 3]), meta))
    settle(worker)
    worker.close()
    found = spans.all()
    waited = [span for span in found if span.name == "queue"]
    computed = [span for span in found if span.name == "forward_backward"]
    (shared,) = [span for span in found if span.name == "pass"]
    assert [f"{span.parent.span_id:x}" for span in waited] == ["1", "2"]
    assert {span.attributes["tinsmith.op_id"] for span in computed} == {op.id for op in ops[:2]}
    assert {span.attributes["tinsmith.run_id"] for span in computed} == set(runs[:2])
    assert shared.attributes["tinsmith.runs"] == 3
    assert {link.context.span_id for link in shared.links} == {1, 2}
    assert shared.parent is None
    assert all(span.links[0].context.span_id == shared.context.span_id for span in computed)
    assert all(before.end_time <= after.end_time for before, after in zip(waited, computed, strict=True))
    assert [span.name for span in found].count("snapshot") == 3


def test_a_sample_and_a_failure(work: House, spans: Spans) -> None:
    worker = work.worker()
    run, sampler = work.create_run(), work.sampler()
    sampled = _with_meta(work, lambda: work.sample(sampler, 0), placed(1))
    bad = _with_meta(work, lambda: work.load(run, 1, "tenants/x/checkpoints/y.0"), placed(2))
    settle(worker)
    found = {span.name: span for span in spans.all()}
    assert found["sample"].attributes["tinsmith.sampler_id"] == sampler
    assert found["sample"].attributes["tinsmith.op_id"] == sampled.id
    assert found["load"].attributes["tinsmith.outcome"] == "failed"
    assert found["load"].status.description == work.get(bad).failure.code
    worker.close()


def test_off_unless_asked_for_and_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    tracing.start(Settings(), "test")
    with tracing.request("GET", "/", b"", "r") as asked:
        assert asked is None
        assert tracing.carry({"a": 1}) == {"a": 1}

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name="opentelemetry")

    monkeypatch.setattr(tracing.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"needs opentelemetry: pip install 'tinsmith\[otel\]'"):
        tracing.start(Settings(otlp_endpoint="http://127.0.0.1:9"), "test")


def test_a_collector_that_is_away_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    tracing.start(Settings(otlp_endpoint="http://127.0.0.1:9"), "test")
    started = time.process_time()
    for _ in range(100):
        with tracing.request("POST", "/api/v1/asample", b"", "r"):
            pass
    assert time.process_time() - started < 1
    tracing.stop()


def _with_meta(work: House, enqueue: Any, meta: dict[str, Any]) -> Any:
    """Have the next op carry `meta` beside its own."""
    make = work.op
    sent = work.enqueue

    def marked(op: Any) -> Any:
        object.__setattr__(op, "meta", {**op.meta, **meta})
        return sent(op)

    work.enqueue = marked  # type: ignore[method-assign]
    try:
        return enqueue()
    finally:
        work.enqueue, work.op = sent, make  # type: ignore[method-assign]


def test_no_key_and_no_prompt_is_in_a_span(house: ApiHouse, client: Any, spans: Spans) -> None:
    """Of requests that are answered and of those that are refused, by whatever words."""
    word, tokens, wrong = "Zwitschermaschine", [771, 313, 902, 177], "tml-Canary_wrong_key_0123456789"
    session = ask(client, "/create_session", {"tags": [word], "user_metadata": {"x": word}, "sdk_version": "0"}).json()
    body = {"session_id": session["session_id"], "sampling_session_seq_id": 0, "base_model": "tinsmith/tiny"}
    sampler = ask(client, "/create_sampling_session", body).json()["sampling_session_id"]
    for prompt in ({"chunks": [{"tokens": tokens}]}, word):
        body = {"sampling_session_id": sampler, "seq_id": 0, "prompt": prompt, "sampling_params": {"stop": [word]}}
        ask(client, "/asample", body)
    client.get("/api/v1/sessions", headers={"X-API-Key": wrong})
    client.get("/api/v1/sessions", params={"key": wrong})
    told = "".join(span.to_json() for span in spans.all())
    assert "/api/v1/asample" in told
    for secret in (house.key, wrong, word, str(tokens)[1:-1]):
        assert secret not in told
