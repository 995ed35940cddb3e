"""A sampler without a name answers before its file is there, and a worker's death in between loses nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flow.house import House, settle
from tinsmith.files.blobs import Blobs
from tinsmith.store.rows import OpRow
from tinsmith.types import OpKind, OpState, Role, RunId, RunStatus, SamplerId, SessionId
from tinsmith.wire.meta import SaveSamplerMeta, to_meta
from tinsmith.worker import publishing
from tinsmith.worker.loop import Worker


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., House]]:
    with contextlib.ExitStack() as stack:

        def make(name: str = "house", **settings: Any) -> House:
            return stack.enter_context(contextlib.closing(House(tmp_path / name, **settings)))

        yield make


def train(house: House, run: RunId, seq: int) -> int:
    house.forward_backward(run, seq, [seq, 2, 3])
    house.optim_step(run, seq + 1)
    return seq + 2


def save(house: House, run: RunId, seq: int, number: int = 0, *, inflight: bool = False) -> tuple[SamplerId, OpRow]:
    sampler = SamplerId(f"{house.session}:sample:{number}")
    meta = to_meta(SaveSamplerMeta(None, sampler, SessionId(house.session), is_inflight=inflight))
    return sampler, house.enqueue(house.op(OpKind.SAVE_SAMPLER, run, seq, meta=meta, payload=None))


def slow_writer(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The worker's files are not written; what was to be written."""
    held_back: list[Any] = []

    def submit(job: Any, then: Any) -> None:
        held_back.append((job, then))

    monkeypatch.setattr(worker._writer, "submit", submit)
    return held_back


def steps(worker: Worker, until: Callable[[], bool]) -> None:
    for _ in range(300):
        if until():
            return
        worker._must_look = True
        worker.step()
    raise AssertionError("it didn't come to that")


def expected_tokens(build: Callable[..., House]) -> bytes:
    """Of the sampler after two steps, undisturbed."""
    house = build("undisturbed")
    run = house.create_run()
    seq = train(house, run, train(house, run, 1))
    sampler, _ = save(house, run, seq)
    train(house, run, seq + 1)
    worker = house.worker()
    settle(worker)
    op = house.sample(sampler, 0)
    settle(worker)
    return house.result(op)


def test_it_is_answered_and_sampled_before_its_file_is_there(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    house = build()
    run = house.create_run()
    seq = train(house, run, train(house, run, 1))
    sampler, saved = save(house, run, seq)
    train(house, run, seq + 1)
    worker = house.worker()
    held_back = slow_writer(worker, monkeypatch)
    steps(worker, lambda: house.get(saved).state is OpState.DONE)
    op = house.sample(sampler, 0)
    steps(worker, lambda: house.get(op).state is OpState.DONE)
    assert held_back
    assert house.store.samplers.get_any(sampler).promised_seq == seq
    assert house.result(op) == expected_tokens(build)


def test_a_death_before_the_file_loses_nothing(build: Callable[..., House], monkeypatch: pytest.MonkeyPatch) -> None:
    """The next worker computes the run again, publishes the same weights under the same key, and goes on."""
    expected = expected_tokens(build)
    house = build(snapshot_debt_bytes=1)
    run = house.create_run()
    seq = train(house, run, train(house, run, 1))
    sampler, saved = save(house, run, seq)
    after = train(house, run, seq + 1)
    worker = house.worker()
    settle_training(house, worker, monkeypatch, saved)
    promised = house.store.samplers.get_any(sampler)
    assert promised.promised_seq == seq
    assert house.store.runs.get(house.tenant, run).snapshot_seq < seq, "no snapshot goes past an unwritten sampler"

    op = house.sample(sampler, 0)
    settle(house.worker())
    assert house.result(op) == expected
    kept = house.store.samplers.get_any(sampler)
    assert kept.promised_seq is None
    assert kept.blob is not None
    assert promised.blob is not None
    assert kept.blob.startswith(promised.blob)
    assert house.blobs.exists(kept.blob)
    more = house.forward_backward(run, after, [7])
    again = house.sample(sampler, 1)
    settle(house.worker())
    assert house.get(more).state is OpState.DONE
    assert house.result(again) == expected


def settle_training(house: House, worker: Worker, monkeypatch: pytest.MonkeyPatch, saved: OpRow) -> None:
    """Everything is answered, nothing of a sampler is written; the worker dies."""
    submit = worker._writer.submit

    def loses_samplers(job: Any, then: Any) -> None:
        if "Publisher" not in job.__qualname__:
            submit(job, then)

    monkeypatch.setattr(worker._writer, "submit", loses_samplers)
    settle(worker)
    assert house.get(saved).state is OpState.DONE


def test_the_run_is_computed_again_though_nobody_asks(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    house = build()
    run = house.create_run()
    sampler, saved = save(house, run, train(house, run, 1))
    settle_training(house, house.worker(), monkeypatch, saved)
    settle(house.worker())
    assert house.store.samplers.get_any(sampler).promised_seq is None


def test_a_sampler_of_a_lost_run_says_so(build: Callable[..., House], monkeypatch: pytest.MonkeyPatch) -> None:
    house = build(inline_bytes=10)
    run = house.create_run()
    sampler, saved = save(house, run, train(house, run, 1))
    settle_training(house, house.worker(), monkeypatch, saved)
    for path in (house.root / "blobs").rglob("payloads/*"):
        path.unlink()
    op = house.sample(sampler, 0)
    settle(house.worker())
    assert house.store.runs.get(house.tenant, run).status is RunStatus.CORRUPTED
    failure = house.get(op).failure
    assert failure is not None
    assert failure.code == "corrupt"


def test_a_full_disk_delays_the_file_alone(build: Callable[..., House], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "RETRY_S", 0.01)
    house = build()
    put, refusals = Blobs.put, iter([True, True])

    def refuses(self: Blobs, key: Any, data: Any) -> Any:
        if "checkpoints" in key and next(refusals, False):
            raise OSError(28, "no space left")
        return put(self, key, data)

    monkeypatch.setattr(Blobs, "put", refuses)
    run = house.create_run()
    sampler, saved = save(house, run, train(house, run, 1))
    settle(house.worker())
    assert house.get(saved).state is OpState.DONE
    kept = house.store.samplers.get_any(sampler)
    assert kept.promised_seq is None
    assert kept.blob is not None
    assert house.blobs.exists(kept.blob)


def test_newer_inflight_weights_make_an_unwritten_file_superfluous(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    house = build()
    run = house.create_run()
    first, one = save(house, run, train(house, run, 1), 0, inflight=True)
    second, two = save(house, run, train(house, run, 4), 1, inflight=True)
    worker = house.worker()
    held_back = slow_writer(worker, monkeypatch)
    steps(worker, lambda: all(house.get(op).state is OpState.DONE for op in (one, two)))
    for job, then in held_back:
        then(job())
    blobs = {house.store.samplers.get_any(sampler).blob for sampler in (first, second)}
    assert len(blobs) == 1
    files = [path for path in (house.root / "blobs").rglob("checkpoints/*") if path.is_file()]
    assert [path.name for path in files] == [str(blob).rpartition("/")[2] for blob in blobs]


def test_a_worker_that_only_trains_answers_with_the_file(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch
) -> None:
    house = build()
    run = house.create_run()
    sampler, saved = save(house, run, train(house, run, 1))
    worker = house.worker()
    monkeypatch.setattr(worker._barriers, "_role", Role.TRAIN)
    settle(worker)
    assert house.get(saved).state is OpState.DONE
    assert house.store.samplers.get_any(sampler).promised_seq is None


def test_copies_that_wait_for_the_disk_are_bounded(build: Callable[..., House]) -> None:
    """Who saves faster than the disk writes waits, and nobody else does; then all of it is done."""
    house = build()
    run, other = house.create_run(), house.create_run()
    worker = house.worker()
    settle(worker)
    one = house.engine.run_bytes(house.store.runs.get(house.tenant, run).spec) // publishing.NUM_PARTS
    worker._unwritten._max_bytes = 3 * one
    with pytest.MonkeyPatch.context() as slow:
        held_back = slow_writer(worker, slow)
        saves = [save(house, run, 1 + number, number)[1] for number in range(20)]
        saves += [house.save(run, 21 + number, f"c{number}") for number in range(3)]
        behind, beside = house.optim_step(run, 24), house.forward_backward(other, 1, [1, 2, 3])
        steps(worker, lambda: house.get(beside).state is OpState.DONE)
        for _ in range(20):
            worker._must_look = True
            worker.step()
        assert (len(held_back), worker._unwritten.num_bytes) == (4, 4 * one)
        assert house.get(behind).state is OpState.QUEUED
    for job, then in held_back:
        worker._writer.submit(job, then)
    settle(worker)
    assert {house.get(op).state for op in [*saves, behind]} == {OpState.DONE}
    assert worker._unwritten.num_bytes == 0
