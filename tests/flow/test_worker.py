"""The loop over real rows and files: order, sharing, exactly once in effect, replay, fencing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tests.flow.house import House, settle
from tinsmith.errors import FencedError
from tinsmith.fake_engine import FakePass
from tinsmith.types import CheckpointKind, FloatArray, OpKind, OpState, RunId, SamplerId
from tinsmith.wire import wire_pb2 as pb


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., House]]:
    """Houses in directories of their own, with settings, all closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(name: str = "house", **settings: Any) -> House:
            return stack.enter_context(contextlib.closing(House(tmp_path / name, **settings)))

        yield make


@pytest.fixture
def house(build: Callable[..., House]) -> House:
    return build()


def metrics(result: bytes) -> dict[str, float]:
    return dict(pb.ForwardBackwardOutput.FromString(result).metrics)


def train(house: House, run: RunId, steps: int, first_seq: int = 1) -> int:
    seq = first_seq
    for step in range(steps):
        house.forward_backward(run, seq, [step + 1, 2, 3])
        house.optim_step(run, seq + 1)
        seq += 2
    return seq


def undisturbed(build: Callable[..., House], steps: int) -> FloatArray:
    house = build("undisturbed")
    run = house.create_run()
    train(house, run, steps)
    settle(house.worker())
    return house.weights(run)


def test_sixteen_queued_runs_make_one_forward(house: House) -> None:
    runs = [house.create_run(seed=i) for i in range(16)]
    ops = [house.forward_backward(run, 1, [1, 2, 3]) for run in runs]
    settle(house.worker())
    assert house.engine.num_forwards == 1
    assert {metrics(house.result(op))["pass_runs:max"] for op in ops} == {16.0}


def test_early_arrivals_wait_and_then_run_in_order(house: House) -> None:
    run = house.create_run()
    third = house.optim_step(run, 3)
    second = house.forward_backward(run, 2, [4, 5])
    worker = house.worker()
    settle(worker)
    assert house.get(third).state is OpState.QUEUED
    house.forward_backward(run, 1, [1, 2])
    settle(worker)
    assert house.get(second).state is OpState.DONE
    assert msgspec.json.decode(house.result(third))["metrics"]["optimizer_step"] == 1.0


def test_a_failed_request_blocks_nobody(house: House) -> None:
    run = house.create_run()
    bad = house.enqueue(house.op(OpKind.FORWARD_BACKWARD, run, 1, payload=b"\xff\xff"))
    good = house.forward_backward(run, 2, [1, 2])
    settle(house.worker())
    failure = house.get(bad).failure
    assert failure is not None
    assert failure.category == "user"
    assert metrics(house.result(good))["loss:sum"] > 0


def test_gradients_accumulate_until_the_step(house: House) -> None:
    run = house.create_run()
    house.forward_backward(run, 1, [10])
    house.forward_backward(run, 2, [20])
    settle(house.worker())
    before = house.state(run).tensors["grad/fake.lora_A"].copy()
    np.testing.assert_allclose(before, np.float32(0.1) + np.float32(0.2))
    house.optim_step(run, 3)
    settle(house.worker())
    assert not house.state(run).tensors["grad/fake.lora_A"].any()


def test_a_new_worker_replays_what_no_snapshot_holds(build: Callable[..., House], house: House) -> None:
    run = house.create_run()
    seq = train(house, run, 3)
    settle(house.worker())
    trained = house.weights(run)
    probe = house.forward_backward(run, seq, [9], forward_only=True)
    settle(house.worker())
    np.testing.assert_array_equal(house.weights(run), trained)
    assert house.get(probe).state is OpState.DONE
    np.testing.assert_array_equal(trained, undisturbed(build, 3))


def test_recorded_results_are_never_changed_by_a_replay(house: House) -> None:
    run = house.create_run()
    op = house.forward_backward(run, 1, [1, 2, 3])
    settle(house.worker())
    first = house.get(op)
    house.forward_backward(run, 2, [4])
    settle(house.worker())
    assert house.get(op) == first


def test_a_snapshot_makes_older_payloads_superfluous(build: Callable[..., House]) -> None:
    house = build(snapshot_debt_bytes=1, inline_bytes=10)
    run = house.create_run()
    seq = train(house, run, 4)
    settle(house.worker())
    row = house.store.runs.get(house.tenant, run)
    assert row.snapshot_seq == seq - 1
    assert house.store.ops.replayable(run, row.snapshot_seq) == []
    left = {p.name.partition(".")[0] for p in (house.root / "blobs").rglob("*") if p.is_file() and "payload" in str(p)}
    assert left == {op.id for op in house.store.ops.replayable(run, row.previous_seq) if op.payload_bytes}
    assert row.previous_seq in range(row.snapshot_seq)
    trained = house.weights(run)
    train(house, run, 1, seq)
    settle(house.worker())
    assert house.engine.num_forwards == 1, "only the new request was computed"
    assert (house.weights(run) != trained).all()


def test_a_clean_stop_leaves_nothing_to_replay(house: House) -> None:
    run = house.create_run()
    seq = train(house, run, 2)
    worker = house.worker()
    settle(worker)
    trained = house.weights(run)
    worker.close()
    assert house.store.runs.get(house.tenant, run).snapshot_seq == seq - 1
    house.forward_backward(run, seq, [1], forward_only=True)
    settle(house.worker())
    np.testing.assert_array_equal(house.weights(run), trained)


def test_accumulated_gradients_survive_in_a_snapshot(build: Callable[..., House]) -> None:
    house = build()
    run = house.create_run()
    house.forward_backward(run, 1, [10])
    worker = house.worker()
    settle(worker)
    worker.close()
    house.optim_step(run, 2)
    settle(house.worker())
    other = build("other")
    same = other.create_run()
    other.forward_backward(same, 1, [10])
    other.optim_step(same, 2)
    settle(other.worker())
    np.testing.assert_array_equal(house.weights(run), other.weights(same))


def test_a_worker_that_lost_its_place_writes_nothing(house: House) -> None:
    run = house.create_run()
    old = house.worker()
    settle(old)
    house.worker()
    op = house.forward_backward(run, 1, [1])
    with pytest.raises(FencedError):
        settle(old)
    assert house.get(op).state is OpState.QUEUED


def test_what_was_running_at_the_crash_runs_again_once(
    build: Callable[..., House], house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = house.create_run()
    train(house, run, 1)
    worker = house.worker()
    finish = house.store.ops.finish

    def dies_on_the_step(me, finished, now):  # type: ignore[no-untyped-def]
        if any(b"optim_step" in (f.result or b"") for f in finished):
            raise KeyboardInterrupt
        return finish(me, finished, now)

    monkeypatch.setattr(house.store.ops, "finish", dies_on_the_step)
    with pytest.raises(KeyboardInterrupt):
        settle(worker)
    monkeypatch.setattr(house.store.ops, "finish", finish)
    settle(house.worker())
    np.testing.assert_array_equal(house.weights(run), undisturbed(build, 1))


def test_saves_and_loads(house: House) -> None:
    run = house.create_run()
    seq = train(house, run, 2)
    house.save(run, seq, "mid")
    settle(house.worker())
    saved = house.weights(run)
    checkpoint = house.store.checkpoints.get(house.tenant, run, CheckpointKind.TRAINING, "mid")
    seq = train(house, run, 2, seq + 1)
    house.load(run, seq, checkpoint.blob)
    settle(house.worker())
    np.testing.assert_array_equal(house.weights(run), saved)


def test_a_sampler_keeps_its_weights(house: House) -> None:
    run = house.create_run()
    sampler = SamplerId(f"{house.session}:sample:7")
    house.save_sampler(run, 1, sampler)
    worker = house.worker()
    settle(worker)
    first = house.sample(sampler, 0)
    settle(worker)
    train(house, run, 2, 2)
    settle(worker)
    second = house.sample(sampler, 1)
    settle(worker)
    assert house.result(first) == house.result(second)


def test_samples_cut_by_a_crash_give_the_same_tokens(house: House) -> None:
    sampler = house.sampler()
    whole = house.sample(sampler, 0, max_tokens=60)
    settle(house.worker())
    cut = house.sample(sampler, 1, max_tokens=60)
    worker = house.worker()
    worker.step()
    assert house.get(cut).state is OpState.RUNNING
    settle(house.worker())
    assert house.result(cut) == house.result(whole)


@pytest.mark.parametrize(("pack_s", "max_packs"), [(0.0, 12), (0.02, 3)])
def test_samples_go_on_while_a_long_request_trains(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch, pack_s: float, max_packs: int
) -> None:
    """20 sampler steps beside 30 packs: a step for each at least, and as many as fit into the time of a pack."""
    house = build(pass_max_tokens=4)
    run = house.create_run()
    worker = house.worker()
    settle(worker)
    packs, ended_at = [], []
    advance, step_samples = FakePass.advance, house.engine.step_samples

    def slow(self: FakePass, max_tokens: int) -> Any:
        time.sleep(pack_s)
        packs.append(advance(self, max_tokens))
        return packs[-1]

    def seen() -> Any:
        ended = step_samples()
        ended_at.extend([len(packs)] * len(ended))
        return ended

    monkeypatch.setattr(FakePass, "advance", slow)
    monkeypatch.setattr(house.engine, "step_samples", seen)
    sample = house.sample(house.sampler(), 0, max_tokens=80)
    long = house.forward_backward(run, 1, [1, 2, 3], copies=30)
    settle(worker)
    first, last = house.get(sample).finished_at, house.get(long).finished_at
    assert first is not None
    assert last is not None
    assert first < last
    assert ended_at[0] <= max_packs


@pytest.mark.parametrize(("share", "fewest_packs", "most_packs"), [(0.1, 6, 11), (4.0, 1, 4)])
def test_sampling_gets_its_share_of_the_time(
    build: Callable[..., House], monkeypatch: pytest.MonkeyPatch, share: float, fewest_packs: int, most_packs: int
) -> None:
    """32 sampler steps of 4 ms beside ten packs of 40 ms: after how many packs the sample has ended."""
    house = build(pass_max_tokens=4, sampling_share=share)
    run = house.create_run()
    worker = house.worker()
    settle(worker)
    packs: list[Any] = []
    advance, step_samples = FakePass.advance, house.engine.step_samples

    def slow(self: FakePass, max_tokens: int) -> Any:
        time.sleep(0.04)
        packs.append(advance(self, max_tokens))
        return packs[-1]

    def slow_step() -> Any:
        time.sleep(0.004)
        return step_samples()

    monkeypatch.setattr(FakePass, "advance", slow)
    monkeypatch.setattr(house.engine, "step_samples", slow_step)
    house.forward_backward(run, 1, [1, 2, 3], copies=10)
    sample = house.sample(house.sampler(), 0, max_tokens=240)
    while house.get(sample).state is not OpState.DONE:
        worker.step()
    assert fewest_packs <= len(packs) <= most_packs


def test_runs_beyond_the_limit_leave_memory_and_come_back(build: Callable[..., House]) -> None:
    house = build(max_resident_runs=2)
    runs = [house.create_run(seed=i) for i in range(5)]
    for run in runs:
        train(house, run, 1)
    worker = house.worker()
    settle(worker)
    resident = [run for run in runs if house.engine.has_run(run)]
    assert len(resident) <= 2
    gone = next(run for run in runs if run not in resident)
    op = house.forward_backward(gone, 3, [5])
    settle(worker)
    assert house.get(op).state is OpState.DONE
    assert house.state(gone).step == 1


def test_an_engine_error_fails_one_request_and_spares_the_others(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = house.create_run(seed=1), house.create_run(seed=2)
    worker = house.worker()
    settle(worker)
    apply = house.engine.apply

    def breaks_on_one(item, num_runs, num_tokens):  # type: ignore[no-untyped-def]
        if item.run_id == bad:
            raise RuntimeError("kernel exploded")
        return apply(item, num_runs, num_tokens)

    monkeypatch.setattr(house.engine, "apply", breaks_on_one)
    fine = house.forward_backward(good, 1, [1, 2])
    broken = house.forward_backward(bad, 1, [1, 2])
    settle(worker)
    assert house.get(fine).state is OpState.DONE
    failure = house.get(broken).failure
    assert failure is not None
    assert failure.category == "server"
    monkeypatch.setattr(house.engine, "apply", apply)
    after = house.optim_step(bad, 2)
    settle(worker)
    assert house.get(after).state is OpState.DONE


def test_a_tenants_waiting_samples_keep_no_other_out_of_the_engine(tmp_path: Path) -> None:
    house = House(tmp_path, max_resident_samples=4)
    try:
        worker = house.worker()
        sampler = house.sampler()
        for seq in range(20):
            house.sample(sampler, seq, max_tokens=250)
        worker.step()
        assert house.engine.num_samples == 4
        house.be("bob")
        op = house.sample(house.sampler(), 0, max_tokens=8)
        time.sleep(0.06)
        worker.step()
        worker.step()
        assert house.get(op).state == "done"
    finally:
        house.close()


def test_a_long_pass_keeps_no_other_tenant_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request of a hundred packs; another tenant's run is made, trained and stepped beside it."""
    house = House(tmp_path, pass_max_tokens=10)
    try:
        worker = house.worker()
        long_run = house.create_run()
        settle(worker)
        state = house.state(long_run)
        long_op = house.forward_backward(long_run, 1, [1] * 10, copies=100)
        own_next = house.optim_step(long_run, 2)
        worker.step()
        alice = house.tenant
        house.be("bob")
        run = house.create_run()
        short = [house.forward_backward(run, 1, [1, 2, 3]), house.optim_step(run, 2)]
        time.sleep(0.06)
        for _ in range(12):
            worker.step()
        assert [house.get(op).state for op in short] == ["done", "done"]
        assert house.store.ops.get(alice, long_op.id).state == "running"
        assert house.store.ops.get(alice, own_next.id).state == "queued"
        for part, array in house.state(long_run).tensors.items():
            np.testing.assert_array_equal(array, state.tensors[part])
        settle(worker)
        assert house.store.ops.get(alice, long_op.id).state == "done"
        assert house.store.ops.get(alice, own_next.id).state == "done"
    finally:
        house.close()


def test_a_pass_that_fails_half_way_leaves_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = FakePass.advance

    def failing(self: FakePass, max_work: int) -> Any:
        if len(self._items[0].data) > 9 and len(self._left) < 50:
            raise RuntimeError("half way")
        return advance(self, max_work)

    monkeypatch.setattr(FakePass, "advance", failing)
    house = House(tmp_path, pass_max_tokens=10)
    try:
        worker = house.worker()
        run = house.create_run()
        settle(worker)
        bad = house.forward_backward(run, 1, [1] * 10, copies=100)
        worker.step()
        alice = house.tenant
        house.be("bob")
        other = house.create_run()
        good = house.forward_backward(other, 1, [1] * 10, copies=5)
        settle(worker)
        assert house.get(good).state == "done"
        failure = house.store.ops.get(alice, bad.id).failure
        assert failure is not None
        assert failure.code == "internal"
        again = house.store.ops.get(alice, bad.id).attempts
        assert again == 1, "alone in its pass, it isn't tried again"
    finally:
        house.close()


def test_rest_is_waited_for_while_a_file_is_being_written(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `settle`, on which the other tests rely."""
    put = house.blobs.put

    def slow(*args: Any) -> Any:
        time.sleep(0.4)
        return put(*args)

    worker = house.worker()
    run = house.create_run()
    settle(worker)
    monkeypatch.setattr(house.blobs, "put", slow)
    op = house.save(run, 1, "slow")
    settle(worker)
    assert house.get(op).state == "done"


def test_passes_of_tenants_share_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tenant's stream of small passes and another's long one: neither has all of it."""
    advance = FakePass.advance

    def slow(self: FakePass, max_work: int) -> Any:
        time.sleep(0.003)
        return advance(self, max_work)

    monkeypatch.setattr(FakePass, "advance", slow)
    house = House(tmp_path, pass_max_tokens=10)
    try:
        worker = house.worker()
        long_run = house.create_run()
        settle(worker)
        long_op = house.forward_backward(long_run, 1, [1] * 10, copies=60)
        worker.step()
        alice = house.tenant
        house.be("bob")
        run = house.create_run()
        num_done = 0
        for _ in range(1000):
            if house.store.ops.get(alice, long_op.id).state == "done":
                break
            num_done += 1
            op = house.forward_backward(run, num_done, [1] * 10, copies=3)
            while house.get(op).state != "done":
                worker._must_look = True
                worker.step()
        assert 2 < num_done < 200
    finally:
        house.close()
