"""A process dies at each named point, in the middle of its work; the SDK client gets what it would have got, and what
it is metered for is what it would have been.
"""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tinker import AdminClient, types

from tests.crash.test_kill import connect, datum, pids
from tests.service import Service, running
from tinsmith.crashpoints import NAMES

pytestmark = pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")  # load_state: deprecated, and served
STEPS = 4
FLAGS = ("--device", "fake", "--inline-bytes", "64", "--snapshot-debt-bytes", "2000")
# Every process of the server dies at the Nth passage; N is such that one or two of them do.
NTH = dict.fromkeys(NAMES, 8) | {"store.before_finish_commit": 6, "store.after_finish_commit": 6}
NTH |= dict.fromkeys(("sampler.before_file", "sampler.after_file"), 2)  # of two samplers; the next worker makes one


def everything(service: Service) -> list[Any]:
    """Losses, optimizer metrics, a save, a load of it, and samples of a snapshot."""
    client = connect(service)
    run = client.create_lora_training_client("tinsmith/tiny", rank=4, seed=1).result()
    answers: list[Any] = []
    for step in range(STEPS):
        passed = run.forward_backward([datum(step)], "cross_entropy")
        stepped = run.optim_step(types.AdamParams(learning_rate=0.01))
        answers += [passed.result().loss_fn_outputs[0]["logprobs"].tolist(), stepped.result().metrics]
    run.save_weights_and_get_sampling_client()
    path = run.save_state("middle").result().path
    run.forward_backward([datum(9)], "cross_entropy").result()
    run.load_state_with_optimizer(path).result()
    answers.append(run.optim_step(types.AdamParams(learning_rate=0.01)).result().metrics)
    sampler = run.save_weights_and_get_sampling_client()
    sampler = sampler.result() if hasattr(sampler, "result") else sampler
    params = types.SamplingParams(max_tokens=20, seed=5)
    sampled = sampler.sample(types.ModelInput.from_ints([1, 2, 3]), num_samples=2, sampling_params=params).result()
    return [*answers, [sequence.tokens for sequence in sampled.sequences], metered(service)]


def metered(service: Service) -> dict[str, int]:
    """Tokens and checkpoints by kind, whatever the hour."""
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    admin = AdminClient(base_url=service.url, api_key=service.key)
    usage = admin.get_billing_usage(now - timedelta(hours=1), now + timedelta(hours=1)).result()
    sums: Counter[str] = Counter()
    for event in usage.data:
        info = event.event_info.model_dump()
        sums[info["type"]] += info.get("token_count") or info.get("count") or 0
    return dict(sums)


def test_what_is_metered_is_what_was_asked_for(expected: list[Any]) -> None:
    num_tokens = sum(datum(step).model_input.length for step in (*range(STEPS), 9))
    num_sampled = sum(map(len, expected[-2]))
    assert expected[-1] == {
        "training": num_tokens,
        "sampling_prefill": 3,
        "sampling_sample": num_sampled,
        "checkpoint": 1,
        "storage": 0,
    }


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
