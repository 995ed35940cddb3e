"""Samples that nobody asks for are cancelled, by name; sessions that fall silent can be gone on from, with the SDK."""

from __future__ import annotations

import time
from typing import Any

import pytest
import tinker
from tinker import types

from tests.contract.conftest import BASE, Api, HandWorker, House, Live
from tests.contract.test_quotas import sample
from tests.service import until
from tinsmith.api.polls import Polls
from tinsmith.api.unpolled import give_up_unpolled
from tinsmith.upkeep.janitor import sweep

# The SDK never closes its connections; the collector finds them during or after a test.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

PATIENCE_S = 600.0


@pytest.fixture
def long_ago(house: House) -> Any:
    """Let all polls, and the start of the process, have been so long ago."""

    def go_back(seconds: float) -> None:
        polls: Polls = house.services.polls
        polls._started -= seconds
        for known in (polls._samples, polls._samplers):
            known.update({key: at - seconds for key, at in known.items()})

    return go_back


def give_up(house: House, later_s: float = PATIENCE_S + 1) -> int:
    return give_up_unpolled(house.services, time.time() + later_s)


def test_a_sample_that_nobody_asks_for_is_cancelled_by_name(
    api: Api, house: House, worker: HandWorker, long_ago: Any
) -> None:
    promise = sample(api, api.session(), 0)
    assert give_up(house) == 0  # the process has just begun
    long_ago(PATIENCE_S + 1)
    assert give_up(house, 0.0) == 0  # it is young
    assert give_up(house) == 1
    failed = api.result(promise)
    assert (failed["code"], failed["category"]) == ("unpolled", "user")
    assert "nobody asked for the result of this sample for 10 min (--unpolled-sample-s)" in failed["error"]
    assert worker.step() == 0
    assert give_up(house) == 0


def test_a_sample_that_is_asked_for_goes_on(api: Api, house: House, long_ago: Any) -> None:
    session = api.session()
    alone, together = sample(api, session, 0), sample(api, session, 1)
    long_ago(PATIENCE_S + 1)
    api.result(alone, 408)
    assert give_up(house) == 1
    assert api.result(together)["code"] == "unpolled"
    sampler = f"{session}:sample:0"
    api.post("/retrieve_futures", {"target": {"type": "sampling_session", "sampling_session_id": sampler}})
    long_ago(PATIENCE_S / 2)
    assert give_up(house) == 0
    long_ago(PATIENCE_S)
    assert give_up(house) == 1
    assert not house.services.polls._samples
    assert not house.services.polls._samplers


def test_training_is_never_given_up(api: Api, house: House, long_ago: Any) -> None:
    api.create(api.session())
    long_ago(PATIENCE_S + 1)
    assert give_up(house) == 0


def test_zero_gives_up_nothing(make_house: Any) -> None:
    house = make_house(unpolled_sample_s=0.0)
    assert give_up(house, 1e9) == 0


def test_what_has_ended_is_not_remembered(api: Api, house: House, worker: HandWorker) -> None:
    promise = sample(api, api.session(), 0)
    api.result(promise, 408)
    assert len(house.services.polls._samples) == 1
    worker.step()
    api.raw("POST", "/api/v1/retrieve_future", json={"request_id": promise["request_id"]})
    assert not house.services.polls._samples


def datum() -> types.Datum:
    return types.Datum(model_input=types.ModelInput.from_ints([1, 2, 3]), loss_fn_inputs={"target_tokens": [2, 3, 4]})


def test_the_sdk_goes_on_after_its_session_fell_silent(
    house: House, live: Live, worker: HandWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was acknowledged is carried out, and the run goes on from its checkpoint in a new session."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    worker.start()
    lost = tinker.ServiceClient(base_url=live.url, api_key=house.key)
    run = lost.create_lora_training_client(BASE, rank=4).result()
    run.forward_backward([datum()], "cross_entropy").result(timeout=20)
    saved = run.save_state("before").result(timeout=20).path
    sampler = lost.create_sampling_client(base_model=BASE).result()
    worker.stop()
    passed = run.forward_backward([datum()], "cross_entropy")
    stepped = run.optim_step(types.AdamParams(learning_rate=1e-3))
    sampled = sampler.sample(types.ModelInput.from_ints([1, 2]), 1, types.SamplingParams(max_tokens=3))
    until(lambda: house.store.loads.samples(house.tenant_id).requests == 1, 20)
    until(lambda: len(house.store.waiting.all(worker._me, BASE, 100).ops) == 3, 20)
    swept = sweep(house.store, house.blobs, house.settings, time.time() + house.settings.session_timeout_s + 1)
    assert swept.num_sessions == 1
    with pytest.raises(Exception, match="cancelled"):
        sampled.result(timeout=20)
    while worker.step():
        pass
    assert passed.result(timeout=20).metrics
    assert stepped.result(timeout=20)
    again = tinker.ServiceClient(base_url=live.url, api_key=house.key)
    resumed = again.create_training_client_from_state_with_optimizer(saved)
    until(lambda: worker.step() > 0, 20)
    run = resumed.result()
    passed = run.forward_backward([datum()], "cross_entropy")
    until(lambda: worker.step() > 0, 20)
    assert passed.result(timeout=20).metrics
