"""`/metrics` and the list of busy runs: who may read them, and what they say of a known load over HTTP."""

from __future__ import annotations

import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from litestar.testing import TestClient
from prometheus_client.parser import text_string_to_metric_families

from tests.contract.conftest import House
from tests.unit.test_metrics import samples
from tinsmith.api.app import build_app, with_edge
from tinsmith.api.metrics import listening
from tinsmith.config import METRICS_DIR
from tinsmith.errors import ConfigError
from tinsmith.files.datadir import DataDir, ServerInfo
from tinsmith.observe import series
from tinsmith.observe.metrics import Counter, Counting, Gauge, Histogram
from tinsmith.scopes import Scope
from tinsmith.top.reading import frame, parse
from tinsmith.types import Role

ADAM = {"adam_params": {"learning_rate": 0.1}}


@pytest.fixture
def watched(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """(the house's services as they count, a client)."""
    shared = tmp_path / "metrics"
    shared.mkdir()
    monkeypatch.setenv(METRICS_DIR, str(shared))
    counting = Counting(series.TABLE, "api", shared)
    counting.start()
    services = replace(house.services, counting=counting)
    try:
        with TestClient(with_edge(build_app(services))) as client:
            yield services, client
    finally:
        counting.stop()


def read(client: Any, key: str, status: int = 200) -> Any:
    answer = client.get("/metrics", headers={"Authorization": f"Bearer {key}"})
    assert answer.status_code == status, answer.text
    return answer


def test_only_administrators_read_it(house: House, watched: Any) -> None:
    _, client = watched
    assert client.get("/metrics").status_code == 401
    for scope in (Scope.READ, Scope.SAMPLE, Scope.FULL):
        _, secret = house.store.tenants.create_key(house.tenant_id, scope.value, scope=scope)
        assert "tinsmith_" not in read(client, secret, 403).text
    answer = read(client, house.key)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert client.get("/api/v1/admin/runs", headers={"X-API-Key": house.other_key}).status_code == 403


def test_what_was_asked_and_what_waits(house: House, watched: Any) -> None:
    _, client = watched
    mine = {"X-API-Key": house.key}
    session = client.post(
        "/api/v1/create_session", json={"tags": [], "user_metadata": {}, "sdk_version": "0"}, headers=mine
    )
    session_id = session.json()["session_id"]
    body = {"session_id": session_id, "model_seq_id": 0, "base_model": "tinsmith/tiny", "lora_config": {"rank": 4}}
    run_id = client.post("/api/v1/create_model", json=body, headers=mine).json()["model_id"]
    for seq_id in (1, 2):
        body = {"model_id": run_id, "seq_id": seq_id, **ADAM}
        assert client.post("/api/v1/optim_step", json=body, headers=mine).status_code == 200
    refused = client.post("/api/v1/optim_step", json={"model_id": "nobody", "seq_id": 1, **ADAM}, headers=mine)
    client.get("/api/v1/training_runs/x/checkpoints", headers=mine)
    client.get("/nothing/here", headers=mine)
    found = samples(read(client, house.key).content)
    assert found[("tinsmith_http_requests_total", ("/api/v1/optim_step", "200"))] == 2
    assert found[("tinsmith_http_request_seconds_count", ("/api/v1/optim_step",))] == 3
    assert found[("tinsmith_http_requests_total", ("/api/v1/training_runs/{run_id}/checkpoints", "404"))] == 1
    assert found[("tinsmith_http_requests_total", ("other", "404"))] == 1
    assert found[("tinsmith_refused_requests_total", (refused.json()["code"],))] == 3
    assert found[("tinsmith_queued_ops", ("optim_step",))] == 2
    assert found[("tinsmith_queue_depth", ("alice",))] == 3
    assert found[("tinsmith_queue_oldest_seconds", ("alice",))] >= 0
    assert found[("tinsmith_runs", ("creating",))] == 1
    assert found[("tinsmith_sessions", ())] == 1
    assert found[("tinsmith_commit_seconds_count", ())] >= 3
    runs = client.get("/api/v1/admin/runs", headers=mine).json()["runs"]
    assert [(run["run_id"], run["tenant"], run["waiting"], run["seq_id"]) for run in runs] == [(run_id, "alice", 3, 2)]


def test_an_address_of_its_own_asks_for_no_key(house: House, watched: Any) -> None:
    services, _ = watched
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match="--metrics-address"), listening(address, services.watched.text):
            pass
    with listening(address, services.watched.text):
        text = urllib.request.urlopen(f"http://{address}/metrics").read()
        assert samples(text)[("tinsmith_sessions", ())] == 0
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://{address}/api/v1/sessions")


def test_often_asked_is_read_twice_a_second_at_most(
    house: House, watched: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, client = watched
    num_reads = 0
    figures = house.store.overview.figures

    def counted() -> Any:
        nonlocal num_reads
        num_reads += 1
        return figures()

    monkeypatch.setattr(house.store.overview, "figures", counted)
    monkeypatch.setattr("tinsmith.api.figures.FRESH_S", 60.0)
    for _ in range(20):
        read(client, house.key)
    assert num_reads == 1


def test_every_series_of_the_table_is_in_the_text(house: House, watched: Any) -> None:
    services, client = watched
    for one in series.TABLE:
        if isinstance(one, Counter):
            one.add(*one.labels)
        elif isinstance(one, Gauge):
            one.set(1, *one.labels)
        elif isinstance(one, Histogram):
            one.observe(1, *one.labels)
    info = ServerInfo("0", "http://x", 1, os.getpid(), os.getpid(), {"tinsmith/tiny": os.getpid()}, restarts={"api": 2})
    DataDir(services.settings.data_dir).write_info(info)
    families = {family.name: family for family in text_string_to_metric_families(read(client, house.key).text)}
    for one in series.TABLE:
        family = families[one.family]
        assert (family.type, family.documentation) == (one.kind, one.help)
        assert all(set(sample.labels) - {"le"} == set(one.labels) for sample in family.samples), one.name
    assert samples(read(client, house.key).content)[("tinsmith_restarts_total", ("api",))] == 2
    assert samples(read(client, house.key).content)[("tinsmith_process_memory_bytes", ("api",))] > 10**6


def test_a_dead_worker_is_shown_as_not_ready(house: House, watched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is to be told that a worker is away needs its series, and the screen its line, until it is back."""
    services, client = watched
    monkeypatch.setattr("tinsmith.api.figures.FRESH_S", 0.0)
    workers, base = house.store.workers, "tinsmith/tiny"
    places = {"0": [base, "train"], "0-2": [base, "train"], "0-sample": [base, "sample"]}
    info = ServerInfo("0", "http://x", 1, os.getpid(), os.getpid(), {base: 1, f"{base} 2": 2}, places=places)
    for slot, role in (("0", Role.TRAIN), ("0-2", Role.TRAIN), ("0-3", Role.TRAIN), ("0-4", Role.TRAIN)):
        workers.set_ready(workers.register(slot, base, 60.0, time.time(), role))
    workers.vacate("0-3")

    def ready() -> dict[str, float]:
        found = samples(read(client, house.key).content)
        return {labels[2]: value for (name, labels), value in found.items() if name == "tinsmith_worker_ready"}

    assert ready() == {"0": 1, "0-2": 1, "0-4": 1}, "nothing is known of places"
    DataDir(services.settings.data_dir).write_info(info)
    assert ready() == {"0": 1, "0-2": 1, "0-sample": 0, "0-4": 1}, "one has not registered yet, one is given up"
    workers.vacate("0-2")
    assert ready() == {"0": 1, "0-2": 0, "0-sample": 0, "0-4": 1}
    again = workers.register("0-2", base, 60.0, time.time(), Role.TRAIN)
    assert ready()["0-2"] == 0
    workers.deregister(again)
    workers.register("0-4", base, 0.001, time.time() - 1, Role.TRAIN)
    assert ready() == {"0": 1, "0-2": 0, "0-sample": 0}
    now = parse(read(client, house.key).text, 1.0)
    assert [(line.name, line.is_ready) for line in frame(now, now).workers] == [
        (f"sampler {base}", False), (f"worker {base}", True), (f"worker {base} 2", False),
    ]  # fmt: skip
