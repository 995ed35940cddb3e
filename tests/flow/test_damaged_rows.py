"""Rows that hold what none can, since bits of them flipped: their own requests fail by name, all others go on."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flow.house import House, settle, train
from tinsmith.errors import GoneError
from tinsmith.store import DATABASE_FILE
from tinsmith.store.rows import OpRow
from tinsmith.types import OpState, RunStatus
from tinsmith.upkeep.cooling import Cooling
from tinsmith.upkeep.janitor import sweep
from tinsmith.upkeep.verify import verify

SECONDS = 20.0
DAYS = 1e7  # seconds after which nothing is kept
LOST_RUNS = (
    "spec = '{'",
    "spec = CAST(x'7bff7d' AS TEXT)",
    "spec = '[1]'",
    "user_metadata = 7",
    "session_id = CAST(x'ff' || session_id AS TEXT)",
    "status = 'reedy'",
    "snapshot_seq = 'a'",
    "snapshot_blob = x'7bff'",
)
LOST_REQUESTS = (  # of a run and of a sampler alike
    "cost_tokens = 'a'",
    "created_at = 'a'",
    "payload_bytes = x'ff'",
    "media = x'ff'",
    "sampler_id = 'a' || num",
    "kind = 'zample'",
)
LOST_SAMPLERS = (
    "spec = '{'",
    "spec = CAST(x'7bff' AS TEXT)",
    "spec = '[1]'",
    "blob = x'7bff'",
    "blob = CAST(x'ff' AS TEXT)",
    "blob = 'a'",
)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with contextlib.closing(House(tmp_path / "data")) as house:
        yield house


def change(house: House, table: str, change: str, where: str, value: str) -> None:
    with contextlib.closing(sqlite3.connect(house.root / DATABASE_FILE)) as connection, connection:
        assert connection.execute(f"UPDATE {table} SET {change} WHERE {where} = ?", (value,)).rowcount == 1


def another_tenant(house: House) -> list[OpRow]:
    house.be("bob")
    run = house.create_run(seed=2)
    return [house.forward_backward(run, 1, [9]), house.optim_step(run, 2), house.sample(house.sampler(), 0)]


def is_corrupt(house: House, op: OpRow) -> bool:
    failure = house.get(op).failure
    return failure is not None and failure.code in ("corrupt", "invalid_request")


def test_damaged_rows_of_runs_cost_these_runs_alone(house: House) -> None:
    ops = [house.forward_backward(house.create_run(), 1, [3, 4]) for _ in LOST_RUNS]
    for op, what in zip(ops, LOST_RUNS, strict=True):
        change(house, "runs", what, "run_id", str(op.run_id))
    others = another_tenant(house)
    settle(house.worker(), seconds=SECONDS)
    assert [house.get(op).state for op in others] == [OpState.DONE] * len(others)
    told = [house.get(op).failure for op in ops]
    assert [failure.code if failure else "" for failure in told] == ["corrupt"] * len(ops)
    assert all(failure and str(op.run_id) in failure.message for failure, op in zip(told, ops, strict=True))
    named = {finding.owner for finding in verify(house.store, house.blobs).findings}
    assert len(named) >= len(LOST_RUNS) - 2  # status, and what is no text, may be right again by now


def test_damaged_rows_of_requests_cost_these_requests_alone(house: House) -> None:
    sampler = house.sampler()
    samples = [house.sample(sampler, seq) for seq, _ in enumerate(LOST_REQUESTS)]
    ops = [house.forward_backward(house.create_run(), 1, [3, 4]) for _ in LOST_REQUESTS]
    for pair in zip(samples, ops, LOST_REQUESTS, strict=True):
        change(house, "ops", pair[2], "op_id", pair[0].id)
        change(house, "ops", pair[2], "op_id", pair[1].id)
    others = [house.forward_backward(house.create_run(), 1, [3, 4]), *another_tenant(house)]
    change(house, "ops", "attempts = x'ff'", "op_id", others[0].id)
    settle(house.worker(), seconds=SECONDS)
    assert [house.get(op).state for op in others] == [OpState.DONE] * len(others)
    assert [op.id for op in samples + ops if not is_corrupt(house, op)] == []


@pytest.mark.parametrize("what", ["op_id = CAST(x'ff' || op_id AS TEXT)", "op_id = x'ff'"])
def test_a_request_that_nothing_finds_by_its_name_is_no_work(house: House, what: str) -> None:
    lost = house.sample(house.sampler(), 0)
    change(house, "ops", what, "op_id", lost.id)
    others = another_tenant(house)
    settle(house.worker(), seconds=SECONDS)
    assert [house.get(op).state for op in others] == [OpState.DONE] * len(others)


def test_a_sample_that_names_a_run_fails(house: House) -> None:
    lost = house.sample(house.sampler(), 0)
    change(house, "ops", "run_id = x'ff'", "op_id", lost.id)
    settle(house.worker(), seconds=SECONDS)
    assert is_corrupt(house, lost)


def test_damaged_rows_of_samplers_cost_these_samplers_alone(house: House) -> None:
    ops = [house.sample(house.sampler(number=number), 0) for number, _ in enumerate(LOST_SAMPLERS)]
    for op, what in zip(ops, LOST_SAMPLERS, strict=True):
        change(house, "samplers", what, "sampler_id", str(op.sampler_id))
    others = another_tenant(house)
    change(house, "tenants", "weight = 'a'", "name", "alice")
    settle(house.worker(), seconds=SECONDS)
    assert [house.get(op).state for op in others] == [OpState.DONE] * len(others)
    assert [op.id for op in ops if not is_corrupt(house, op)] == []


@pytest.mark.parametrize(
    "what", ["kind = 'forwerd_backward'", "state = 'dome'", "run_id = run_id || '0'", "seq_id = 77"]
)
def test_a_run_is_not_computed_again_without_one_of_its_requests(house: House, what: str) -> None:
    run = house.create_run()
    done, *_ = train(house, run, range(2))
    settle(house.worker(), seconds=SECONDS)
    change(house, "ops", what, "op_id", done.id)
    after = house.forward_backward(run, 5, [9])
    settle(house.worker(), seconds=SECONDS)
    assert house.store.runs.get(house.tenant, run).status is RunStatus.CORRUPTED
    assert is_corrupt(house, after)


def test_a_snapshot_whose_name_is_none_is_a_damaged_one(house: House) -> None:
    run = house.create_run()
    train(house, run, range(1))
    worker = house.worker()
    settle(worker, seconds=SECONDS)
    worker.close()
    before = house.weights(run)
    change(house, "runs", "snapshot_blob = 'a'", "run_id", run)
    after = house.forward_backward(run, 3, [9], forward_only=True)
    settle(house.worker(), seconds=SECONDS)
    assert house.get(after).state is OpState.DONE
    assert (house.weights(run) == before).all()


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ("sessions", "session_id = x'ff'"),
        ("sessions", "session_id = CAST(x'ff' AS TEXT)"),
        ("ops", "result_blob = CAST(x'ff' AS TEXT)"),
        ("ops", "routes_blob = 'a'"),
        ("runs", "snapshot_blob = 'a'"),
    ],
)
def test_a_damaged_row_keeps_nothing_else_from_being_swept(house: House, table: str, what: str) -> None:
    """Twice: what can't be deleted is handed out once."""
    tenant = house.tenant
    done, *_ = train(house, house.create_run(), range(1))
    other, *_ = another_tenant(house)
    worker = house.worker()
    settle(worker, seconds=SECONDS)
    worker.close()
    where = {"ops": ("op_id", done.id), "runs": ("run_id", done.run_id)}.get(table, ("tenant_id", tenant))
    change(house, table, what, where[0], str(where[1]))
    now = time.time() + DAYS
    for _ in range(2):
        sweep(house.store, house.blobs, house.settings, now)
        Cooling().sweep(house.store, house.blobs, now, now)
        now += DAYS
    with pytest.raises(GoneError):
        house.get(other)
