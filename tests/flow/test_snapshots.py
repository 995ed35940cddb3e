"""Snapshots: when they are taken, what is kept beside them, and what a damaged one costs."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog

from tests.flow.house import House, settle, train
from tinsmith.files.blobs import snapshot_key
from tinsmith.observe import series
from tinsmith.store.upkeep import Naming
from tinsmith.types import OpState, RunId, RunStatus, SamplerId
from tinsmith.upkeep.verify import verify
from tinsmith.worker import held, snapshots
from tinsmith.worker.loop import Worker


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., House]]:
    with contextlib.ExitStack() as stack:

        def make(name: str = "house", **settings: Any) -> House:
            return stack.enter_context(contextlib.closing(House(tmp_path / name, **settings)))

        yield make


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as entries:
        yield entries


def undisturbed(build: Callable[..., House], steps: int) -> dict[str, Any]:
    house = build("undisturbed")
    run = house.create_run()
    train(house, run, range(steps))
    settle(house.worker())
    return dict(house.state(run).tensors)


def assert_same(house: House, run: RunId, expected: dict[str, Any]) -> None:
    tensors = house.state(run).tensors
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors[name], tensor, err_msg=name)


def files(house: House, area: str) -> list[Path]:
    return [path for path in (house.root / "blobs").rglob("*") if path.is_file() and area in path.parts]


def newest(house: House, run: RunId) -> Path:
    return house.root / "blobs" / str(house.store.runs.get(house.tenant, run).snapshot_blob)


def previous(house: House, run: RunId) -> Path:
    return house.root / "blobs" / str(house.store.runs.get(house.tenant, run).previous_blob)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def live(house: House, run: RunId, steps: int) -> None:
    """A process for each two steps, each with a snapshot at its end."""
    for start in range(0, steps, 2):
        train(house, run, range(start, start + 2))
        settle(house.worker())


@pytest.mark.parametrize("harm", [flip, tear, Path.unlink])
def test_without_its_newest_snapshot_a_run_goes_on_from_the_one_before(
    build: Callable[..., House], logged: list[Any], harm: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []
    monkeypatch.setattr(series.DAMAGED, "add", lambda: counted.append("damaged"))
    house = build(snapshot_debt_bytes=1, inline_bytes=10)
    run, other = house.create_run(), house.create_run(seed=2)
    live(house, run, 4)
    before = house.store.runs.get(house.tenant, run)
    assert before.has_previous
    harm(newest(house, run))
    (finding,) = verify(house.store, house.blobs).findings
    assert finding.owner == f"{Naming.SNAPSHOT} of {run}"
    assert "nothing is lost" in finding.cure

    worker = house.worker()
    settle(worker)
    assert not house.engine.has_run(run), "a run is restored when it is next needed"
    last = train(house, run, range(4, 6))
    fine = house.forward_backward(other, 1, [9])
    settle(worker)
    assert all(house.get(op).state is OpState.DONE for op in [*last, fine])
    assert_same(house, run, undisturbed(build, 6))
    (loud,) = [entry for entry in logged if entry["log_level"] == "error"]
    assert loud["event"].startswith("snapshot damaged")
    assert (loud["run_id"], loud["snapshot"], loud["above"]) == (run, before.snapshot_blob, before.previous_seq)
    assert loud["replays"] > 0
    assert counted == ["damaged"]

    report = verify(house.store, house.blobs)
    assert report.findings == []
    assert [replaced for replaced, _ in report.replaced] == [run]
    after = house.store.runs.get(house.tenant, run)
    assert after.status is RunStatus.READY
    assert (after.snapshot_seq, after.has_previous) == (12, True)


def test_without_its_only_snapshot_a_run_is_computed_again_from_its_log(build: Callable[..., House]) -> None:
    house = build(inline_bytes=10)
    run = house.create_run()
    train(house, run, range(2))
    worker = house.worker()
    settle(worker)
    worker.close()
    assert house.store.runs.get(house.tenant, run).previous_seq == -1
    flip(newest(house, run))
    house.forward_backward(run, 5, [3, 2, 3])
    house.optim_step(run, 6)
    settle(house.worker())
    assert_same(house, run, undisturbed(build, 3))


@pytest.mark.parametrize("healed", [newest, previous])
def test_without_both_it_is_given_up_and_either_brings_it_back(
    build: Callable[..., House], healed: Callable[[House, RunId], Path]
) -> None:
    house = build(snapshot_debt_bytes=1)
    run = house.create_run()
    live(house, run, 4)
    whole = {path: path.read_bytes() for path in (newest(house, run), previous(house, run))}
    for path in whole:
        flip(path)
    lost = house.forward_backward(run, 9, [9])
    settle(house.worker())
    failure = house.get(lost).failure
    assert failure is not None
    assert failure.code == "corrupt"
    findings = verify(house.store, house.blobs).findings
    assert len(findings) == 2
    assert any("restore a backup" in finding.cure for finding in findings)
    path = healed(house, run)
    path.write_bytes(whole[path])
    again = house.forward_backward(run, 10, [1], forward_only=True)
    settle(house.worker())
    assert house.get(again).state is OpState.DONE
    assert_same(house, run, undisturbed(build, 4))


@pytest.mark.parametrize("harmed", [newest, previous])
def test_a_repair_does_without_the_damaged_snapshot(
    build: Callable[..., House], harmed: Callable[[House, RunId], Path]
) -> None:
    house = build(snapshot_debt_bytes=1, inline_bytes=10)
    run = house.create_run()
    live(house, run, 4)
    flip(harmed(house, run))
    assert not verify(house.store, house.blobs).is_sound
    report = verify(house.store, house.blobs, is_repairing=True)
    assert report.is_sound
    assert [finding.is_repaired for finding in report.findings] == [True]
    assert verify(house.store, house.blobs).findings == []
    house.forward_backward(run, 9, [5, 2, 3])
    house.optim_step(run, 10)
    settle(house.worker())
    assert_same(house, run, undisturbed(build, 5))


def test_samplers_and_gradients_above_the_snapshot_before_come_back_too(build: Callable[..., House]) -> None:
    house, calm = build(snapshot_debt_bytes=1), build("calm")
    tokens = []
    for each in (house, calm):
        run = each.create_run()
        train(each, run, range(1))
        settle(each.worker())
        sampler = SamplerId(f"{each.session}:sample:0")
        each.forward_backward(run, 3, [7])
        settle(each.worker())
        each.save_sampler(run, 4, sampler)
        each.forward_backward(run, 5, [8])
        settle(each.worker())
        if each is house:
            flip(newest(house, run))
        each.optim_step(run, 6)
        sample = each.sample(sampler, 0)
        settle(each.worker())
        tokens.append(each.result(sample))
        states = each.state(run).tensors
    assert tokens[0] == tokens[1]
    assert_same(house, RunId(f"{house.session}:train:0"), dict(states))


def test_after_a_crash_a_run_is_restored_when_it_is_next_needed_and_no_sooner(build: Callable[..., House]) -> None:
    house = build()
    runs = [house.create_run(seed=seed) for seed in range(30)]
    for run in runs:
        train(house, run, range(5))
    settle(house.worker())
    worker = house.worker()
    settle(worker)
    assert not any(house.engine.has_run(run) for run in runs)
    first = house.forward_backward(runs[7], 11, [1])
    settle(worker)
    assert house.get(first).state is OpState.DONE
    assert [run for run in runs if house.engine.has_run(run)] == [runs[7]]
    rest = [house.forward_backward(run, 12 if run == runs[7] else 11, [1]) for run in runs]
    settle(worker)
    assert all(house.get(op).state is OpState.DONE for op in rest)


def test_the_debt_of_bytes_starts_a_snapshot(build: Callable[..., House]) -> None:
    house = build(snapshot_debt_bytes=4 * payload_bytes(build("sizes")), snapshot_debt_s=1e9)
    run = house.create_run()
    worker = house.worker()
    seqs = []
    for seq in range(1, 11):
        house.forward_backward(run, seq, [1, 2, 3])
        settle(worker)
        seqs.append(house.store.runs.get(house.tenant, run).snapshot_seq)
    assert seqs == [-1, -1, -1, 4, 4, 4, 4, 8, 8, 8]


def payload_bytes(house: House) -> int:
    return house.forward_backward(house.create_run(), 1, [1, 2, 3]).payload_bytes


def test_the_debt_of_seconds_starts_a_snapshot(build: Callable[..., House]) -> None:
    house = build(snapshot_debt_bytes=2**40, snapshot_debt_s=10.0)
    run = house.create_run()
    worker = house.worker()
    applied = worker.runs.applied
    worker.runs.applied = lambda op, seconds: applied(op, 4.0 if op.seq_id else 0.0)  # type: ignore[method-assign]
    seqs = []
    for seq in range(1, 8):
        house.forward_backward(run, seq, [1, 2, 3])
        settle(worker)
        seqs.append(house.store.runs.get(house.tenant, run).snapshot_seq)
    assert seqs == [-1, -1, 3, 3, 3, 6, 6]


@pytest.mark.parametrize(("num_runs", "are_snapshotted"), [(1, False), (5, True)])
def test_runs_in_memory_share_the_seconds_that_may_be_owed(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch, num_runs: int, are_snapshotted: bool
) -> None:
    monkeypatch.setattr(snapshots, "WORTH", 0.0)
    house = build(snapshot_debt_bytes=2**40, snapshot_debt_s=40.0)
    runs = [house.create_run(seed=seed) for seed in range(num_runs)]
    worker = house.worker()
    applied = worker.runs.applied
    worker.runs.applied = lambda op, seconds: applied(op, 4.0 if op.seq_id else 0.0)  # type: ignore[method-assign]
    for seq in range(1, 6):
        for run in runs:
            house.forward_backward(run, seq, [1, 2, 3])
        settle(worker)
    assert all((house.store.runs.get(house.tenant, run).snapshot_seq >= 2) == are_snapshotted for run in runs)


def test_a_run_owes_its_part_unless_snapshots_are_too_dear() -> None:
    assert snapshots.most_debt_s(10.0, 1, 0.0) == 10.0
    assert snapshots.most_debt_s(10.0, 20, 0.0) == 0.5
    assert snapshots.most_debt_s(10.0, 20, 0.1) == snapshots.WORTH * 0.1
    assert snapshots.most_debt_s(10.0, 20, 1.0) == 10.0


def test_what_is_kept_is_two_snapshots_and_the_payloads_of_two_debts(build: Callable[..., House]) -> None:
    size = payload_bytes(build("sizes"))
    house = build(snapshot_debt_bytes=3 * size, inline_bytes=10)
    run = house.create_run()
    worker = house.worker()
    for seq in range(1, 16):
        house.forward_backward(run, seq, [1, 2, 3])
        settle(worker)
        assert len(files(house, "snapshots")) <= 2
        assert len(files(house, "payloads")) <= 2 * 3


def test_a_full_disk_costs_a_snapshot_and_nothing_else(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch, logged: list[Any]
) -> None:
    monkeypatch.setattr(held, "FIRST_RETRY_S", 0.0)
    house = build(snapshot_debt_bytes=1, inline_bytes=10)
    run = house.create_run()
    worker = house.worker()
    settle(worker)
    put, is_full = house.blobs.put, threading.Event()
    is_full.set()

    def full(key: Any, data: Any) -> Any:
        if "/snapshots/" in key and is_full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        return put(key, data)

    monkeypatch.setattr(house.blobs, "put", full)
    ops = train(house, run, range(2))

    def refused() -> list[Any]:
        return [entry for entry in logged if entry["event"].startswith("snapshot failed")]

    turn_until(worker, lambda: all(house.get(op).state is OpState.DONE for op in ops))
    num_refused = len(refused())
    turn_until(worker, lambda: len(refused()) > num_refused + 2)  # again and again, though nothing new has come
    assert all("No space left" in entry["error"] and entry["log_level"] == "error" for entry in refused())
    assert files(house, "snapshots") == []
    is_full.clear()
    settle(worker)
    assert house.store.runs.get(house.tenant, run).snapshot_seq == 4
    assert house.blobs.get(house.store.runs.get(house.tenant, run).snapshot_blob or "")


def test_pauses_between_tries_grow() -> None:
    one = held.HeldRun(row=None, snapshot=None, snapshot_seq=-1, applied_seq=-1, replays={})  # type: ignore[arg-type]
    assert [one.snapshot_failed() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_file_that_a_dead_writer_left_goes_with_the_next_snapshot(build: Callable[..., House]) -> None:
    house = build(snapshot_debt_bytes=1)
    run, other = house.create_run(), house.create_run(seed=2)
    left = house.blobs.put(snapshot_key(house.tenant, run, 1), b"of a worker that died before the row").key
    beside = house.blobs.put(snapshot_key(house.tenant, other, 1), b"of another run").key
    train(house, run, range(2))
    settle(house.worker())
    assert not house.blobs.exists(left)
    assert house.blobs.exists(beside)
    assert len([path for path in files(house, "snapshots") if path.parent.name.endswith("train-0")]) == 2


def test_copies_that_wait_for_the_disk_are_few(build: Callable[..., House], monkeypatch: pytest.MonkeyPatch) -> None:
    house = build(snapshot_debt_bytes=1)
    worker = house.worker()
    ran = hold_writer(worker)
    runs = [house.create_run(seed=seed) for seed in range(12)]
    for run in runs:
        house.forward_backward(run, 1, [1, 2])
    turn_until(worker, lambda: len(worker.runs.residency) == len(runs))
    turn_until(worker, lambda: worker._writer.num_pending == snapshots.MAX_COPIES)
    for _ in range(20):
        worker.step()
    assert worker._writer.num_pending == snapshots.MAX_COPIES
    ran.set()
    settle(worker)
    assert all(house.store.runs.get(house.tenant, run).snapshot_seq == 1 for run in runs)


def turn_until(worker: Worker, condition: Callable[[], bool]) -> None:
    """Let the worker take turns until it is so."""
    until = time.monotonic() + 30
    while not condition():
        worker._must_look = True
        worker.step()
        time.sleep(0.001)
        assert time.monotonic() < until


def hold_writer(worker: Worker) -> threading.Event:
    """The writer waits until the event is set; each job of it."""
    ran, submit = threading.Event(), worker._writer.submit

    def later(job: Callable[[], Any], then: Callable[[Any], None]) -> None:
        def wait() -> Any:
            ran.wait(30)
            return job()

        submit(wait, then)

    worker._writer.submit = later  # type: ignore[method-assign]
    return ran
