"""A training request that is answered 429 comes again: the gap that it leaves meanwhile is none."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import tinker
from tinker import types

from tests.contract.conftest import BASE, Api, HandWorker, House, Live
from tests.contract.test_api_gaps import step, wait
from tinsmith.api import training
from tinsmith.api.gaps import LONGEST_TRY_S
from tinsmith.api.turned_away import MAX_TENANTS, TurnedAway
from tinsmith.errors import CapacityError
from tinsmith.types import TenantId

# The SDK never closes its connections; the collector finds them during or after a test.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

GAP_S = 1.0
REFUSED_FOR_S = 3.0


@pytest.fixture
def house(make_house: Any) -> Any:
    return make_house(poll_hold_s=0.05, gap_timeout_s=GAP_S, chunk_max_datums=1)


class Door:
    """Turns requests with some numbers away until it opens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *seq_ids: int) -> None:
        self._seq_ids = seq_ids
        self.opens_at = time.monotonic() + REFUSED_FOR_S
        self.refused: Counter[int] = Counter()
        self._real = training.refuse_far_ahead
        monkeypatch.setattr(training, "refuse_far_ahead", self._look)

    def _look(self, run: Any, seq_id: int) -> None:
        if seq_id in self._seq_ids and time.monotonic() < self.opens_at:
            self.refused[seq_id] += 1
            raise CapacityError("there is no room for it now: send it again")
        self._real(run, seq_id)


@pytest.fixture
def service(live: Live, house: House, monkeypatch: pytest.MonkeyPatch) -> Iterator[tinker.ServiceClient]:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    client = tinker.ServiceClient(base_url=live.url, api_key=house.key)
    yield client
    client.close("success")


def datum(first: int) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints([first, 2, 3]), loss_fn_inputs={"target_tokens": [2, 3, 4]}
    )


def test_the_sdk_rides_through_refusals_that_last_longer_than_a_gap_may(
    service: tinker.ServiceClient, house: House, worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chunks go out side by side: others of the run arrive, and are polled for, while one is turned away."""
    worker.start()
    run = service.create_lora_training_client(BASE, rank=4).result()
    door = Door(monkeypatch, 2, 5)
    passed = run.forward_backward([datum(first) for first in range(1, 5)], "cross_entropy")
    stepped = run.optim_step(types.AdamParams(learning_rate=1e-3))
    again = run.forward_backward([datum(1)], "cross_entropy")
    assert len(passed.result(timeout=60).loss_fn_outputs) == 4
    assert stepped.result(timeout=60)
    assert len(again.result(timeout=60).loss_fn_outputs) == 1
    assert door.refused[2] >= 1, "nothing was turned away"
    with house.store._database.read() as conn:
        rows = conn.exec_driver_sql("SELECT seq_id, state FROM ops ORDER BY seq_id").all()
    assert [tuple(row) for row in rows] == [(seq_id, "done") for seq_id in range(7)]


def test_a_number_that_is_turned_away_is_waited_for(
    api: Api, house: House, worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = api.create(api.session())["model_id"]
    door = Door(monkeypatch, 1)
    late = step(api, run_id, 2)
    while time.monotonic() < door.opens_at:
        api.post("/optim_step", {"model_id": run_id, "seq_id": 1, "adam_params": {}}, 429)
        api.result(late, 408)
        time.sleep(GAP_S / 3)
    first = step(api, run_id, 1)
    assert "metrics" in wait(api, worker, first)
    assert "metrics" in wait(api, worker, late)


def test_one_whose_client_has_given_up_is_not_waited_for_for_ever(
    api: Api, house: House, worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its tenant is turned away again and again."""
    run_id = api.create(api.session())["model_id"]
    late = step(api, run_id, 2)
    monkeypatch.setattr(house.services.turned_away, "ago_s", lambda tenant_id: 0.0)
    time.sleep(GAP_S + 0.1)  # nobody asks what a request waits for that has just come
    for waited_s, is_waited_for in ((GAP_S + LONGEST_TRY_S - 10, True), (GAP_S + LONGEST_TRY_S, False)):
        monkeypatch.setattr(house.services.turned_away, "_started", float("-inf"))
        with house.store._database.write() as conn:
            conn.exec_driver_sql("UPDATE runs SET last_request_at = ?", (time.time() - waited_s,))
        assert "has not arrived" in api.result(late, 408)["queue_state_reason"]
        with house.store._database.read() as conn:
            missing = conn.exec_driver_sql("SELECT count(*) FROM ops WHERE seq_id = 1").scalar_one()
        assert missing == int(not is_waited_for)
    assert "metrics" in wait(api, worker, late, seconds=20)
    assert api.result(step(api, run_id, 1))["code"] == "never_arrived"


def test_after_a_restart_clients_have_time_to_come_back(api: Api, house: House, worker: HandWorker) -> None:
    """What is missing could not be sent while nobody was there."""
    run_id = api.create(api.session())["model_id"]
    late = step(api, run_id, 2)
    with house.store._database.write() as conn:
        conn.exec_driver_sql("UPDATE runs SET last_request_at = last_request_at - 3600")
    time.sleep(GAP_S + 0.1)
    house.services.turned_away._started = time.monotonic()
    api.result(late, 408)
    assert "metrics" in wait(api, worker, step(api, run_id, 1))


def test_what_is_noted_is_bounded_and_of_training_alone() -> None:
    away = TurnedAway()
    mine = TenantId("mine")
    for path, status in (("/api/v1/asample", 429), ("/api/v1/optim_step", 400)):
        away.note(mine, path, status)
        assert away.ago_s(mine) == float("inf")
    away.note(mine, "/api/v1/optim_step", 503)
    assert away.ago_s(mine) < 60
    for number in range(MAX_TENANTS):
        away.note(TenantId(str(number)), "/api/v1/optim_step", 429)
    assert away.ago_s(mine) == float("inf")
    assert len(away._at) == MAX_TENANTS


def test_a_process_that_has_just_started_has_heard_nobody() -> None:
    assert TurnedAway().up_for_s() < 60
