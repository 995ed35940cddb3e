"""A process dies at each named point, in the middle of its work; the client gets what it would have got, and what it is
metered for is what it would have been.

Points that the API and the worker pass are met by a server with the SDK as its client; those of the worker by a process
with the worker's loop alone, which is much faster, and in which the one that goes on doesn't die there again; those of
commands by the command. By default a server meets those points that the client can tell apart; the worker alone meets
all of its own. `make crash-points` has servers meet them all, and tries later passages and more random sequences.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import sqlite3
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tinker import AdminClient, types

from tests.crash import lives
from tests.crash.test_giving import OF_GIVING
from tests.crash.test_kill import connect, datum, pids
from tests.crash.test_letting_go import OF_LETTING_GO
from tests.service import Service, running
from tinsmith.crashpoints import NAMES
from tinsmith.store import DATABASE_FILE, open_as_it_is, open_store
from tinsmith.store.database import Database
from tinsmith.upkeep.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:DEPRECATED:FutureWarning")  # load_state: deprecated, and served
STEPS = 4
FLAGS = ("--device", "fake", "--inline-bytes", "64", "--snapshot-debt-bytes", "2000")
ENGINE_FLAGS = ("--deterministic", "--inline-bytes", "64", "--snapshot-debt-bytes", "1")
OF_ENGINE = ("optim.half_done", "pass.half_merged")
SERVED = {
    "api.after_payload_file", "blob.after_rename", "blob.before_rename", "sampler.after_file", "sampler.before_file",
    "store.after_claim", "store.after_enqueue_commit", "store.after_finish_commit", "store.before_enqueue_commit",
    "store.before_finish_commit",
}  # fmt: skip
OF_COMMANDS = {
    "backup.before_manifest", "backup.half_copied", "migrate.after_commit", "migrate.before_commit", "repair.half_done",
    "restore.half_moved",
}  # fmt: skip
LIVED = sorted(NAMES - OF_COMMANDS - OF_GIVING - OF_LETTING_GO - {"api.after_payload_file"})
THREES = [LIVED[start :: (len(LIVED) + 2) // 3] for start in range((len(LIVED) + 2) // 3)]
DEATHS = os.environ.get("TINSMITH_TEST_DEATHS")
# Every process of the server dies at the Nth passage; N is such that one or two of them do.
NTH = dict.fromkeys(SERVED, 8) | {"store.before_finish_commit": 6, "store.after_finish_commit": 6}
NTH |= dict.fromkeys(("sampler.before_file", "sampler.after_file"), 2)  # of two samplers; the next worker makes one
RANDOM_SEEDS = range(int(DEATHS or 2))
# a payload without its request, a request without its answer, a result that is lost, one that nobody was told of
TOLD = {
    "api.after_payload_file", "store.after_enqueue_commit", "store.before_finish_commit", "store.after_finish_commit",
    "sampler.after_file",
}  # fmt: skip


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


@pytest.mark.parametrize("name", sorted(SERVED if DEATHS else TOLD))
def test_a_death_at_this_point_changes_nothing(tmp_path: Path, expected: list[Any], name: str) -> None:
    with running(tmp_path / "data", *FLAGS, "--crash-point", f"{name}:{NTH[name]}") as service:
        before = pids(service)
        assert everything(service) == expected
        assert pids(service) != before, "no process died: the point was not passed so often"


@pytest.fixture(scope="module")
def expected_of_engine(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    with running(tmp_path_factory.mktemp("engine") / "data", *ENGINE_FLAGS) as service:
        return everything(service)


@pytest.mark.skipif(not DEATHS, reason="make crash-points")
@pytest.mark.parametrize("name", OF_ENGINE)
def test_a_death_in_the_real_engine_changes_no_bit(tmp_path: Path, expected_of_engine: list[Any], name: str) -> None:
    with running(tmp_path / "data", *ENGINE_FLAGS, "--crash-point", f"{name}:4") as service:
        before = pids(service)
        assert everything(service) == expected_of_engine
        assert pids(service) != before, "no process died: the point was not passed so often"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory after the first round."""
    root = tmp_path_factory.mktemp("begun")
    assert not lives.run(lives.live, root, "", range(1))
    return root


@pytest.fixture(scope="module")
def calm(begun: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a worker leaves that nobody disturbs."""
    root = tmp_path_factory.mktemp("calm") / "data"
    shutil.copytree(begun, root)
    assert not lives.run(lives.live, root, "", range(1, 8))
    return accounted(root)


def accounted(root: Path) -> Any:
    lives.run(lives.account, root, root / "account.json")
    return json.loads((root / "account.json").read_text())


def test_a_calm_life_is_sound(calm: Any) -> None:
    assert calm["findings"] == []
    assert len(calm["results"]) == 48
    assert calm["metered"]["training"] == sum(
        int(count) for count in (3 * 2 * 3, 3 * 2 * 3, 3 * 2, 2, 2 * 3, 2, 3 * 2 * 3, 3 * 2, 2)
    )


@pytest.mark.parametrize("names", THREES, ids=" ".join)
def test_a_worker_that_dies_at_these_points_loses_nothing(
    tmp_path: Path, begun: Path, calm: Any, names: list[str]
) -> None:
    """One after the other; what the lives before left undone may not come past the next one, which has its own then."""
    left = names
    while left:
        root = tmp_path / str(len(left))  # short: sockets lie in it
        shutil.copytree(begun, root)
        died = [name for name in left if lives.run(lives.live, root, name, range(1, 8))]
        assert left[0] in died, "the point was not passed"
        lives.run(lives.live, root, "", range(1, 8))
        assert accounted(root) == calm, f"after deaths at {died}"
        left = [name for name in left if name not in died]


@pytest.mark.skipif(not DEATHS, reason="make crash-points")
@pytest.mark.parametrize("nth", [2, 4, 8])
@pytest.mark.parametrize("name", LIVED)
def test_a_later_death_loses_nothing(tmp_path: Path, begun: Path, calm: Any, name: str, nth: int) -> None:
    shutil.copytree(begun, tmp_path / "data")
    lives.run(lives.live, tmp_path / "data", f"{name}:{nth}", range(1, 8))
    lives.run(lives.live, tmp_path / "data", "", range(1, 8))
    assert accounted(tmp_path / "data") == calm


@pytest.mark.parametrize("seed", RANDOM_SEEDS)
def test_deaths_at_random_points_lose_nothing(tmp_path: Path, calm: Any, seed: int) -> None:
    draw = random.Random(seed)
    deaths: list[str] = []
    for number in range(8):
        for _ in range(2):  # deaths at most: a request that kills four workers is given up
            point = f"{draw.choice(LIVED)}:{draw.choice((1, 1, 2, 4))}"
            deaths += [point] if lives.run(lives.live, tmp_path, point, [number]) else []
        lives.run(lives.live, tmp_path, "", [number])
    assert deaths, "draw another seed"
    assert accounted(tmp_path) == calm, deaths


@pytest.mark.parametrize("name", ["migrate.after_commit", "migrate.before_commit"])
def test_a_migration_that_dies_is_done_by_the_next_start(tmp_path: Path, name: str) -> None:
    with contextlib.closing(Database(tmp_path / DATABASE_FILE)):
        pass
    assert lives.run(lives.migrate, tmp_path, name)
    with contextlib.closing(open_store(tmp_path)) as store:
        assert store.upkeep.faults(time.time()) == []
    with contextlib.closing(sqlite3.connect(tmp_path / DATABASE_FILE)) as connection:
        assert connection.execute("SELECT count(*) FROM alembic_version").fetchone() == (1,)


@pytest.fixture
def lived(tmp_path: Path, begun: Path) -> Path:
    root = tmp_path / "data"
    shutil.copytree(begun, root)
    lives.run(lives.live, root, "", range(1, 3))
    return root


@pytest.mark.parametrize("name", ["backup.half_copied", "backup.before_manifest"])
def test_a_backup_that_dies_is_made_by_the_next(lived: Path, tmp_path: Path, name: str) -> None:
    assert lives.run(lives.keep, "back_up", lived, tmp_path / "backup", f"{name}:1")
    assert not (tmp_path / "backup" / "backup.json").exists()
    lives.run(lives.keep, "back_up", lived, tmp_path / "backup", "")
    lives.run(lives.keep, "restore", tmp_path / "backup", tmp_path / "data2", "")
    assert_sound(tmp_path / "data2")


@pytest.mark.parametrize("nth", [1, 2])
def test_a_restore_that_dies_leaves_no_database_and_the_backup_as_it_was(lived: Path, tmp_path: Path, nth: int) -> None:
    lives.run(lives.keep, "back_up", lived, tmp_path / "backup", "")
    died = lives.run(lives.keep, "restore", tmp_path / "backup", tmp_path / "data2", f"restore.half_moved:{nth}")
    assert died
    is_done = (tmp_path / "data2" / DATABASE_FILE).exists()
    assert is_done == (nth == 2), "the database appears last"
    if not is_done:
        shutil.rmtree(tmp_path / "data2")
        lives.run(lives.keep, "restore", tmp_path / "backup", tmp_path / "data2", "")
    assert_sound(tmp_path / "data2")


def test_a_repair_that_dies_is_made_by_the_next(lived: Path) -> None:
    with contextlib.closing(open_as_it_is(lived / DATABASE_FILE)) as store:
        results = [found.blob for found in store.upkeep.references() if found.naming == "result"]
    for blob in results[:3]:
        (lived / "blobs" / blob).unlink()
    assert lives.run(lives.repair, lived, "repair.half_done:2")
    lives.run(lives.repair, lived, "")
    assert_sound(lived)


def assert_sound(root: Path) -> None:
    with contextlib.closing(open_as_it_is(root / DATABASE_FILE)) as store:
        assert verify(store, lives.blobs_of(root)).findings == []


def test_every_point_has_its_test() -> None:
    assert set(LIVED) | OF_COMMANDS | OF_GIVING | OF_LETTING_GO | TOLD == NAMES
    assert TOLD <= SERVED
