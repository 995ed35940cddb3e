"""`ServiceClient.create_custom_loss` of the real SDK against a real server: ten losses, and a worker that is killed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.numerics.custom_losses import NUM_ANSWERS, RANKS, answers, dpo, gspo, make_inputs
from tests.service import Service, until

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

BASE = "tinsmith/tiny"
FUNCTIONS = list(RANKS)


@pytest.fixture(scope="module")
def service(shared_server: Service) -> Service:
    return shared_server


@pytest.fixture
def client(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[tinker.ServiceClient]:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    made = tinker.ServiceClient(base_url=service.url, api_key=service.key)
    yield made
    made.close("success")


def make_run(client: Any) -> Any:
    return client.create_lora_training_client(BASE, rank=8, seed=3).result()


def random_data(fn: Any, lengths: tuple[int, ...] = (9, 33)) -> list[types.Datum]:
    rng = np.random.default_rng(5)
    data = []
    for length in lengths:
        shape = (length, NUM_ANSWERS) if fn is answers else (length,)
        inputs = {
            name: types.TensorData.from_numpy(array)
            for name, array in {"target_tokens": rng.integers(0, 500, shape), **make_inputs(rng, fn, length)}.items()
        }
        model_input = types.ModelInput.from_ints(rng.integers(0, 500, length).tolist())
        data.append(types.Datum(model_input=model_input, loss_fn_inputs=inputs))
    return data


def client_side(fn: Any) -> Any:
    """The same function in the form that the client evaluates."""

    def loss(data: Any, logprobs: Any) -> Any:
        total, sums = 0.0, {}
        for datum, lp in zip(data, logprobs, strict=True):
            one, metrics = fn(lp, *(datum.loss_fn_inputs[name].to_torch() for name in list(RANKS[fn])[1:]))
            total = total + one
            for key, value in metrics.items():
                sums[key] = sums.get(key, 0.0) + float(value.detach()) / (len(data) if key.endswith("mean") else 1)
        return total, sums

    return loss


def step(run: Any, data: Any, loss: Any) -> tuple[dict[str, float], np.ndarray[Any, Any]]:
    """Metrics of a pass, and the log-probabilities after an optimizer step."""
    metrics = run.forward_backward_custom(data, loss).result().metrics
    run.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    probe = types.Datum(
        model_input=types.ModelInput.from_ints([1, 2, 3, 4]), loss_fn_inputs={"target_tokens": [2, 3, 4, 5]}
    )
    after = run.forward([probe], "cross_entropy").result().loss_fn_outputs[0]["logprobs"]
    return metrics, np.array(after.tolist())


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_an_uploaded_loss_is_the_clients_own(client: Any, fn: Any) -> None:
    data = random_data(fn)
    handle = client.create_custom_loss(fn, input_ranks=RANKS[fn]).result()
    assert handle.loss_id is not None
    ours, ours_after = step(make_run(client), data, handle)
    theirs, theirs_after = step(make_run(client), data, client_side(fn))
    assert "surrogate_loss:sum" not in ours
    assert ours["loss:sum"] == pytest.approx(theirs["loss:sum"], rel=1e-6)
    assert {k: v for k, v in ours.items() if k.startswith("custom/")} == pytest.approx(
        {k: v for k, v in theirs.items() if k.startswith("custom/")}, rel=1e-6
    )
    assert ours_after == pytest.approx(theirs_after, abs=1e-4)


def test_a_refused_upload_raises_in_the_client(client: Any) -> None:
    def odd(logprobs: Any) -> Any:
        return logprobs.erfinv().sum(), {}

    with pytest.raises(tinker.RequestFailedError, match=r"'erfinv' is not on the list of operations"):
        client.create_custom_loss(odd, input_ranks={"logprobs": 1}).result()


def test_a_killed_worker_replays_with_its_graph(service: Service, client: Any) -> None:
    data = random_data(dpo, (12, 20))
    handle = client.create_custom_loss(dpo, input_ranks=RANKS[dpo]).result()
    other = client.create_custom_loss(gspo, input_ranks=RANKS[gspo]).result()
    expected = []
    for is_killed in (False, True):
        run = make_run(client)
        run.forward_backward_custom(data, handle).result()
        run.forward_backward_custom(random_data(gspo), other).result()
        if is_killed:
            dead = service.kill_worker()
            until(lambda pid=dead: pid not in service.info()["worker_pids"].values(), 20)
        expected.append(step(run, data, handle))
    (metrics, after), (metrics_again, after_again) = expected
    assert metrics_again["loss:sum"] == metrics["loss:sum"]
    assert np.array_equal(after, after_again)
