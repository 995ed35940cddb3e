"""How many sessions a tenant may have."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.conftest import World
from tinsmith.errors import CapacityError, ForbiddenError
from tinsmith.scopes import Scope
from tinsmith.store.rows import Principal
from tinsmith.store.session_bounds import HOUR_S, OPENED_AN_HOUR
from tinsmith.types import SessionId, TenantId

MOST = 8  # of which readers may hold one


def key(world: World, scope: Scope = Scope.FULL, tenant: TenantId | None = None) -> Principal:
    row, _ = world.store.tenants.create_key(tenant or world.tenant, "k", scope=scope)
    return Principal(row.tenant_id, row.tenant_name, row.key_id, row.scope)


def opened(world: World, by: Principal, now: float = 1.0) -> SessionId:
    return world.store.sessions.create(by.tenant_id, by=by, most=MOST, now=now).session_id


def test_no_more_live_at_one_time_than_may(world: World) -> None:
    by = key(world)
    sessions = [opened(world, by) for _ in range(MOST - 1)]  # beside that of the world
    with pytest.raises(CapacityError, match=r"8 sessions of yours are open already.*--max-sessions"):
        opened(world, by)
    bob = world.store.tenants.create("bob").tenant_id
    assert opened(world, key(world, tenant=bob))
    world.store.sessions.finish(world.tenant, sessions[0], "success", None, 2.0)
    assert opened(world, by)


def test_who_opens_and_ends_them_in_turn_is_bounded_by_the_hour(world: World) -> None:
    by = key(world)
    for _ in range(OPENED_AN_HOUR * MOST - 1):
        world.store.sessions.finish(world.tenant, opened(world, by), "success", None, 1.0)
    with pytest.raises(CapacityError, match="80 sessions of yours were opened within an hour"):
        opened(world, by)
    assert opened(world, by, now=1.0 + HOUR_S)


def test_keys_that_only_look_leave_room_for_those_that_train(world: World) -> None:
    reader, other, trainer = key(world, Scope.READ), key(world, Scope.READ), key(world)
    first = opened(world, reader)
    for by in (reader, other):
        with pytest.raises(CapacityError, match="1 sessions of keys of scope read are open"):
            opened(world, by)
    for _ in range(MOST - 2):
        opened(world, trainer)
    world.store.sessions.finish(world.tenant, first, "success", None, 2.0)
    assert opened(world, other)


def test_a_key_of_less_than_full_scope_keeps_alive_what_it_opened(world: World) -> None:
    reader, sampler, trainer = (key(world, scope) for scope in (Scope.READ, Scope.SAMPLE, Scope.FULL))
    mine, theirs = opened(world, reader), opened(world, trainer)
    beat: Any = world.store.sessions.beat
    beat(world.tenant, mine, 5.0, by=reader)
    beat(world.tenant, mine, 6.0, by=trainer)
    for by in (reader, sampler):
        with pytest.raises(ForbiddenError, match="keeping alive a session that another key opened needs"):
            beat(world.tenant, theirs, 5.0, by=by)
    assert world.store.sessions.get(world.tenant, mine).last_beat_at == 6.0
    assert world.store.sessions.get(world.tenant, theirs).last_beat_at == 1.0


def test_so_does_the_successor_of_the_key_that_opened_it(world: World) -> None:
    reader = key(world, Scope.READ)
    mine = opened(world, reader)
    key_id = reader.key_id
    for at in (5.0, 6.0):
        row, _ = world.store.tenants.rotate_key(key_id, 60.0)
        world.store.sessions.beat(world.tenant, mine, at, by=Principal(row.tenant_id, "", row.key_id, row.scope))
        assert world.store.sessions.get(world.tenant, mine).last_beat_at == at
        key_id = row.key_id
