"""Runs that nobody touches are let go, others are deleted by hand, audit entries and hours of usage go by their age."""

from __future__ import annotations

import contextlib
import errno
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flow.house import House, settle, train
from tinsmith.config import Settings
from tinsmith.errors import ConfigError, GoneError, NotFoundError, UserError
from tinsmith.scopes import Scope
from tinsmith.store import gone
from tinsmith.store.gone import LATELY_S
from tinsmith.store.rows import Principal
from tinsmith.types import CheckpointKind, OpState, RunId, SamplerId, SessionId, TenantId
from tinsmith.upkeep.janitor import sweep
from tinsmith.upkeep.letting_go import clear, sweep_old
from tinsmith.upkeep.verify import verify
from tinsmith.worker.loop import Worker

DAY_S = 86400.0
TTL = {"run_ttl_s": 2 * DAY_S, "result_ttl_s": DAY_S}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with contextlib.closing(House(tmp_path / "house", inline_bytes=16, snapshot_debt_bytes=300, **TTL)) as house:
        yield house


def owner(house: House) -> Principal:
    return Principal(house.tenant, "alice", "key", Scope.FULL)


def trained(house: House) -> tuple[Worker, RunId]:
    worker, run = house.worker(), house.create_run()
    train(house, run, range(4))
    settle(worker)
    return worker, run


def leave(house: House, worker: Worker) -> None:
    worker.close()
    house.store.sessions.finish(house.tenant, SessionId(house.session), "success", None, time.time())


def later(house: House, days: float) -> None:
    """Rounds of the janitor: files are buried by one, deleted by the next; that of a slow machine may end early."""
    now = time.time() + days * DAY_S
    for at in (now, now + 120.0, now + 240.0):
        sweep(house.store, house.blobs, house.settings, at)


def files_of(house: House, run: RunId) -> list[str]:
    return [
        file.key for file in house.blobs.files() if str(run).replace(":", "_") in file.key or "/payloads/" in file.key
    ]


def num_rows(house: House, run: RunId) -> int:
    with house.store.gone._database.read() as conn:
        return int(conn.exec_driver_sql("SELECT count(*) FROM ops WHERE run_id = ?", (run,)).scalar_one())


def is_sound(house: House) -> bool:
    return verify(house.store, house.blobs, now=time.time() + 40 * DAY_S).findings == []  # when tallies have gone too


def test_a_run_that_nobody_touched_is_let_go_with_all_that_it_had(house: House) -> None:
    worker, run = trained(house)
    leave(house, worker)
    assert list(house.blobs.files())
    later(house, 1.9)
    assert house.store.runs.get(house.tenant, run).snapshot_blob is not None
    later(house, 2.1)
    left = [file.key for file in house.blobs.files()]
    assert left == []
    with pytest.raises(GoneError, match=f"the run {run} was let go on .* for 2 days and it had no checkpoint"):
        house.store.runs.get(house.tenant, run)
    with pytest.raises(GoneError, match="was let go"):
        house.optim_step(run, 9)
    with pytest.raises(NotFoundError):
        house.store.runs.get(TenantId("another"), run)
    assert house.store.runs.list(house.tenant, 10, 0) == ([], 0)
    assert house.store.sessions.children(house.tenant, SessionId(house.session))[0] == []
    assert num_rows(house, run) <= 1, "the newest request of all stays, as numbers go on from it"
    assert is_sound(house)
    (entry,) = house.store.audit.list(house.tenant, None, 0.0, math.inf).rows[-1:]
    assert (entry.event, entry.details["model_id"], entry.details["actor"]) == ("project_run_let_go", run, "server")


def test_off_by_default(tmp_path: Path) -> None:
    with contextlib.closing(House(tmp_path / "house", inline_bytes=16)) as house:
        worker, run = trained(house)
        leave(house, worker)
        later(house, 4000)
        assert house.store.runs.get(house.tenant, run).snapshot_blob is not None


def keep_open(house: House, worker: Worker, run: RunId) -> None:
    leave(house, worker)
    house.optim_step(run, 9)


def keep_session(house: House, worker: Worker, run: RunId) -> None:
    worker.close()
    now = time.time() + 3 * DAY_S
    with house.store.gone._database.write() as conn:
        conn.exec_driver_sql("UPDATE sessions SET last_beat_at = ?", (now,))


def keep_checkpoint(house: House, worker: Worker, run: RunId) -> None:
    house.save(run, 9, "kept")
    settle(worker)
    leave(house, worker)


def keep_lately(house: House, worker: Worker, run: RunId) -> None:
    """Its checkpoint lived until a day ago."""
    keep_checkpoint(house, worker, run)
    house.store.checkpoints.delete(
        house.tenant, run, CheckpointKind.TRAINING, "kept", time.time() + 2 * DAY_S, by=owner(house)
    )


@pytest.mark.parametrize("keep", [keep_open, keep_session, keep_checkpoint, keep_lately])
def test_one_that_has_a_right_to_live_stays(house: House, keep: Callable[[House, Worker, RunId], None]) -> None:
    worker, run = trained(house)
    keep(house, worker, run)
    later(house, 3)
    assert house.store.runs.get(house.tenant, run).snapshot_blob is not None
    assert is_sound(house)


def test_what_was_touched_between_look_and_deed_stays(house: House) -> None:
    worker, run = trained(house)
    leave(house, worker)
    now = time.time() + 3 * DAY_S
    assert house.store.gone.idle(now - 2 * DAY_S, now, RunId(""), 10) == [(house.tenant, run)]
    house.optim_step(run, 9)
    assert not house.store.gone.let_go(house.tenant, run, now - 2 * DAY_S, now)
    settle(house.worker())


def test_an_owner_deletes_a_run_that_a_worker_holds_and_its_samplers_stay(house: House) -> None:
    worker, run = trained(house)
    sampler = SamplerId(f"{house.session}:sample:0")
    house.save_sampler(run, 9, sampler)
    settle(worker)
    waiting = house.optim_step(run, 10)
    with pytest.raises(UserError, match="requests that wait or run"):
        house.store.gone.delete(house.tenant, run, with_checkpoints=False, by=owner(house))
    settle(worker)
    with pytest.raises(NotFoundError):
        house.store.gone.delete(TenantId("another"), run, with_checkpoints=True, by=owner(house))
    house.store.gone.delete(house.tenant, run, with_checkpoints=False, by=owner(house))
    with pytest.raises(GoneError, match="was deleted on"):
        house.store.gone.delete(house.tenant, run, with_checkpoints=False, by=owner(house))
    assert house.store.gone.going(RunId(""), 10) == [], "a worker holds it"
    worker.runs.residency._asked_at = worker.runs.residency._asked_idle_at = float("-inf")
    settle(worker)
    worker.runs.residency._asked_idle_at = float("-inf")
    settle(worker)
    assert house.store.gone.going(RunId(""), 10) == [run]
    clear(house.store, time.time(), math.inf)
    assert house.result(waiting), "results are there for their time"
    sample = house.sample(sampler, 0)
    settle(worker)
    assert house.result(sample)
    assert is_sound(house)


def test_checkpoints_are_deleted_with_it_if_that_is_asked_for(house: House) -> None:
    worker, run = trained(house)
    house.save(run, 9, "kept")
    settle(worker)
    with pytest.raises(UserError, match="1 checkpoints"):
        house.store.gone.delete(house.tenant, run, with_checkpoints=False, by=owner(house))
    house.store.gone.delete(house.tenant, run, with_checkpoints=True, by=owner(house))
    worker.close()
    now = time.time()
    assert house.store.checkpoints.list(house.tenant, 10, 0) == ([], 0)
    assert house.store.ledger.spans(house.tenant, now + 1, now + 9, 10) == []
    events = [row.event for row in house.store.audit.list(house.tenant, None, 0.0, math.inf).rows]
    assert events[-2:] == ["checkpoint_delete", "project_run_delete"]
    sweep(house.store, house.blobs, house.settings, now + 1)
    sweep(house.store, house.blobs, house.settings, now + 120)
    left = [file.key for file in house.blobs.files()]
    assert not any("snapshots" in key or "checkpoints" in key for key in left), left
    assert is_sound(house)


def test_its_place_is_not_taken_again(house: House) -> None:
    worker, run = trained(house)
    house.store.gone.delete(house.tenant, run, with_checkpoints=False, by=owner(house))
    leave(house, worker)
    later(house, 3)
    house._num_runs = 0
    with pytest.raises(GoneError, match="was deleted on"):
        house.create_run()


def test_audit_entries_go_by_their_age(tmp_path: Path) -> None:
    with contextlib.closing(House(tmp_path / "house", audit_ttl_s=30 * DAY_S)) as house:
        house.store.tenants.create("bob")
        worker, run = trained(house)
        house.store.gone.delete(house.tenant, run, with_checkpoints=False, by=owner(house))
        now = time.time()

        def num() -> int:
            return len(house.store.audit.list(None, None, 0.0, math.inf).rows)

        before = num()
        assert before
        sweep_old(house.store, house.settings, now + 29 * DAY_S)
        assert num() == before
        sweep_old(house.store, house.settings, now + 31 * DAY_S)
        assert num() == 0
        worker.close()


def test_hours_of_usage_become_days_and_no_sum_changes(tmp_path: Path) -> None:
    with contextlib.closing(House(tmp_path / "house", usage_hours_s=31 * DAY_S)) as house:
        worker, _ = trained(house)
        second = house.create_run(seed=2)
        train(house, second, range(2))
        settle(worker)
        today = int(time.time() // DAY_S * DAY_S)
        database = house.store.ledger._database
        with database.write() as conn:
            rows = conn.exec_driver_sql("SELECT hour, tenant_id, session_id, run_id, base_model, kind FROM usage").all()
            conn.exec_driver_sql("DELETE FROM usage")
            for number, row in enumerate(rows):
                for hour in range(72):
                    values = (today + hour * 3600, *row[1:], 10 * hour + number)
                    conn.exec_driver_sql("INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?)", values)

        def summed(start: int, end: int) -> dict[Any, int]:
            sums: dict[Any, int] = {}
            for row in house.store.ledger.usage(None, start, end, 10**6):
                key = (row.run_id, row.kind, row.session_id, row.base_model, row.hour // DAY_S)
                sums[key] = sums.get(key, 0) + row.quantity
            return sums

        day = int(DAY_S)
        before = summed(today, today + 3 * day), summed(today, today + day), summed(today + day + 3600, today + 3 * day)
        assert house.store.ledger.move_old(today + day + 7200, 30) == 30, "a part of the first day"
        assert summed(today, today + 3 * day) == before[0]
        while house.store.ledger.move_old(today + day + 7200, 30):
            pass
        found = house.store.ledger.usage(None, today, today + day, 10**6)
        assert {(row.hour, row.seconds) for row in found} == {(today, day)}
        assert len(found) == len(rows)
        assert (summed(today, today + 3 * day), summed(today, today + day)) == before[:2]
        assert summed(today + day + 3600, today + 3 * day) == before[2], "of the next day the hours are there"
        for start, end in ((today + 3600, today + 2 * day), (today, today + 3600)):
            with pytest.raises(UserError, match="kept by the day"):
                house.store.ledger.usage(house.tenant, start, end, 10**6)
        assert house.store.ledger.usage(TenantId("another"), today + 3600, today + 2 * day, 10**6) == []
        sweep_old(house.store, house.settings, today + 40 * DAY_S)
        assert {row.seconds for row in house.store.ledger.usage(None, today, today + 3 * day, 10**6)} == {day}
        assert summed(today, today + 3 * day) == before[0]
        worker.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [("run_ttl_s", 3600.0), ("audit_ttl_s", 86400.0), ("usage_hours_s", 86400.0), ("run_ttl_s", -1.0)],
)
def test_nothing_goes_sooner_than_it_may(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name.replace("_", "-")):
        Settings.load({}, **{name: value})


def test_a_run_stays_at_least_as_long_as_its_results() -> None:
    with pytest.raises(ConfigError, match="result-ttl-s"):
        Settings.load({}, run_ttl_s=2 * DAY_S, result_ttl_s=3 * DAY_S)


def test_a_deleted_run_needs_no_room_on_the_disk_to_go(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = house.worker()
    run = house.create_run()
    train(house, run, range(1))
    settle(worker)
    assert worker.runs[run].debt_bytes, "its newest steps are in the log alone"

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(house.blobs, "put", full)
    house.store.gone.delete(house.tenant, run, with_checkpoints=False, by=owner(house))
    for _ in range(3):
        worker.runs.residency._asked_at = worker.runs.residency._asked_idle_at = float("-inf")
        settle(worker)
    assert house.store.gone.going(RunId(""), 10) == [run]
    assert is_sound(house)


def test_one_whose_results_are_kept_takes_no_others_turn(house: House) -> None:
    worker, run = trained(house)
    house.store.gone.delete(house.tenant, run, with_checkpoints=False, by=owner(house))
    leave(house, worker)
    assert house.store.gone.going(RunId(""), 10) == [run]
    clear(house.store, time.time(), math.inf)
    assert num_rows(house, run) == 9
    assert house.store.gone.going(RunId(""), 10) == [], "until a result expires nothing can be done"
    later(house, 2)
    assert num_rows(house, run) <= 1


@pytest.mark.parametrize("how", ["deleted", "let go"])
def test_requests_whose_forerunners_never_came_hold_no_run(house: House, how: str) -> None:
    """A client died in the middle of what it sent."""
    worker, run = trained(house)
    early = house.optim_step(run, 11)
    settle(worker)
    with pytest.raises(UserError, match="wait or run"):
        house.store.gone.delete(house.tenant, run, with_checkpoints=False, by=owner(house))
    leave(house, worker)
    if how == "deleted":
        now = time.time() + LATELY_S + 1
        house.store.gone.delete(house.tenant, run, with_checkpoints=False, by=owner(house), now=now)
    else:
        sweep(house.store, house.blobs, house.settings, time.time() + 2.1 * DAY_S)
    ended = house.get(early)
    assert ended.state is OpState.FAILED
    assert ended.failure is not None
    assert f"the run {run} was {how}" in ended.failure.message
    later(house, 4)
    assert num_rows(house, run) <= 1
    assert [file.key for file in house.blobs.files()] == []
    assert is_sound(house)


def test_many_checkpoints_are_deleted_some_at_a_time(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gone, "CHECKPOINTS_AT_ONCE", 2)
    worker, run = trained(house)
    for number in range(5):
        house.save(run, 9 + number, f"kept{number}")
    settle(worker)
    database, write, sizes = house.store.gone._database, house.store.gone._database.write, [5]

    @contextlib.contextmanager
    def counted(*args: Any, **options: Any) -> Iterator[Any]:
        with write(*args, **options) as conn:
            yield conn
        sizes.append(house.store.checkpoints.list(house.tenant, 10, 0)[1])

    monkeypatch.setattr(database, "write", counted)
    house.store.gone.delete(house.tenant, run, with_checkpoints=True, by=owner(house))
    monkeypatch.undo()
    assert sizes == [5, 3, 1, 1, 0], "and two looks that there are no more"
    worker.close()
    events = [row.event for row in house.store.audit.list(house.tenant, None, 0.0, math.inf).rows]
    assert events[-6:] == [*["checkpoint_delete"] * 5, "project_run_delete"]
    assert house.store.ledger.spans(house.tenant, time.time() + 1, time.time() + 9, 10) == []
    later(house, 3)
    assert [file.key for file in house.blobs.files()] == []
    assert is_sound(house)
