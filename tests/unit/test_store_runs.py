from __future__ import annotations

from typing import Any

import pytest

from tinsmith.errors import FencedError, NotFoundError
from tinsmith.store.rows import Finished, NewCheckpoint, WorkerId
from tinsmith.types import BlobKey, CheckpointKind, Failure, OpKind, OpState, Role, RunId, TenantId

BASE = "tiny"
BAD = Failure("invalid_request", "user", "send something else")


def blob(name: str) -> BlobKey:
    return BlobKey(f"tenants/t/area/{name}")


def test_list_is_newest_first_and_paged(world: Any) -> None:
    runs = [world.run(n) for n in range(3)]
    page, total = world.store.runs.list(world.tenant, 2, 0)
    assert ([r.run_id for r in page], total) == ([runs[2], runs[1]], 3)
    page, total = world.store.runs.list(world.tenant, 2, 2)
    assert ([r.run_id for r in page], total) == ([runs[0]], 3)


def test_requests_touch_the_run(world: Any) -> None:
    run = world.run()
    world.tick(50)
    world.put(run, 1)
    assert world.store.runs.get(world.tenant, run).last_request_at == world.now


def test_lease_takes_free_runs_with_work_once(world: Any) -> None:
    first, second = world.run(0), world.run(1)
    leased = world.lease()
    assert [(r.run_id, r.epoch, r.lease_owner) for r in leased] == [(first, 1, "w0"), (second, 1, "w0")]
    assert world.lease() == []
    assert [r.run_id for r in world.store.runs.held(world.worker)] == [first, second]
    assert world.store.runs.lease(world.worker, "other", 10, world.now) == []


def test_a_run_without_runnable_work_stays_free(world: Any) -> None:
    run = world.run()
    world.work_off()
    world.store.runs.release(world.worker, [run])
    assert world.lease() == []
    world.put(run, 2)
    assert world.lease() == []
    world.put(run, 1)
    assert [(r.run_id, r.epoch) for r in world.lease()] == [(run, 2)]


def test_a_rejected_request_alone_needs_no_worker(world: Any) -> None:
    run = world.run()
    world.work_off()
    world.store.runs.release(world.worker, [run])
    world.put(run, 2)
    world.put(run, 3, failure=BAD)
    assert world.lease() == []
    world.put(run, 1, failure=BAD)
    assert [r.run_id for r in world.lease()] == [run]
    world.work_off()
    world.store.runs.release(world.worker, [run])
    world.put(run, 4, failure=BAD)
    assert world.lease() == []


def test_release_hands_claimed_ops_back(world: Any) -> None:
    run = world.run()
    op_id = world.put(run, 1).row.id
    world.lease()
    world.claim(op_id)
    world.store.runs.release(world.worker, [run])
    row = world.store.ops.get(world.tenant, op_id)
    assert (row.state, row.attempts) == (OpState.QUEUED, 0)
    assert [r.run_id for r in world.lease()] == [run]


def test_a_living_worker_keeps_its_runs(world: Any) -> None:
    run = world.run()
    world.lease()
    other = world.store.workers.register("w1", BASE, 100.0, world.now)
    world.put(run, 1)
    assert world.lease(other) == []
    world.store.workers.renew(world.worker, 10.0, world.now + 9)
    assert world.store.runs.lease(other, BASE, 10, world.now + 15) == []


def test_takeover_from_a_silent_worker(world: Any) -> None:
    run, sampler = world.run(), world.sampler()
    op_id, sample = world.put(run, 1).row.id, world.sample(sampler, 0).row.id
    world.lease()
    world.claim(op_id, sample)
    other = world.store.workers.register("w1", BASE, 100.0, world.now)
    world.tick(20)
    assert [(r.run_id, r.epoch, r.lease_owner) for r in world.lease(other)] == [(run, 2, "w1")]
    for queued in (op_id, sample):
        row = world.store.ops.get(world.tenant, queued)
        assert (row.state, row.attempts) == (OpState.QUEUED, 1)

    for write in (
        lambda: world.finish(op_id),
        lambda: world.finish(sample),
        lambda: world.claim(sample),
        lambda: world.store.ops.unclaim(world.worker, [op_id]),
        lambda: world.store.runs.release(world.worker, [run]),
        lambda: world.store.runs.record_snapshot(world.worker, run, 1, blob("s"), 1, world.now),
        lambda: world.store.workers.renew(world.worker, 10.0, world.now),
    ):
        with pytest.raises(FencedError):
            write()
    assert world.state(op_id) is OpState.QUEUED
    claimed = world.store.ops.claim(other, [op_id, sample], world.now)
    assert [op.attempts for op in claimed] == [2, 2]
    assert list(world.finish(op_id, sample, worker=other)) == [op_id, sample]


def test_a_late_renewal_saves_the_lease_if_nobody_came(world: Any) -> None:
    run = world.run()
    world.lease()
    world.tick(60)
    world.store.workers.renew(world.worker, 10.0, world.now)
    other = world.store.workers.register("w1", BASE, 100.0, world.now)
    assert world.lease(other) == []
    assert world.store.runs.get(world.tenant, run).lease_owner == "w0"


def test_finish_is_fenced_for_a_run_that_another_holds(world: Any) -> None:
    mine, lost = world.run(0), world.run(1)
    mine_op, lost_op = world.put(mine, 1).row.id, world.put(lost, 1).row.id
    world.lease()
    world.claim(mine_op, lost_op)
    world.store.runs.release(world.worker, [lost])
    checkpoint = NewCheckpoint(mine, CheckpointKind.TRAINING, "x", blob("x"), 1, "00")
    with pytest.raises(FencedError):
        world.store.ops.finish(
            world.worker,
            [Finished(mine_op, OpState.DONE, b"r", checkpoint=checkpoint), Finished(lost_op, OpState.DONE, b"r")],
            world.now,
        )
    assert world.state(mine_op) is OpState.RUNNING
    assert world.store.checkpoints.list_run(world.tenant, mine) == []


def test_a_new_process_in_the_slot_fences_the_old_one(world: Any) -> None:
    run = world.run()
    op_id = world.put(run, 1).row.id
    world.lease()
    world.claim(op_id)
    again = world.store.workers.register("w0", BASE, 10.0, world.now)
    assert again == WorkerId("w0", 2)
    assert world.state(op_id) is OpState.QUEUED
    with pytest.raises(FencedError):
        world.finish(op_id)
    assert [(r.run_id, r.epoch) for r in world.lease(again)] == [(run, 2)]


def test_a_base_is_ready_once_it_is_trained_and_sampled(world: Any) -> None:
    trainer = world.store.workers.register("t", "b", 100.0, world.now, Role.TRAIN)
    sampler = world.store.workers.register("s", "b", 100.0, world.now, Role.SAMPLE)
    world.store.workers.set_ready(trainer)
    assert "b" not in world.store.workers.ready_bases(world.now)
    world.store.workers.set_ready(sampler)
    assert "b" in world.store.workers.ready_bases(world.now)
    world.store.workers.vacate("t")
    assert "b" not in world.store.workers.ready_bases(world.now)
    assert [worker.role for worker in world.store.workers.list()] == [Role.SAMPLE, Role.TRAIN, Role.ALL]


def test_deregister_gives_everything_back(world: Any) -> None:
    run = world.run()
    world.lease()
    world.store.workers.set_ready(world.worker)
    assert world.store.workers.ready_bases(world.now) == {BASE}
    assert world.store.workers.ready_bases(world.now + 100) == set()
    world.store.workers.deregister(world.worker)
    assert world.store.workers.ready_bases(world.now) == set()
    assert world.store.runs.get(world.tenant, run).lease_owner is None
    with pytest.raises(FencedError):
        world.store.workers.renew(world.worker, 10.0, world.now)
    with pytest.raises(FencedError):
        world.store.workers.set_ready(world.worker)
    world.store.workers.deregister(world.worker)
    assert world.store.workers.register("w0", BASE, 10.0, world.now).incarnation == 3
    assert [w.slot for w in world.store.workers.list()] == ["w0"]


def test_record_snapshot_moves_forward_only_and_keeps_the_one_before(world: Any) -> None:
    run = world.run()
    with pytest.raises(FencedError):
        world.store.runs.record_snapshot(world.worker, run, 0, blob("s0"), 5, world.now)
    world.lease()
    record = world.store.runs.record_snapshot
    assert record(world.worker, run, 0, blob("s0"), 5, world.now).gone is None
    assert record(world.worker, run, 2, blob("s2"), 5, world.now).gone is None
    assert record(world.worker, run, 1, blob("s1"), 5, world.now).gone is None
    assert kept(world, run) == [(2, blob("s2")), (0, blob("s0"))]
    assert world.store.checkpoints.collect(world.now + 100) == [blob("s1")]
    assert record(world.worker, run, 2, blob("s2b"), 5, world.now).gone == blob("s2")
    assert kept(world, run) == [(2, blob("s2b")), (0, blob("s0"))]
    assert record(world.worker, run, 3, blob("s3"), 5, world.now).gone == blob("s0")
    assert kept(world, run) == [(3, blob("s3")), (2, blob("s2b"))]


def test_a_damaged_snapshot_is_replaced_and_the_one_before_it_stays(world: Any) -> None:
    run = world.run()
    world.lease()
    record = world.store.runs.record_snapshot
    record(world.worker, run, 0, blob("s0"), 5, world.now)
    record(world.worker, run, 2, blob("s2"), 5, world.now)
    assert world.store.upkeep.damaged_snapshots() == []
    assert record(world.worker, run, 3, blob("s3"), 5, world.now, is_newest_damaged=True).gone == blob("s2")
    assert kept(world, run) == [(3, blob("s3")), (0, blob("s0"))]
    assert world.store.upkeep.damaged_snapshots() == [(run, world.now)]


def kept(world: Any, run: RunId) -> list[tuple[int, str]]:
    row = world.store.runs.get(world.tenant, run)
    return [(row.snapshot_seq, row.snapshot_blob), (row.previous_seq, row.previous_blob)]


def test_the_attempts_of_a_killing_op_add_up(world: Any) -> None:
    run = world.run()
    op_id = world.put(run, 1).row.id
    worker = world.worker
    for deaths in range(3):
        world.lease(worker)
        (claimed,) = world.store.ops.claim(worker, [op_id], world.now)
        assert claimed.attempts == deaths + 1
        worker = world.store.workers.register("w0", BASE, 10.0, world.now)


def test_another_tenants_run_is_not_found(world: Any) -> None:
    run = world.run()
    world.put(run, 1)
    bob = world.store.tenants.create("bob").tenant_id
    with pytest.raises(NotFoundError):
        world.store.runs.get(bob, run)
    with pytest.raises(NotFoundError):
        world.put(run, 2, tenant_id=bob)
    with pytest.raises(NotFoundError):
        world.put(run, 1, OpKind.FORWARD, tenant_id=bob)
    assert world.store.runs.list(bob, 10, 0) == ([], 0)
    with pytest.raises(NotFoundError):
        world.store.runs.get(TenantId("nobody"), RunId("nothing"))
