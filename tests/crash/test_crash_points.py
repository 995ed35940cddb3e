"""A process dies at each named point, in the middle of its work; the SDK client gets what it would have got."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tinker import types

from tests.crash.test_kill import connect, datum, pids
from tests.service import Service, running
from tinsmith.crashpoints import NAMES

pytestmark = pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")  # load_state: deprecated, and served
STEPS = 4
FLAGS = ("--device", "fake", "--inline-bytes", "64", "--snapshot-debt-bytes", "2000")
# Every process of the server dies at the Nth passage; N is such that one or two of them do.
NTH = dict.fromkeys(NAMES, 8) | {"store.before_finish_commit": 6, "store.after_finish_commit": 6}


def everything(service: Service) -> list[Any]:
    """Losses, optimizer metrics, a save, a load of it, and samples of a snapshot."""
    client = connect(service)
    run = client.create_lora_training_client("tinsmith/tiny", rank=4, seed=1).result()
    answers: list[Any] = []
    for step in range(STEPS):
        passed = run.forward_backward([datum(step)], "cross_entropy")
        stepped = run.optim_step(types.AdamParams(learning_rate=0.01))
        answers += [passed.result().loss_fn_outputs[0]["logprobs"].tolist(), stepped.result().metrics]
    path = run.save_state("middle").result().path
    run.forward_backward([datum(9)], "cross_entropy").result()
    run.load_state_with_optimizer(path).result()
    answers.append(run.optim_step(types.AdamParams(learning_rate=0.01)).result().metrics)
    sampler = run.save_weights_and_get_sampling_client()
    sampler = sampler.result() if hasattr(sampler, "result") else sampler
    params = types.SamplingParams(max_tokens=20, seed=5)
    sampled = sampler.sample(types.ModelInput.from_ints([1, 2, 3]), num_samples=2, sampling_params=params).result()
    return [*answers, [sequence.tokens for sequence in sampled.sequences]]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    with running(tmp_path_factory.mktemp("undisturbed") / "data", *FLAGS) as service:
        return everything(service)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_death_at_this_point_changes_nothing(tmp_path: Path, expected: list[Any], name: str) -> None:
    with running(tmp_path / "data", *FLAGS, "--crash-point", f"{name}:{NTH[name]}") as service:
        before = pids(service)
        assert everything(service) == expected
        assert pids(service) != before, "no process died: the point was not passed so often"
