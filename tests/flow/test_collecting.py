"""What nobody can ask for any more goes: rows of requests, logs of runs that rest, sessions with nothing in them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flow.house import House, settle, train
from tinsmith.errors import GoneError, NotFoundError
from tinsmith.store.rows import NewRun
from tinsmith.types import OpKind, OpState, RunId, RunSpec, SessionId
from tinsmith.upkeep.cooling import Cooling
from tinsmith.upkeep.janitor import sweep
from tinsmith.upkeep.verify import verify
from tinsmith.wire.meta import CreateMeta, to_meta
from tinsmith.worker import residency
from tinsmith.worker.loop import Worker

DAY = 24 * 3600.0


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setattr(residency, "ENDED_CHECK_S", 0.0)
    monkeypatch.setattr(residency, "IDLE_CHECK_S", 0.0)
    with contextlib.closing(House(tmp_path, result_ttl_s=DAY)) as house:
        yield house


def num_ops(house: House) -> int:
    with house.store._database.read() as conn:
        return int(conn.exec_driver_sql("SELECT count(*) FROM ops").scalar_one())


def end(house: House, worker: Worker) -> None:
    """The session ends, and the worker lets its runs go."""
    house.store.sessions.finish(house.tenant, SessionId(house.session), "success", None, time.time())
    for _ in range(4):
        worker._must_look = True
        settle(worker)


def rest(house: House, days: float = 2) -> int:
    now = time.time() + days * DAY
    sweep(house.store, house.blobs, house.settings, now)
    return Cooling().sweep(house.store, house.blobs, now - DAY, now)


def files(house: House, area: str) -> int:
    return sum(file.key.split("/")[2] == area for file in house.blobs.files())


def a_run_that_rests(house: House, steps: int = 3) -> RunId:
    run = house.create_run()
    train(house, run, range(steps))
    worker = house.worker()
    settle(worker)
    end(house, worker)
    assert house.store.runs.get(house.tenant, run).lease_owner is None
    return run


def test_a_run_at_rest_is_two_files_and_a_row_and_goes_on_where_it_was(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = house.create_run()
    train(house, run, range(3))
    worker = house.worker()
    settle(worker)
    before = house.weights(run)
    end(house, worker)
    assert num_ops(house) == 7
    assert rest(house) == 1
    assert rest(house) == 0
    row = house.store.runs.get(house.tenant, run)
    assert row.previous_seq == row.snapshot_seq == row.pruned_seq == 6
    assert row.previous_blob != row.snapshot_blob
    assert num_ops(house) == 1  # the newest of all stays
    assert (files(house, "payloads"), files(house, "snapshots")) == (0, 2)
    assert verify(house.store, house.blobs).findings == []
    monkeypatch.setattr(residency, "ENDED_CHECK_S", 3600.0)  # else it has left memory again
    op = house.forward_backward(run, 7, [1, 2, 3], forward_only=True)
    settle(house.worker())
    assert house.get(op).state is OpState.DONE
    assert (house.weights(run) == before).all()


def test_a_run_at_rest_is_as_safe_from_a_damaged_file_as_it_was(house: House) -> None:
    run = a_run_that_rests(house)
    assert rest(house) == 1
    row = house.store.runs.get(house.tenant, run)
    path = house.root / "blobs" / str(row.snapshot_blob)
    path.write_bytes(path.read_bytes()[:-1])
    op = house.forward_backward(run, 7, [1, 2, 3])
    step = house.optim_step(run, 8)
    worker = house.worker()
    settle(worker)
    assert [house.get(o).state for o in (op, step)] == [OpState.DONE] * 2
    worker.close()
    assert house.store.upkeep.damaged_snapshots() != []
    assert verify(house.store, house.blobs).findings == []


def test_a_damaged_snapshot_takes_no_log_away(house: House) -> None:
    run = a_run_that_rests(house)
    row = house.store.runs.get(house.tenant, run)
    path = house.root / "blobs" / str(row.snapshot_blob)
    path.write_bytes(path.read_bytes()[:-1])
    assert rest(house) == 0
    op = house.forward_backward(run, 7, [1, 2, 3])
    settle(house.worker())
    assert house.get(op).state is OpState.DONE


def test_what_may_still_be_asked_for_stays(house: House) -> None:
    """A run of a living session, one that was asked for something since, and one that a worker holds."""
    run = house.create_run()
    (op, _) = train(house, run, range(1))
    worker = house.worker()
    settle(worker)
    assert rest(house, 0.5) == 0
    assert house.result(op)
    assert rest(house) == 0
    assert num_ops(house) == 3, "no snapshot but the first covers it: it is needed to compute the run again"
    end(house, worker)
    assert Cooling().sweep(house.store, house.blobs, time.time() - 1, time.time()) == 0


def test_a_run_that_goes_on_meanwhile_keeps_what_it_has(house: House) -> None:
    run = a_run_that_rests(house)
    (cold,) = house.store.runs.cold(time.time() + 1, RunId(""), 10)
    house.forward_backward(run, 7, [1, 2])
    settle(house.worker())
    before = house.store.runs.get(house.tenant, run)
    assert not house.store.runs.put_spare(cold, cold.newest.blob or before.snapshot_blob, time.time())  # type: ignore[arg-type]
    assert house.store.runs.get(house.tenant, run) == before


def test_a_request_whose_row_is_gone_is_gone_and_never_carried_out_again(house: House) -> None:
    run = a_run_that_rests(house)
    rest(house)
    for seq in (1, 5):
        with pytest.raises(GoneError, match="carried out long ago"):
            house.forward_backward(run, seq, [1, 2, 3])
    spec = RunSpec(run, "fake/base", rank=4, seed=1)
    op = house.op(OpKind.CREATE, run, 0, meta=to_meta(CreateMeta(spec)), payload=None)
    with pytest.raises(GoneError, match="was made before"):
        house.store.ops.create_run(NewRun(house.tenant, SessionId(house.session), 0, spec), op, time.time())


def test_samples_go_with_their_results(house: House) -> None:
    sampler = house.sampler()
    ops = [house.sample(sampler, seq) for seq in range(5)]
    settle(house.worker())
    rest(house, 0.5)
    assert [house.get(op).state for op in ops] == [OpState.DONE] * 5
    rest(house)
    assert num_ops(house) == 1
    for op in ops:
        with pytest.raises(GoneError):
            house.get(op)


def test_numbers_of_requests_go_on_from_the_newest(house: House) -> None:
    """A worker asks for what is newer than it has seen."""
    sampler = house.sampler()
    house.sample(sampler, 0)
    worker = house.worker()
    settle(worker)
    rest(house)
    op = house.sample(sampler, 1)
    settle(worker)
    assert house.get(op).state is OpState.DONE


def test_a_run_is_not_made_in_a_session_that_has_ended(house: House) -> None:
    """Not even if it ended between the look at it and the writing."""
    house.store.sessions.finish(house.tenant, SessionId(house.session), "success", None, time.time())
    with pytest.raises(GoneError, match="has ended"):
        house.create_run()
    run = RunId(f"{house.session}:train:0")
    with pytest.raises(NotFoundError):
        house.store.runs.get(house.tenant, run)


def test_empty_sessions_go_and_those_that_anything_refers_to_stay(house: House) -> None:
    create, finish = house.store.sessions.create, house.store.sessions.finish
    now = time.time()
    empty, alive, trained = (create(house.tenant, now=now).session_id for _ in range(3))
    run = RunId(f"{trained}:train:0")
    spec = RunSpec(run, "fake/base", rank=4, seed=1)
    op = house.op(OpKind.CREATE, run, 0, meta=to_meta(CreateMeta(spec)), payload=None)
    house.store.ops.create_run(NewRun(house.tenant, trained, 0, spec), op, now)
    for session in (empty, trained):
        finish(house.tenant, session, "success", None, now)
    assert house.store.sessions.drop_empty(now - 1) == 0
    assert house.store.sessions.drop_empty(now + 1) == 1
    with pytest.raises(NotFoundError):
        house.store.sessions.get(house.tenant, empty)
    assert {house.store.sessions.get(house.tenant, each).session_id for each in (alive, trained)} == {alive, trained}


def test_the_janitor_drops_them_after_an_hour(house: House) -> None:
    session = house.store.sessions.create(house.tenant, now=time.time()).session_id
    house.store.sessions.finish(house.tenant, session, "success", None, time.time())
    sweep(house.store, house.blobs, house.settings, time.time() + 3500)
    assert house.store.sessions.get(house.tenant, session)
    sweep(house.store, house.blobs, house.settings, time.time() + 3700)
    with pytest.raises(NotFoundError):
        house.store.sessions.get(house.tenant, session)
