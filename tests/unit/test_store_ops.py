from __future__ import annotations

import contextlib
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import sqlite

from tinsmith.errors import FencedError, GoneError, NotFoundError
from tinsmith.store import DATABASE_FILE, Store, open_store, ops, waiting
from tinsmith.store.rows import Finished, NewCheckpoint, NewOp, NewRun, NewSampler, OpRow
from tinsmith.types import (
    BlobKey,
    CheckpointKind,
    Failure,
    OpId,
    OpKind,
    OpState,
    Role,
    RunId,
    RunSpec,
    SamplerId,
    TenantId,
)

BASE = "tiny"
BAD = Failure("invalid_request", "user", "send something else")


def blob(name: str) -> BlobKey:
    return BlobKey(f"tenants/t/area/{name}")


def test_create_run_makes_run_and_op(world: Any) -> None:
    made = world.create(0)
    assert made.is_new
    assert made.row.kind is OpKind.CREATE
    run = world.store.runs.get(world.tenant, made.row.run_id)
    assert run.spec == RunSpec(made.row.run_id, BASE, rank=8)
    assert (run.head_seq, run.epoch, run.lease_owner, run.snapshot_seq, run.status) == (0, 0, None, -1, "creating")
    assert run.user_metadata == {"color": "red"}


def test_create_run_again_gives_the_first_op(world: Any) -> None:
    first, second = world.create(0), world.create(0)
    assert not second.is_new
    assert second.row == first.row


def test_rejected_create_leaves_an_op_and_no_run(world: Any) -> None:
    made = world.create(0, failure=BAD)
    assert made.row.state is OpState.FAILED
    with pytest.raises(NotFoundError):
        world.store.runs.get(world.tenant, made.row.run_id)
    with pytest.raises(NotFoundError):
        world.put(made.row.run_id, 1)
    again = world.create(0)
    assert not again.is_new
    assert again.row.id == made.row.id


def test_get_returns_what_was_enqueued(world: Any) -> None:
    run = world.run()
    meta = {"seed": 7, "sample_sequence_ids": ["a"]}
    made = world.put(run, 1, OpKind.FORWARD, meta=meta, cost_tokens=12, payload=b"\x00body", payload_bytes=5)
    assert made.row == world.store.ops.get(world.tenant, made.row.id)
    assert made.row.meta == meta
    assert made.row.payload == b"\x00body"


def test_seq_ids_are_64_bit(world: Any) -> None:
    sampler = world.sampler()
    made = world.sample(sampler, 2**63 - 1)
    assert world.store.ops.get(world.tenant, made.row.id).seq_id == 2**63 - 1


def test_duplicate_returns_the_first_row_untouched(world: Any) -> None:
    run = world.run()
    first = world.put(run, 1, payload=b"one")
    before = world.store.runs.get(world.tenant, run)
    second = world.put(run, 1, payload=b"two")
    assert not second.is_new
    assert second.row == first.row
    assert world.store.runs.get(world.tenant, run) == before


def test_duplicate_of_a_finished_op_shows_its_outcome(world: Any) -> None:
    run = world.run()
    world.work_off()
    first = world.put(run, 1)
    world.work_off()
    assert world.put(run, 1).row == world.store.ops.get(world.tenant, first.row.id)


def test_duplicate_sample(world: Any) -> None:
    sampler, other = world.sampler(0), world.sampler(1)
    first = world.sample(sampler, 5)
    assert world.sample(sampler, 5).row == first.row
    assert world.sample(other, 5).is_new
    assert world.sample(sampler, 2).is_new


def test_an_op_belongs_to_a_run_or_a_sampler(world: Any) -> None:
    with pytest.raises(ValueError):
        world.put(None, 1)
    with pytest.raises(ValueError):
        world.store.ops.create_run(
            NewRun(world.tenant, world.session, 0, RunSpec(RunId("r"), BASE)), world.op(RunId("q"), 0), world.now
        )


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(1, 9)), st.sets(st.integers(1, 8)), st.lists(st.integers(1, 8), max_size=6))
def test_head_is_the_contiguous_prefix_in_any_order(order: list[int], rejected: set[int], again: list[int]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store = open_store(Path(directory), synchronous="NORMAL")
        tenant = store.tenants.create("a").tenant_id
        session = store.sessions.create(tenant).session_id
        worker = store.workers.register("w0", BASE, 10.0, 0.0)
        run = RunId(f"{session}:train:0")

        def op(seq: int, kind: OpKind = OpKind.FORWARD) -> NewOp:
            name = OpId(f"req-{seq}")
            return NewOp(
                tenant_id=tenant, kind=kind, base_model=BASE, id=name, seq_id=seq, run_id=run,
                failure=BAD if seq in rejected else None,
            )  # fmt: skip

        store.ops.create_run(NewRun(tenant, session, 0, RunSpec(run, BASE)), op(0, OpKind.CREATE), 0.0)
        store.runs.lease(worker, BASE, 10, 0.0)
        arrived = {0}
        for seq in order:
            assert store.ops.enqueue(op(seq), 1.0).is_new
            arrived.add(seq)
            for duplicate in again:
                if duplicate in arrived:
                    assert not store.ops.enqueue(op(duplicate), 1.0).is_new
            head = next(n for n in range(10) if n + 1 not in arrived)
            assert store.runs.get(tenant, run).head_seq == head
            expected = [n for n in range(head + 1) if n not in rejected]
            assert [row.seq_id for row in store.waiting.all(worker, BASE, 100).ops] == expected
        store.close()


def test_the_head_moves_over_a_long_row_of_early_arrivals(world: Any) -> None:
    run = world.run()
    for seq in range(2, 602):
        world.put(run, seq)
    assert world.head(run) == 0
    world.put(run, 1)
    assert world.head(run) == 601


def test_runnable_has_leased_runs_and_all_samples_without_payload(world: Any) -> None:
    run, sampler = world.run(0), world.sampler()
    sample = world.sample(sampler, 0)
    assert [op.id for op in world.runnable()] == [sample.row.id]
    world.lease()
    world.put(run, 1)
    rows = world.runnable()
    assert [(op.run_id, op.seq_id) for op in rows] == [(run, 0), (run, 1), (None, 0)]
    assert all(op.payload is None for op in rows)
    assert world.store.waiting.all(world.worker, "other", 10).ops[-1].run_id == run
    assert {op.kind for op in world.store.waiting.all(world.worker, BASE, 10, Role.SAMPLE).ops} == {OpKind.SAMPLE}
    assert [
        op.seq_id for op in world.store.waiting.all(world.worker, BASE, 10, Role.TRAIN).ops if op.run_id == run
    ] == [
        0,
        1,
    ]
    assert len(world.store.waiting.all(world.worker, BASE, 10, Role.TRAIN).ops) == 2


def test_runnable_beyond_the_limit_serves_every_run_and_tenant(world: Any) -> None:
    runs = [world.run(n) for n in range(3)]
    for run in runs:
        for seq in range(1, 5):
            world.put(run, seq)
    world.lease()
    cut = world.runnable(limit=7)
    seen = [(op.run_id, op.seq_id) for op in cut]
    assert seen == sorted(seen)
    assert {run: max(s for r, s in seen if r == run) for run in runs} == {runs[0]: 2, runs[1]: 1, runs[2]: 1}

    sampler = world.sampler()
    for seq in range(5):
        world.sample(sampler, seq)
    bob = world.store.tenants.create("bob").tenant_id
    session = world.store.sessions.create(bob).session_id
    theirs = SamplerId(f"{session}:sample:0")
    world.store.samplers.create(NewSampler(bob, session, theirs, BASE), 1.0)
    world.sample(theirs, 0, tenant_id=bob)
    samples = [op for op in world.runnable(limit=3) if op.kind is OpKind.SAMPLE]
    assert [op.tenant_id for op in samples] == [world.tenant, world.tenant, bob]


def test_claim_takes_each_op_once(world: Any) -> None:
    run = world.run()
    op = world.put(run, 1, payload=b"body").row
    assert world.claim(op.id) == []
    world.lease()
    (claimed,) = world.claim(op.id)
    assert (claimed.state, claimed.owner, claimed.attempts, claimed.payload) == (OpState.RUNNING, "w0", 1, b"body")
    assert claimed.started_at == world.now
    assert world.claim(op.id) == []


def test_claim_keeps_the_order_asked_for(world: Any) -> None:
    run = world.run()
    ids = [world.put(run, seq).row.id for seq in range(1, 6)]
    world.lease()
    assert [op.id for op in world.claim(*reversed(ids))] == list(reversed(ids))


def test_finish_records_results_and_failures(world: Any) -> None:
    run = world.run()
    good, bad = world.put(run, 1).row.id, world.put(run, 2).row.id
    world.lease()
    world.claim(good, bad)
    assert list(world.finish(good)) == [good]
    assert list(world.fail(bad)) == [bad]
    row = world.store.ops.get(world.tenant, good)
    assert (row.state, row.result, row.result_bytes, row.finished_at) == (OpState.DONE, b"r", 1, world.now - 1)
    failed = world.store.ops.get(world.tenant, bad)
    assert (failed.state, failed.failure, failed.result) == (OpState.FAILED, BAD, None)
    assert world.store.ops.final_among([good, bad, OpId("nope")]) == {good, bad}


def test_a_final_op_keeps_its_outcome(world: Any) -> None:
    run = world.run()
    op_id = world.put(run, 1).row.id
    world.lease()
    world.claim(op_id)
    world.finish(op_id)
    before = world.store.ops.get(world.tenant, op_id)
    checkpoint = NewCheckpoint(run, CheckpointKind.TRAINING, "x", blob("x"), 1, "00")
    assert list(world.finish(op_id, checkpoint=checkpoint)) == []
    assert list(world.fail(op_id)) == []
    assert world.store.ops.get(world.tenant, op_id) == before
    assert world.store.checkpoints.list_run(world.tenant, run) == []


def test_finish_makes_checkpoint_and_sampler_or_nothing(world: Any) -> None:
    run = world.run()
    op_id = world.put(run, 1, OpKind.SAVE_SAMPLER).row.id
    world.lease()
    world.claim(op_id)
    checkpoint = NewCheckpoint(run, CheckpointKind.SAMPLER, "x", blob("x"), 1, "00")
    foreign = NewSampler(TenantId("nobody"), world.session, SamplerId("s"), BASE)
    with pytest.raises(NotFoundError):
        world.finish(op_id, checkpoint=checkpoint, sampler=foreign)
    assert world.state(op_id) is OpState.RUNNING
    assert world.store.checkpoints.list_run(world.tenant, run) == []
    sampler = NewSampler(world.tenant, world.session, SamplerId("s"), BASE, None, run, blob("x"), RunSpec(run, BASE))
    world.finish(op_id, checkpoint=checkpoint, sampler=sampler)
    assert world.store.samplers.get(world.tenant, SamplerId("s")).spec == RunSpec(run, BASE)
    assert [c.name for c in world.store.checkpoints.list_run(world.tenant, run)] == ["x"]


def test_finish_demands_a_claim_and_a_known_op(world: Any) -> None:
    run = world.run()
    op_id = world.put(run, 1).row.id
    world.lease()
    with pytest.raises(FencedError):
        world.finish(op_id)
    with pytest.raises(NotFoundError):
        world.finish(OpId("nope"))
    with pytest.raises(ValueError):
        world.store.ops.finish(world.worker, [Finished(op_id, OpState.CANCELLED)], 1.0)
    with pytest.raises(ValueError):
        world.store.ops.finish(world.worker, [Finished(op_id, OpState.FAILED)], 1.0)


def test_status_follows_the_create_op(world: Any) -> None:
    good, bad = world.create(0).row, world.create(1).row
    world.lease()
    world.claim(good.id, bad.id)
    world.finish(good.id)
    world.fail(bad.id)
    assert world.store.runs.get(world.tenant, good.run_id).status == "ready"
    assert world.store.runs.get(world.tenant, bad.run_id).status == "failed"


def test_unclaim_is_as_if_never_claimed(world: Any) -> None:
    run = world.run()
    op = world.put(run, 1).row
    world.lease()
    world.claim(op.id)
    world.store.ops.unclaim(world.worker, [op.id])
    row = world.store.ops.get(world.tenant, op.id)
    assert (row.state, row.attempts, row.started_at) == (OpState.QUEUED, 0, None)
    world.claim(op.id)
    world.finish(op.id)
    world.store.ops.unclaim(world.worker, [op.id])
    assert world.state(op.id) is OpState.DONE


def test_replayable_lists_done_effects_above_the_snapshot(world: Any) -> None:
    run = world.run()
    kinds = [OpKind.FORWARD_BACKWARD, OpKind.FORWARD, OpKind.OPTIM_STEP, OpKind.SAVE, OpKind.FORWARD_BACKWARD]
    ids = [world.put(run, n, kind).row.id for n, kind in enumerate(kinds, 1)]
    world.lease()
    world.claim(*[op.id for op in world.runnable()][1:])
    world.finish(*ids[:4])
    world.fail(ids[4])
    rows = world.store.ops.replayable(run, 0)
    assert [(op.seq_id, op.payload) for op in rows] == [(1, b"p"), (3, b"p")]
    assert [op.seq_id for op in world.store.ops.replayable(run, 1)] == [3]


def test_payloads_are_dropped_when_no_replay_needs_them(world: Any) -> None:
    run = world.run()
    effect = world.put(run, 1, payload=None, payload_blob=blob("fb")).row.id
    forward = world.put(run, 2, OpKind.FORWARD, payload=None, payload_blob=blob("f")).row.id
    small = world.put(run, 3, OpKind.SAVE).row.id
    failed = world.put(run, 4, payload=None, payload_blob=blob("bad")).row.id
    born = world.put(run, 5, payload=None, payload_blob=blob("born"), failure=BAD).row
    world.lease()
    world.claim(effect, forward, small, failed)
    world.finish(effect, forward, small)
    world.fail(failed)
    get = world.store.ops.get
    assert get(world.tenant, effect).payload_blob == blob("fb")
    assert get(world.tenant, forward).payload_blob is None
    assert get(world.tenant, small).payload is None
    assert born.payload_blob is None
    assert set(world.store.checkpoints.collect(world.now + 100)) == {blob("f"), blob("bad"), blob("born")}
    assert world.store.checkpoints.collect(world.now + 100) == []


def test_prune_forgets_what_no_kept_snapshot_leaves_to_be_replayed(world: Any) -> None:
    run = world.run()
    for seq in (1, 2, 3):
        world.put(run, seq, payload=None, payload_blob=blob(str(seq)))
    world.work_off()
    prune, record = world.store.runs.prune_payloads, world.store.runs.record_snapshot
    assert prune(run) == []
    record(world.worker, run, 2, blob("snap"), 10, world.now)
    assert prune(run) == [], "should the snapshot be damaged, the log is whole"
    record(world.worker, run, 3, blob("snap3"), 10, world.now)
    assert prune(run) == [blob("1"), blob("2")]
    assert prune(run) == []
    assert [op.seq_id for op in world.store.ops.replayable(run, 2)] == [3]
    assert prune(RunId("nope")) == []


def test_many_payloads_are_forgotten_in_short_transactions(world: Any) -> None:
    run = world.run()
    for seq in range(1, 150):
        world.put(run, seq, payload=None, payload_blob=blob(str(seq)))
    world.work_off()
    for seq in (148, 149):
        world.store.runs.record_snapshot(world.worker, run, seq, blob(f"snap{seq}"), 10, world.now)
    assert len(world.store.runs.prune_payloads(run)) == 148
    row = world.store.runs.get(world.tenant, run)
    assert (row.pruned_seq, row.has_previous) == (148, True)


def test_queue_position(world: Any) -> None:
    run, sampler = world.run(), world.sampler()
    sample = world.sample(sampler, 0).row.id
    first, early = world.put(run, 1).row.id, world.put(run, 4).row.id
    position = world.store.ops.queue_position
    assert position(sample) == (1, None)
    assert position(first) == (2, None)
    assert position(early) == (3, 2)
    world.put(run, 2)
    assert position(early) == (3, 3)
    world.work_off()
    assert position(first) == (0, None)
    assert position(early) == (0, 3)
    assert position(OpId("nope")) == (0, None)


def test_expired_results_are_gone(world: Any) -> None:
    run = world.run()
    op_id = world.put(run, 1).row.id
    world.lease()
    world.claim(*[op.id for op in world.runnable()])
    done = Finished(op_id, OpState.DONE, result_blob=blob("r"), result_bytes=9000)
    world.store.ops.finish(world.worker, [done], 2000.0)
    assert world.store.ops.expire_results(2000.0, 5000.0) == 0
    assert world.store.ops.expire_results(2001.0, 5000.0) == 1
    assert world.store.ops.expire_results(2001.0, 5000.0) == 0
    with pytest.raises(GoneError):
        world.store.ops.get(world.tenant, op_id)
    assert not world.put(run, 1).is_new
    assert world.store.checkpoints.collect(5100.0) == [blob("r")]


def test_empty_calls_do_nothing(store: Store, world: Any) -> None:
    assert store.ops.claim(world.worker, [], 1.0) == []
    assert store.ops.finish(world.worker, [], 1.0) == []
    assert store.ops.final_among([]) == set()
    store.ops.unclaim(world.worker, [])
    store.runs.release(world.worker, [])


def test_requests_of_one_batch_stand_by_themselves(world: Any) -> None:
    run = world.run()

    def new(name: str, seq_id: int, run_id: RunId = run) -> NewOp:
        return NewOp(
            tenant_id=world.tenant, kind=OpKind.OPTIM_STEP, base_model=BASE, id=OpId(name), seq_id=seq_id, run_id=run_id
        )

    good, bad = [new("b2", 2), new("b1", 1), new("b2 again", 2)], new("bad", 1, RunId("nobody"))
    first, refused, second, again = world.store.ops.enqueue_all([good[0], bad, good[1], good[2]], 5.0)
    assert isinstance(refused, NotFoundError)
    assert (first.is_new, second.is_new, again.is_new) == (True, True, False)
    assert again.row.id == "b2"
    assert world.store.runs.get(world.tenant, run).head_seq == 2
    found = world.store.ops.get_all([(world.tenant, OpId("b1")), (world.tenant, OpId("bad"))])
    assert isinstance(found[0], OpRow)
    assert isinstance(found[1], GoneError)


@pytest.mark.parametrize("statement", [waiting._RUNNABLE_IN_RUNS, ops._CLAIM._statement], ids=["runnable", "claim"])
def test_idle_runs_are_not_looked_at(world: Any, tmp_path: Path, statement: Any) -> None:
    """The plan goes from the queue to the runs of what is in it; a worker may hold thousands of others."""
    text = str(statement.compile(dialect=sqlite.dialect()))
    with contextlib.closing(sqlite3.connect(next(tmp_path.rglob(DATABASE_FILE)))) as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {text}", ["0"] * text.count("?"))]
    of_runs = [step for step in plan if " runs " in step]
    assert of_runs
    assert all("run_id=?" in step for step in of_runs), plan
