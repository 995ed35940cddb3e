"""The real SDK against the API behind uvicorn, with a worker that makes its numbers up."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import tinker
from tinker import _base_client, types

from tinsmith.api import express, training
from tinsmith.api.plain_http import PlainRequest

# The SDK never closes its connections; the collector finds them during or after a test.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

BASE = "tinsmith/tiny"


@pytest.fixture
def house(make_house: Any) -> Any:
    return make_house(poll_hold_s=20.0)


@pytest.fixture
def service(live: Any, house: Any, worker: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tinker.ServiceClient]:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    worker.start()
    client = tinker.ServiceClient(base_url=live.url, api_key=house.key)
    yield client
    client.close("success")


def datum(num_tokens: int = 4, **inputs: list[float]) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(range(1, num_tokens + 1))),
        loss_fn_inputs={"target_tokens": list(range(2, num_tokens + 2)), **inputs},
    )


def test_a_supervised_step_and_its_checkpoints(service: Any, worker: Any) -> None:
    trainer = service.create_lora_training_client(BASE, rank=4).result()
    pass_ = trainer.forward_backward([datum(), datum(6, weights=[0.5] * 6)], "cross_entropy")
    step = trainer.optim_step(types.AdamParams(learning_rate=1e-3))
    output = pass_.result()
    assert output.metrics["loss:sum"] == 2.0
    assert [len(row["logprobs"].tolist()) for row in output.loss_fn_outputs] == [4, 6]
    assert step.result().metrics == {"lr": 1e-3}
    forward = trainer.forward([datum()], "cross_entropy").result()
    assert len(forward.loss_fn_outputs) == 1
    saved = trainer.save_state("s1").result().path
    assert saved.endswith("/weights/s1")
    assert trainer.get_info().model_data.model_name == BASE
    resumed = service.create_training_client_from_state_with_optimizer(saved).result()
    assert resumed.optim_step(types.AdamParams()).result().metrics
    assert [op.seq_id for op in worker.seen if op.run_id == trainer.model_id] == [0, 1, 2, 3, 4]


def test_many_chunks_in_parallel(service: Any) -> None:
    trainer = service.create_lora_training_client(BASE, rank=4).result()
    data = [datum(logprobs=[-1.0] * 4, advantages=[1.0] * 4) for _ in range(2100)]
    output = trainer.forward_backward(data, "importance_sampling").result()
    assert output.metrics["loss:sum"] == 2100
    assert len(output.loss_fn_outputs) == 2100


def test_an_rl_loop(service: Any) -> None:
    trainer = service.create_lora_training_client(BASE, rank=4).result()
    prompt = types.ModelInput.from_ints([1, 2, 3])
    sampler = trainer.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=5, seed=9, stop=[0])
    response = sampler.sample(prompt, num_samples=3, sampling_params=params).result()
    assert [list(sequence.tokens) for sequence in response.sequences] == [[9] * 5] * 3
    assert len({sequence.sequence_id for sequence in response.sequences}) == 3
    assert sampler.compute_logprobs(prompt).result() == [None, -2.0, -2.0]
    path = trainer.save_weights_for_sampler("w1").result().path
    named = service.create_sampling_client(model_path=path).result()
    assert len(named.sample(prompt, num_samples=1, sampling_params=params).result().sequences) == 1
    base = service.create_sampling_client(base_model=BASE).result()
    assert base.get_base_model() == BASE


def test_failures_reach_the_user_with_their_cure(service: Any) -> None:
    trainer = service.create_lora_training_client(BASE, rank=4).result()
    bad = trainer.forward_backward([datum()], "nonsense")
    good = trainer.forward_backward([datum()], "cross_entropy")
    with pytest.raises(tinker.RequestFailedError, match="offered: cross_entropy"):
        bad.result()
    assert good.result().metrics["loss:sum"] == 1.0
    with pytest.raises(tinker.RequestFailedError, match="served: tinsmith/tiny"):
        service.create_lora_training_client("meta/other").result()
    with pytest.raises(tinker.BadRequestError, match="served: tinsmith/tiny"):
        service.create_sampling_client(base_model="meta/other").result()
    sampler = service.create_sampling_client(base_model=BASE).result()
    with pytest.raises(tinker.RequestFailedError, match="prompt"):
        sampler.sample(types.ModelInput.empty(), 1, types.SamplingParams(max_tokens=1)).result()


def test_the_rest_client(service: Any, live: Any, house: Any) -> None:
    trainer = service.create_lora_training_client(BASE, rank=4, user_metadata={"renderer": "x"}).result()
    path = trainer.save_state("s1", ttl_seconds=3600).result().path
    rest = tinker.RestClient(base_url=live.url, api_key=house.key)
    run = rest.get_training_run(trainer.model_id).result()
    assert (run.base_model, run.lora_rank, run.user_metadata) == (BASE, 4, {"renderer": "x"})
    assert run.last_checkpoint.tinker_path == path
    assert [r.training_run_id for r in rest.list_training_runs().result().training_runs] == [trainer.model_id]
    assert rest.list_checkpoints(trainer.model_id).result().checkpoints[0].expires_at is not None
    rest.set_checkpoint_ttl_from_tinker_path(path, None).result()
    rest.delete_checkpoint_from_tinker_path(path).result()
    assert rest.list_user_checkpoints().result().checkpoints == []
    models = rest.get_server_capabilities().result().supported_models
    assert [model.model_name for model in models] == [BASE]


def test_a_wrong_key_is_an_authentication_error(live: Any) -> None:
    with pytest.raises(tinker.AuthenticationError, match="tinsmith keys create"):
        tinker.RestClient(base_url=live.url, api_key="tml-wrong").get_server_capabilities().result()


def test_stopping_ends_polls_at_once(live: Any, house: Any) -> None:
    headers = {"X-API-Key": house.key}
    session = httpx.post(f"{live.url}/api/v1/create_session", json={}, headers=headers).json()["session_id"]
    body = {"session_id": session, "model_seq_id": 0, "base_model": BASE}
    promise = httpx.post(f"{live.url}/api/v1/create_model", json=body, headers=headers).json()
    answers: list[httpx.Response] = []

    def poll() -> None:
        answers.append(httpx.post(f"{live.url}/api/v1/retrieve_future", json=promise, headers=headers, timeout=30))

    thread = threading.Thread(target=poll)
    thread.start()
    deadline = time.monotonic() + 5
    while not house.services.waiters.num_waiting and time.monotonic() < deadline:
        time.sleep(0.01)
    started = time.monotonic()
    live.stop()
    thread.join(10)
    assert time.monotonic() - started < 5
    assert answers[0].status_code == 408


@pytest.mark.parametrize("is_on", [True, False])
def test_clients_compress_training_requests_if_they_are_told_to(
    live: Any, house: Any, worker: Any, monkeypatch: pytest.MonkeyPatch, is_on: bool
) -> None:
    object.__setattr__(house.settings, "compress_requests", is_on)
    encodings: list[str | None] = []
    read = training.read_body

    async def noting(call: Any, *args: Any) -> bytes:
        if call.url.path.endswith("/forward_backward"):
            encodings.append(call.headers.get("content-encoding"))
        return await read(call, *args)

    monkeypatch.setattr(training, "read_body", noting)
    read_plain = express.read_plain

    def noting_plain(data: bytes, paths: frozenset[bytes]) -> PlainRequest | None:
        request = read_plain(data, paths)
        if request is not None and request.path.endswith(b"/forward_backward"):
            encoding = request.headers.get(b"content-encoding")
            encodings.append(None if encoding is None else encoding.decode())
        return request

    monkeypatch.setattr(express, "read_plain", noting_plain)
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    worker.start()
    client = tinker.ServiceClient(base_url=live.url, api_key=house.key)
    run = client.create_lora_training_client(BASE, rank=4).result()
    run.forward_backward([datum(500)], "cross_entropy").result()
    client.close("success")
    assert encodings == ["zstd" if is_on else None]


@pytest.mark.parametrize("is_on", [True, False])
def test_clients_use_the_transport_that_they_are_told_to(
    live: Any, house: Any, worker: Any, monkeypatch: pytest.MonkeyPatch, is_on: bool
) -> None:
    object.__setattr__(house.settings, "rust_transport", is_on)
    made: list[bool] = []
    make = _base_client._default_pyqwest_transport
    monkeypatch.setattr(_base_client, "_default_pyqwest_transport", lambda: made.append(True) or make())
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    worker.start()
    with tinker.ServiceClient(base_url=live.url, api_key=house.key) as client:
        client.create_lora_training_client(BASE, rank=4).result()
    assert bool(made) == is_on
