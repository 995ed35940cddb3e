"""Where a request stands in its queue, as its client is told."""

from __future__ import annotations

from typing import Any

from tests.unit.conftest import World
from tinsmith.api import pace
from tinsmith.api.pace import PACE_OVER_S, Pace, Queue
from tinsmith.store.places import Place
from tinsmith.types import OpId, OpKind, TenantId

ALICE, BOB = TenantId("alice"), TenantId("bob")


def test_those_before_it_are_counted_by_tenant_and_by_run() -> None:
    rows = ((3, ALICE, "a:0"), (5, BOB, "b:0"), (6, ALICE, "a:1"), (9, ALICE, "a:0"))
    queue = Queue([(OpId(f"req-{num}"), Place(num), tenant, own) for num, tenant, own in rows])
    assert queue.ahead(3) == {}
    assert queue.ahead(6) == {ALICE: 1, BOB: 1}
    assert queue.ahead(10) == {ALICE: 3, BOB: 1}
    assert [queue.num_own(num, "a:0") for num in (3, 9, 10)] == [0, 1, 2]
    assert queue.num_own(10, "c:0") == 0
    assert Queue([]).ahead(7) == {}


def test_it_is_looked_up_again_after_a_while_and_not_before(world: World, monkeypatch: Any) -> None:
    clock = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(pace, "_look", lambda look: pace._Kept(look(), clock[0] + 1))
    run = world.run()
    told = Pace()
    assert told.queue(world.store.places, "tiny").ahead(10**6) == {world.tenant: 1}
    world.put(run, 1, OpKind.FORWARD)
    assert told.queue(world.store.places, "tiny").ahead(10**6) == {world.tenant: 1}
    clock[0] = 2.0
    assert told.queue(world.store.places, "tiny").ahead(10**6) == {world.tenant: 2}


def test_the_pace_is_that_of_requests_that_ended_lately(world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr(pace.time, "time", lambda: world.now)
    world.run()
    assert Pace().seconds_for(4, world.store.places, "tiny") is None
    world.work_off()
    assert Pace().seconds_for(4, world.store.places, "tiny") == 4 * PACE_OVER_S
    assert Pace().seconds_for(4, world.store.places, "tiny", BOB) is None
    world.tick(PACE_OVER_S + 1)
    assert Pace().seconds_for(4, world.store.places, "tiny") is None


def test_a_place_in_the_queue(world: World) -> None:
    run = world.run()
    early = world.put(run, 2).row
    place = world.store.places.of(early.id)
    assert place is not None
    assert place.missing == 1
    first = world.put(run, 1).row
    world.work_off()
    assert world.store.places.of(first.id) is None
