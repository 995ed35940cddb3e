"""A number that a client took and never sent holds its run up for `gap_timeout_s`, and no longer."""

from __future__ import annotations

import time
from typing import Any

import pytest


@pytest.fixture
def house(make_house: Any) -> Any:
    return make_house(poll_hold_s=0.05, gap_timeout_s=1.5)


def step(api: Any, run_id: str, seq_id: int) -> dict[str, Any]:
    return api.post("/optim_step", {"model_id": run_id, "seq_id": seq_id, "adam_params": {}})


def wait(api: Any, worker: Any, promise: dict[str, Any], seconds: float = 5.0) -> Any:
    """Poll as a client does, the worker doing what it may; the result."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        worker.step()
        response = api.raw("POST", "/api/v1/retrieve_future", json={"request_id": promise["request_id"]})
        if response.status_code == 200:
            return response.json()
        assert response.status_code == 408
    raise AssertionError("no result")


def test_what_never_came_fails_and_the_rest_goes_on(api: Any, worker: Any) -> None:
    run_id = api.create(api.session())["model_id"]
    late = step(api, run_id, 4)
    worker.step()
    assert "request 1 of this run has not arrived" in api.result(late, 408)["queue_state_reason"]
    started = time.monotonic()
    assert "metrics" in wait(api, worker, late)
    assert time.monotonic() - started > 1.0
    for seq_id in (1, 2, 3):
        after_all = api.result(step(api, run_id, seq_id))
        assert after_all["code"] == "never_arrived"
        assert after_all["category"] == "user"
        assert f"request {seq_id} of this run did not arrive within 1.5 s" in after_all["error"]
    assert "metrics" in wait(api, worker, step(api, run_id, 5))


def test_arrivals_start_the_wait_anew(api: Any, worker: Any) -> None:
    """Chunks that come in slowly, the first one last, are all carried out."""
    run_id = api.create(api.session())["model_id"]
    promises = []
    for seq_id in (4, 3, 2):
        promises.append(step(api, run_id, seq_id))
        time.sleep(0.6)
        api.result(promises[0], 408)
    promises.append(step(api, run_id, 1))
    for promise in promises:
        assert "metrics" in wait(api, worker, promise)


def test_a_clock_that_is_put_forward_closes_no_gap(
    api: Any, worker: Any, house: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = api.create(api.session())["model_id"]
    late = step(api, run_id, 2)
    api.result(late, 408)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 7200)
    house.services.clock._wall = time.time
    api.result(late, 408)
    first = step(api, run_id, 1)
    assert "metrics" in wait(api, worker, first), "it was late by a moment, not by two hours"
    assert "metrics" in wait(api, worker, late)


def test_a_wide_gap_is_closed_bit_by_bit(api: Any, worker: Any) -> None:
    run_id = api.create(api.session())["model_id"]
    assert "metrics" in wait(api, worker, step(api, run_id, 300), seconds=20.0)
