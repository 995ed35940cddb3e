"""Who has the connections: random comings and goings, and the shares that come of them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from tinsmith.api.crowd import SPARE, Crowd
from tinsmith.types import TenantId

ALICE, BOB = TenantId("alice"), TenantId("bob")


@dataclass(eq=False)
class Guest:
    """One that polls, or is idle, as long as it can leave."""

    can_leave: bool = True
    has_left: bool = False

    def may_leave(self) -> bool:
        return self.can_leave

    def leave(self) -> None:
        assert not self.has_left
        self.has_left = True


@dataclass
class Door:
    """A crowd, and who is in it."""

    most: int
    inside: list[tuple[Guest, TenantId | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.crowd = Crowd(self.most)

    def come(self, tenant_id: TenantId | None = None, *, can_leave: bool = True) -> Guest | None:
        """Who is turned away is gone at once."""
        guest = Guest(can_leave)
        is_in = self.crowd.come(guest) and (tenant_id is None or self.crowd.settle(guest, tenant_id))
        self.inside = [(there, of) for there, of in self.inside if not there.has_left]
        if not is_in:
            self.crowd.gone(guest)
            return None
        self.inside.append((guest, tenant_id))
        return guest

    def counts(self) -> Counter[TenantId | None]:
        return Counter(of for _, of in self.inside)


def test_one_alone_has_seven_eighths_and_loses_none_for_more_of_its_own() -> None:
    door = Door(12_000)
    polls = [door.come(ALICE) for _ in range(10_500)]
    assert None not in polls
    assert [door.come(ALICE) for _ in range(3)] == [None] * 3
    assert door.counts() == {ALICE: 10_500}


def test_who_comes_later_gets_as_much_and_it_ends_there() -> None:
    """Those who were told to leave and come again, at once, move nothing."""
    door = Door(80)
    while door.come(ALICE):
        pass
    assert door.counts() == {ALICE: 70}
    while door.come(BOB):
        pass
    assert door.counts() == {ALICE: 35, BOB: 35}
    for tenant_id in (ALICE, BOB, BOB, ALICE):
        assert door.come(tenant_id) is None
    assert door.counts() == {ALICE: 35, BOB: 35}


def test_what_is_under_way_is_not_cut_and_others_have_the_last_part() -> None:
    door = Door(80)
    while door.come(ALICE, can_leave=False):
        pass
    while door.come(BOB):
        pass
    assert door.counts() == {ALICE: 70, BOB: 5}
    assert door.come(TenantId("carol"))


def test_strangers_make_room_for_everybody_the_oldest_first() -> None:
    door = Door(16)
    strangers = [door.come() for _ in range(16)]
    tenants = [door.come(ALICE) for _ in range(14)]
    assert None not in tenants
    assert sum(guest is not None and guest.has_left for guest in strangers) >= 14
    first, second, third = (door.come() for _ in range(3))
    assert None not in (first, second, third)
    assert [guest is not None and guest.has_left for guest in (first, second, third)] == [True, False, False]
    assert len(door.crowd) <= 16


def test_a_stranger_who_is_answered_is_left_alone() -> None:
    door = Door(16)
    answered = door.come(can_leave=False)
    for _ in range(40):
        door.come()
    assert answered is not None
    assert not answered.has_left


def test_who_was_turned_away_makes_room_until_he_is_gone() -> None:
    crowd = Crowd(16)
    for _ in range(14):
        assert crowd.settle(Guest(can_leave=False), ALICE)
    refused = [Guest() for _ in range(2)]
    for guest in refused:
        assert crowd.come(guest)
        assert not crowd.settle(guest, ALICE)
    for number, tenant_id in enumerate((BOB, TenantId("carol"))):
        came = Guest()
        assert crowd.come(came)
        assert crowd.settle(came, tenant_id)
        assert [guest.has_left for guest in refused] == [True, number == 1]


def test_strangers_that_make_room_leave_no_tenant_more_than_its_share() -> None:
    door = Door(80)
    for _ in range(300):
        door.come()
        door.come(ALICE, can_leave=False)
    assert door.counts()[ALICE] == 70
    assert door.come(BOB)
    assert door.come(TenantId("carol"))


def test_where_one_cuts_nothing_short_many_others_still_get_their_next() -> None:
    door = Door(672)
    others = [TenantId(f"t{number}") for number in range(50)]
    for tenant_id in others * 10:
        assert door.come(tenant_id)
    while door.come(ALICE, can_leave=False):
        pass
    for tenant_id in others:
        assert door.come(tenant_id)
    assert door.counts()[ALICE] == 88
    assert door.come(BOB)


@pytest.mark.parametrize("seed", range(5))
def test_there_are_never_more_than_may_be_and_nobody_with_few_is_turned_away(seed: int) -> None:
    dice, door = random.Random(seed), Door(64)
    tenants = [TenantId(f"t{number}") for number in range(5)]
    for _ in range(4000):
        if dice.random() < 0.3 and door.inside:
            guest, _ = door.inside.pop(dice.randrange(len(door.inside)))
            door.crowd.gone(guest)
            continue
        tenant_id = dice.choice([*tenants, ALICE, ALICE, ALICE, None])
        came = door.come(tenant_id)
        assert len(door.crowd) == len(door.inside) <= 64
        if came is None and tenant_id is not None:
            counts = door.counts()
            assert counts[tenant_id] >= max(counts[of] for of in (*tenants, ALICE)) - 1
            assert sum(counts.values()) >= 64 - 64 // SPARE
