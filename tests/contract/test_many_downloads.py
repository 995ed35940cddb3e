"""Downloads that nobody reads: so many of a tenant's at one time, and no answer that looks like a fault of ours."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.contract.conftest import BASE, small_state
from tests.contract.streams import Reader
from tests.service import until
from tinsmith.api import connection, services
from tinsmith.files.blobs import checkpoint_key
from tinsmith.files.checkpoint_file import dump_state
from tinsmith.store.rows import NewCheckpoint
from tinsmith.types import CheckpointKind, RunSpec

WIDTH = 400_000  # 2 matrices of rank 4 in float32: 12.8 MB, more than the kernel holds of one connection
SHORT_S = 0.9


@pytest.fixture(autouse=True)
def few_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the house is made."""
    monkeypatch.setattr(services, "MAX_TENANT_FILES", 3)
    monkeypatch.setattr(services, "most_read_out", lambda: 5)


@pytest.fixture
def http(live: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, timeout=30) as client:
        yield client


def big_link(house: Any, http: httpx.Client, worker: Any, key: str) -> str:
    """A link to the archive of a checkpoint of the key's tenant."""
    headers = {"X-API-Key": key, "accept": "application/json"}
    session = http.post("/api/v1/create_session", json={}, headers=headers).json()["session_id"]
    made = {"session_id": session, "model_seq_id": 0, "base_model": BASE, "lora_config": {"rank": 4}}
    run_id = http.post("/api/v1/create_model", json=made, headers=headers).json()["model_id"]
    worker.step()
    tenant_id = house.store.tenants.authenticate(key).tenant_id
    info = house.blobs.put(checkpoint_key(tenant_id), dump_state(small_state(RunSpec(run_id, BASE, 4), width=WIDTH)))
    row = NewCheckpoint(run_id, CheckpointKind.SAMPLER, "big", info.key, info.size, info.sha256)
    house.store.checkpoints.put(tenant_id, row, time.time())
    url = http.get(f"/api/v1/training_runs/{run_id}/checkpoints/sampler_weights/big/archive", headers=headers).json()
    place = urlsplit(url["url"])
    return f"{place.path}?{place.query}"


def unread(stack: ExitStack, live: Any, link: str) -> Reader:
    stream = stack.enter_context(Reader(live.url))
    stream.send(f"GET {link} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return stream


def num_open(house: Any) -> int:
    return int(house.services.downloads_out.num_taken)


def test_a_tenant_has_its_places_and_leaves_others_theirs(
    live: Any, house: Any, worker: Any, http: httpx.Client
) -> None:
    alices, bobs = (big_link(house, http, worker, key) for key in (house.key, house.other_key))
    with ExitStack() as stack:
        for _ in range(3):
            unread(stack, live, alices)
        until(lambda: num_open(house) == 3, 6.0)
        refused = http.get(alices)
        assert (refused.status_code, refused.json()["code"], refused.json()["category"]) == (
            503,
            "capacity",
            "capacity",
        )
        assert refused.headers["retry-after"] == "5"
        whole = http.get(bobs)
        assert whole.status_code == 200
        assert len(whole.content) == int(whole.headers["content-length"])
        for _ in range(2):
            unread(stack, live, bobs)
        until(lambda: num_open(house) == 5, 6.0)
        assert http.get(bobs).status_code == 503
    until(lambda: num_open(house) == 0, 6.0)
    assert http.head(alices).status_code == 200
    assert http.get(alices, headers={"range": "bytes=99999999-"}).status_code == 416
    assert num_open(house) == 0


def test_a_download_that_nobody_reads_is_closed(
    live: Any, house: Any, worker: Any, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = big_link(house, http, worker, house.key)
    monkeypatch.setattr(connection, "UNREAD_S", SHORT_S)
    with ExitStack() as stack:
        stream = unread(stack, live, link)
        until(lambda: num_open(house) == 1, 6.0)
        until(lambda: num_open(house) == 0, 6.0)
        assert stream.rest() < 4 * WIDTH * 4 * 2


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_no_file_left_to_open_is_a_lack_that_passes(
    live: Any, house: Any, worker: Any, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    link = big_link(house, http, worker, house.key)

    def fail(*_: Any) -> Any:
        raise OSError(number, "too many open files")

    monkeypatch.setattr(type(house.blobs), "open", fail)
    answer = http.get(link)
    assert (answer.status_code, answer.json()["code"]) == (503, "capacity")
    assert answer.headers["retry-after"] == "5"
    assert num_open(house) == 0
