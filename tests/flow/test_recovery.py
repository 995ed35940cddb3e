"""What a worker's death leaves: logs and snapshots that give the state, damage that is said, ops that kill."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.flow.house import House, settle, train
from tinsmith.errors import CapacityError, CorruptError, StorageFullError
from tinsmith.files.blobs import Blobs
from tinsmith.store import DATABASE_FILE, database
from tinsmith.store.rows import OpRow
from tinsmith.types import BlobKey, CheckpointKind, OpKind, OpState, RunId, RunStatus, SamplerId
from tinsmith.worker import loop, recorder
from tinsmith.worker.claims import MAX_ATTEMPTS
from tinsmith.worker.main import run_until


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., House]]:
    with contextlib.ExitStack() as stack:

        def make(name: str = "house", **settings: Any) -> House:
            return stack.enter_context(contextlib.closing(House(tmp_path / name, **settings)))

        yield make


def undisturbed(build: Callable[..., House], steps: int) -> dict[str, Any]:
    house = build("undisturbed")
    run = house.create_run()
    train(house, run, range(steps))
    settle(house.worker())
    return house.state(run).tensors


def assert_same(house: House, run: RunId, expected: dict[str, Any]) -> None:
    tensors = house.state(run).tensors
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)


def files(house: House, area: str) -> list[Path]:
    return [path for path in (house.root / "blobs").rglob("*") if path.is_file() and area in path.parts]


def test_a_snapshot_holds_moments_gradients_and_steps(build: Callable[..., House]) -> None:
    house = build(snapshot_debt_bytes=1, inline_bytes=10)
    run = house.create_run()
    for steps in (range(2), range(2, 4)):
        train(house, run, steps)
        settle(house.worker())
        assert files(house, "snapshots")
    assert house.engine.num_forwards == 2, "the first two steps were not computed again"
    assert_same(house, run, undisturbed(build, 4))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [Path.unlink, flip, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("area", ["payloads", "snapshots"])
def test_a_run_that_cannot_be_rebuilt_is_given_up_and_says_so(
    build: Callable[..., House], damage: Callable[[Path], Any], area: str
) -> None:
    house = build(inline_bytes=10, **({"snapshot_debt_bytes": 1} if area == "snapshots" else {}))
    run, other = house.create_run(), house.create_run(seed=2)
    train(house, run, range(2))
    settle(house.worker())
    paths = [p for p in files(house, area) if area == "payloads" or p.parent.name == run.replace(":", "-")]
    whole = {path: path.read_bytes() for path in paths}
    for path in paths:
        damage(path)

    after = [house.forward_backward(run, 5, [9]), house.optim_step(run, 6)]
    fine = house.forward_backward(other, 1, [9])
    settle(house.worker())
    for op in after:
        failure = house.get(op).failure
        assert failure is not None
        assert (failure.code, failure.category) == ("corrupt", "server")
        assert "backup" in failure.message
    assert house.get(fine).state is OpState.DONE
    assert house.store.runs.get(house.tenant, run).status is RunStatus.CORRUPTED
    assert not house.engine.has_run(run)

    for path, content in whole.items():
        path.write_bytes(content)
    healed = house.forward_backward(run, 7, [1], forward_only=True)
    settle(house.worker())
    assert house.get(healed).state is OpState.DONE
    assert house.store.runs.get(house.tenant, run).status is RunStatus.READY
    assert_same(house, run, undisturbed(build, 2))


def test_a_log_without_its_snapshot_does_not_stop_the_worker(build: Callable[..., House]) -> None:
    house = build(snapshot_debt_bytes=1)
    run, other = house.create_run(), house.create_run(seed=2)
    train(house, run, range(1))
    settle(house.worker())
    with contextlib.closing(sqlite3.connect(house.root / DATABASE_FILE)) as connection, connection:
        connection.execute("UPDATE runs SET snapshot_blob = NULL, previous_blob = NULL WHERE run_id = ?", (run,))
    lost = house.forward_backward(run, 3, [1])
    fine = house.forward_backward(other, 1, [1])
    settle(house.worker())
    failure = house.get(lost).failure
    assert failure is not None
    assert failure.code == "corrupt"
    assert house.get(fine).state is OpState.DONE


def test_a_replay_that_raises_costs_its_run_alone(build: Callable[..., House], monkeypatch: pytest.MonkeyPatch) -> None:
    house = build()
    run, other = house.create_run(), house.create_run(seed=2)
    for each in (run, other):
        train(house, each, range(2))
    settle(house.worker())
    worker = house.worker()
    apply = house.engine.apply

    def raises(item: Any, num_runs: int, num_tokens: int) -> Any:
        if item.run_id == run:
            raise IndexError("token out of range")
        return apply(item, num_runs, num_tokens)

    monkeypatch.setattr(house.engine, "apply", raises)
    lost, fine = house.forward_backward(run, 5, [9]), house.forward_backward(other, 5, [9])
    settle(worker)
    failure = house.get(lost).failure
    assert failure is not None
    assert failure.code == "corrupt"
    assert house.get(fine).state is OpState.DONE


def test_a_sampler_step_that_raises_fails_one_request(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    house = build()
    sampler = house.sampler()
    ops = [house.sample(sampler, seq) for seq in range(4)]
    worker = house.worker()
    step = house.engine.step_samples

    def raises() -> Any:
        if ops[1].id in house.engine._samples:
            raise RuntimeError("kernel exploded")
        return step()

    monkeypatch.setattr(house.engine, "step_samples", raises)
    settle(worker)
    assert [house.get(op).state for op in ops] == [OpState.DONE, OpState.FAILED, OpState.DONE, OpState.DONE]


@pytest.mark.parametrize("error", [CapacityError("busy"), CorruptError("disk full"), OSError(28, "no space left")])
def test_what_was_computed_waits_for_the_storage(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(recorder, "STORAGE_RETRY_S", 0.01)
    house = build()
    run = house.create_run()
    ops = train(house, run, range(2))
    finish = house.store.ops.finish
    refusals = iter([True, True, False] * 20)

    def refuses(me: Any, finished: Any, now: float) -> Any:
        if next(refusals):
            raise error
        return finish(me, finished, now)

    monkeypatch.setattr(house.store.ops, "finish", refuses)
    settle(house.worker())
    assert all(house.get(op).state is OpState.DONE for op in ops)
    assert_same(house, run, undisturbed(build, 2))


def test_a_disk_that_stays_full_for_any_number_of_workers_fails_nothing(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows still go to the disk, so the request is taken each time; its result's file doesn't, and the worker ends."""
    monkeypatch.setattr(recorder, "STORAGE_PATIENCE_S", 0.0)
    house = build(inline_bytes=10)
    run = house.create_run()
    settle(house.worker())
    op = house.forward_backward(run, 1, [1, 2, 3])

    def full(blobs: Blobs, key: BlobKey, pieces: Any) -> Any:
        raise OSError(28, "no space left")

    monkeypatch.setattr(Blobs, "put", full)
    for _ in range(2 * MAX_ATTEMPTS):
        worker = house.worker()
        with pytest.raises(StorageFullError, match="no space left"):
            run_until(worker, worker._me, house.store, threading.Event())
        house.store.workers.vacate(worker._me.slot)  # as the supervisor does
    monkeypatch.undo()
    settle(house.worker())
    assert house.get(op).state is OpState.DONE


def test_a_flood_of_new_runs_stays_a_queue(build: Callable[..., House]) -> None:
    """Memory holds the runs of the setting and those of one batch; another tenant's run is trained meanwhile."""
    house = build(max_resident_runs=4)
    for seed in range(40):
        house.create_run(seed=seed)
    house.be("bob")
    run = house.create_run()
    worker = house.worker()
    most = done_at = 0
    for turn in range(200):
        worker.step()
        most = max(most, len(house.engine._runs))
        if not done_at and house.engine.has_run(run):
            done_at = turn + 1
    settle(worker)
    assert most <= 4 + loop.MAX_NEW_RUNS
    assert done_at in range(1, 4)


KILLERS = ["create", "forward_backward", "optim_step", "save", "load", "sample"]


@pytest.mark.parametrize("kind", KILLERS)
def test_an_op_that_kills_its_worker_fails_alone(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The bad op's workers die while good ops of every kind are beside it; all those end as if nothing had been."""
    house = build(snapshot_debt_bytes=1)
    sampler = house.sampler()
    good = [house.create_run(seed=i) for i in range(3)]
    bad = house.create_run(seed=9)
    if kind != "create":
        house.save(bad, 1, "start")
        settle(house.worker())
    innocent = [op for run in good for op in train(house, run, range(2))]
    innocent += [house.sample(sampler, seq, max_tokens=8 * seq) for seq in range(1, 4)]
    killer = bad_op(house, bad, sampler, kind)
    deaths = 0
    for _ in range(12):
        worker = house.worker()
        die_of(house, monkeypatch, killer, bad)
        try:
            settle(worker)
            break
        except KeyboardInterrupt:
            deaths += 1
    assert deaths == 4
    failure = house.get(killer).failure
    assert failure is not None
    assert "ended its worker process each time" in failure.message
    assert all(house.get(op).state is OpState.DONE for op in innocent)
    for seed, run in enumerate(good):
        assert_same(house, run, alone(build, seed))


def alone(build: Callable[..., House], seed: int) -> dict[str, Any]:
    house = build(f"alone{seed}")
    run = house.create_run(seed=seed)
    train(house, run, range(2))
    settle(house.worker())
    return house.state(run).tensors


def bad_op(house: House, run: RunId, sampler: SamplerId, kind: str) -> OpRow:
    if kind == "create":
        with contextlib.closing(sqlite3.connect(house.root / DATABASE_FILE)) as connection:
            (op_id,) = connection.execute("SELECT op_id FROM ops WHERE run_id = ? AND seq_id = 0", (run,)).fetchone()
        return house.store.ops.get(house.tenant, op_id)
    if kind == "forward_backward":
        return house.forward_backward(run, 2, [1, 2])
    if kind == "optim_step":
        return house.optim_step(run, 2)
    if kind == "save":
        return house.save(run, 2, "again")
    if kind == "load":
        return house.load(run, 2, house.store.checkpoints.get(house.tenant, run, CheckpointKind.TRAINING, "start").blob)
    return house.sample(sampler, 0, max_tokens=64)


def die_of(house: House, monkeypatch: pytest.MonkeyPatch, killer: OpRow, run: RunId) -> None:
    """The engine of the newest worker ends its process when it meets the op."""
    engine = house.engine

    def dies(name: str, is_it: Callable[..., bool]) -> None:
        original = getattr(engine, name)

        def call(*args: Any, **options: Any) -> Any:
            if is_it(*args):
                raise KeyboardInterrupt
            return original(*args, **options)

        monkeypatch.setattr(engine, name, call)

    if killer.kind is OpKind.CREATE:
        dies("create_run", lambda spec: spec.run_id == run)
    elif killer.kind is OpKind.FORWARD_BACKWARD:
        dies("apply", lambda item, *_: item.op_id == killer.id)
    elif killer.kind is OpKind.OPTIM_STEP:
        dies("optim_step", lambda items: any(item.op_id == killer.id for item in items))
    elif killer.kind is OpKind.SAVE:
        dies("export_run", lambda run_id, parts=(): run_id == run and parts == ("param", "m", "v"))
    elif killer.kind is OpKind.LOAD:
        dies("import_run", lambda spec, state: spec.run_id == run and "grad/fake.lora_A" not in state.tensors)
    else:
        dies("step_samples", lambda: killer.id in engine._samples)


@contextlib.contextmanager
def locked(house: House, seconds: float) -> Iterator[None]:
    """Another program holds the database for so long."""
    with contextlib.closing(sqlite3.connect(house.root / DATABASE_FILE, check_same_thread=False)) as other:
        other.execute("BEGIN EXCLUSIVE")
        release = threading.Timer(seconds, other.rollback)
        release.start()
        try:
            yield
        finally:
            release.join()


def test_a_database_that_another_program_holds_for_a_moment_is_waited_for(build: Callable[..., House]) -> None:
    house = build(snapshot_debt_bytes=1)
    run = house.create_run()
    worker = house.worker()
    ops = train(house, run, range(1))
    for step in range(1, 4):
        with locked(house, 0.1):
            settle(worker)
            ops += train(house, run, range(step, step + 1))
    settle(worker)
    assert all(house.get(op).state is OpState.DONE for op in ops)
    assert_same(house, run, undisturbed(build, 4))


def test_a_database_that_another_program_keeps_costs_the_worker_and_no_request(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    house = build()
    run = house.create_run()
    ops = train(house, run, range(2))
    worker = house.worker()
    with locked(house, 0.5):
        with pytest.raises(CapacityError):
            settle(worker)
        with pytest.raises(CapacityError, match="busy"):
            house.forward_backward(run, 5, [1])
    settle(house.worker())
    assert all(house.get(op).state is OpState.DONE for op in ops)
    assert_same(house, run, undisturbed(build, 2))
