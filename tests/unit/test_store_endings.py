"""Ends are numbered as they are committed; inflight samplers of a run share its newest inflight weights."""

from __future__ import annotations

from typing import Any

import pytest

from tinsmith.errors import GoneError, NotFoundError, UnsupportedError
from tinsmith.store.end_rows import EndsAfter
from tinsmith.store.rows import NewSampler
from tinsmith.types import BlobKey, Failure, OpId, RunSpec, SamplerId, TenantId

BAD = Failure("invalid_request", "user", "bad")


def ended(world: Any, sampler: SamplerId, after: int = 0, first: int = 0, end: int = 2**60, limit: int = 100) -> Any:
    ends, last = world.store.endings.after(sampler, after, first, end, limit)
    return [(end.num, end.op_id, end.state.value) for end in ends], last


def test_every_end_has_a_number_without_gaps(world: Any) -> None:
    one, two = world.sampler(0), world.sampler(1)
    done, failed, cancelled = (world.sample(one, seq).row.id for seq in range(3))
    other = world.sample(two, 0).row.id
    assert ended(world, one) == ([], 0)
    world.claim(done, failed, other)
    world.finish(done, other)
    world.store.endings.cancel(world.tenant, cancelled, world.tick())
    born = world.sample(one, 3, failure=BAD).row.id
    world.fail(failed)
    expected = [(1, done, "done"), (2, cancelled, "cancelled"), (3, born, "failed"), (4, failed, "failed")]
    assert ended(world, one) == (expected, 4)
    assert ended(world, one, after=2) == (expected[2:], 4)
    assert ended(world, one, first=1, end=3) == ([expected[1], expected[3]], 4)
    assert ended(world, one, limit=1) == (expected[:1], 4)
    assert ended(world, two) == ([(1, other, "done")], 1)
    marks = [EndsAfter(one, 3), EndsAfter(one, 4), EndsAfter(two, 0), EndsAfter(SamplerId("none"), 0)]
    assert world.store.endings.reached(marks) == {marks[0], marks[2]}
    assert world.store.endings.reached([]) == set()


def test_an_end_counts_once(world: Any) -> None:
    sampler = world.sampler()
    op_id = world.sample(sampler, 0).row.id
    for _ in range(2):
        world.store.endings.cancel(world.tenant, op_id, world.tick())
    world.sample(sampler, 0, failure=BAD)
    assert ended(world, sampler) == ([(1, op_id, "cancelled")], 1)


def test_only_ones_own_samples_are_cancelled(world: Any) -> None:
    run = world.run()
    create = world.put(run, 1).row.id
    with pytest.raises(UnsupportedError, match="only sample requests"):
        world.store.endings.cancel(world.tenant, create, 1.0)
    mine = world.sample(world.sampler(), 0).row.id
    for tenant, op_id in ((TenantId("nobody"), mine), (world.tenant, OpId("none"))):
        with pytest.raises(GoneError, match="unknown or expired"):
            world.store.endings.cancel(tenant, op_id, 1.0)
    assert world.state(mine) == "queued"


def test_joining_numbers_the_clients_of_a_sampler(world: Any) -> None:
    one, two = world.sampler(0), world.sampler(1)
    assert [world.store.samplers.join(world.tenant, s) for s in (one, one, two, one)] == [1, 2, 1, 3]
    for tenant, sampler in ((TenantId("nobody"), one), (world.tenant, SamplerId("none"))):
        with pytest.raises(NotFoundError):
            world.store.samplers.join(tenant, sampler)


def test_inflight_samplers_follow_their_own_run(world: Any) -> None:
    runs = [world.run(number) for number in (0, 1)]

    def save(number: int, run: int, blob: str, is_inflight: bool = True) -> SamplerId:
        sampler = SamplerId(f"{world.session}:sample:{number}")
        spec = RunSpec(runs[run], "tiny")
        new = NewSampler(
            world.tenant, world.session, sampler, "tiny", None, runs[run], BlobKey(blob), spec, is_inflight=is_inflight
        )
        world.store.samplers.create(new, 1.0)
        return sampler

    samplers = [save(0, 0, "a"), save(1, 0, "b", is_inflight=False), save(2, 1, "c"), save(3, 0, "d")]
    assert [world.store.samplers.get(world.tenant, s).blob for s in samplers] == ["d", "b", "c", "d"]
    save(0, 0, "z")
    assert world.store.samplers.get(world.tenant, samplers[0]).blob == "d"
    assert world.store.checkpoints.collect(1000.0) == ["a"]


def test_queued_samples_are_counted_for_their_tenant(world: Any) -> None:
    sampler = world.sampler()
    ids = [world.sample(sampler, seq).row.id for seq in range(3)]
    world.put(world.run(), 1)
    assert world.store.loads.samples(world.tenant).requests == 3
    world.claim(ids[0])
    world.store.endings.cancel(world.tenant, ids[1], 1.0)
    assert world.store.loads.samples(world.tenant).requests == 1
    assert world.store.loads.samples(TenantId("nobody")).requests == 0


def test_what_waits_for_a_worker_alone_is_told_from_what_waits_for_a_request_to_come(world: Any) -> None:
    sampler = world.sampler()
    world.sample(sampler, 0)
    run, other = world.run(), world.run(1)
    for seq in (1, 2, 4, 5):
        world.put(run, seq)
    world.put(other, 2)
    ready = {"sample": 1, "creations": 2, "before the gap": 2}
    assert world.store.loads.ready() == {world.tenant: sum(ready.values())}
    world.put(run, 3)
    assert world.store.loads.ready() == {world.tenant: sum(ready.values()) + 3}
    world.work_off()
    assert world.store.loads.ready() == {}, "nothing of the other run can begin"
