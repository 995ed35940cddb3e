"""The SDK's own retries through a proxy that loses answers: every request takes effect once, results are the same."""

from __future__ import annotations

import numpy as np
import pytest
import tinker
from tinker import types

from tests.contract.lossy import lossy_proxy
from tests.service import Service

TEXT = [5, 17, 42, 99, 7, 13, 28, 64]
ONCE_EACH = {"create_model", "forward_backward", "optim_step", "retrieve_future", "save_weights", "asample"}


@pytest.fixture(scope="module")
def service(shared_server: Service) -> Service:
    return shared_server


def train(url: str, key: str) -> tuple[list[float], list[list[int]]]:
    """Losses of four steps and of a run resumed from a save; tokens sampled in between."""
    client = tinker.ServiceClient(base_url=url, api_key=key)
    run = client.create_lora_training_client("tinsmith/tiny", rank=4, seed=1).result()
    losses = []
    for step in range(4):
        tokens = [*TEXT, 20 + step]
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": np.array(tokens[1:])}
        )
        result = run.forward_backward([datum], "cross_entropy")
        run.optim_step(types.AdamParams(learning_rate=5e-3)).result()
        losses.append(result.result().metrics["loss:sum"])
    sampler = run.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=12, seed=3)
    answer = sampler.sample(types.ModelInput.from_ints(TEXT), num_samples=2, sampling_params=params).result()
    path = run.save_state("end").result().path
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    losses.append(resumed.forward([datum], "cross_entropy").result().metrics["loss:sum"])
    return losses, [list(s.tokens) for s in answer.sequences]


def test_lost_answers_change_nothing(service: Service) -> None:
    expected = train(service.url, service.key)
    with lossy_proxy(service.url, lambda path, n: path in ONCE_EACH and n % 3 == 1) as proxy:
        assert train(proxy.url, service.key) == expected
        assert set(proxy.num_lost) >= ONCE_EACH
        assert sum(proxy.num_lost.values()) >= 10
