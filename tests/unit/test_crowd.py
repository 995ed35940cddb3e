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

    def come(self, tenant_id: TenantId | None = None, *, can_leave: bool = True, is_poll: bool = True) -> Guest | None:
        """Who is turned away is gone at once."""
        guest = Guest(can_leave)
        is_in = self.crowd.come(guest) and (tenant_id is None or self.crowd.settle(guest, tenant_id, is_poll=is_poll))
        if len(self.crowd) <= len(self.inside):
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
    crowd = Crowd(24)
    for _ in range(21):
        assert crowd.settle(Guest(can_leave=False), ALICE, is_poll=True)
    refused = [Guest() for _ in range(3)]
    for guest in refused:
        assert crowd.come(guest)
        assert not crowd.settle(guest, ALICE, is_poll=True)
    for number, tenant_id in enumerate((BOB, TenantId("carol"))):
        came = Guest()
        assert crowd.come(came)
        assert crowd.settle(came, tenant_id, is_poll=True)
        assert [guest.has_left for guest in refused] == [True, number == 1, False]


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


def test_for_what_is_no_poll_ones_own_poll_makes_room() -> None:
    """Else whoever has one connection where they are scarce, and polls on it, could ask nothing. Its next poll can't:
    that one would come again at once, and drive out another."""
    door = Door(64)
    tenants = [TenantId(f"t{number}") for number in range(70)]
    polls = {tenant_id: door.come(tenant_id) for tenant_id in tenants}
    alice = tenants[0]
    own = polls[alice]
    assert own is not None
    assert door.come(alice) is None
    assert not own.has_left
    asked = door.come(alice, can_leave=False, is_poll=False)
    assert asked is not None
    assert own.has_left
    assert door.counts()[alice] == 1
    assert door.come(alice, is_poll=False) is None  # what it has is under way
    assert not any(guest.has_left for tenant_id, guest in polls.items() if guest is not None and tenant_id != alice)


def test_where_the_largest_cuts_nothing_the_next_makes_room() -> None:
    door = Door(80)
    while door.come(ALICE, can_leave=False):
        pass
    while door.come(BOB):
        pass
    assert door.counts() == {ALICE: 70, BOB: 5}
    for _ in range(3):
        while door.come(TenantId("carol")):
            pass
    counts = door.counts()
    assert counts[ALICE] == 70
    assert abs(counts[BOB] - counts[TenantId("carol")]) <= 1


def test_tenants_that_cut_nothing_leave_a_door_for_who_comes() -> None:
    """And whoever comes shows a key there, and is told so if there's no room for it."""
    door = Door(64)
    for number in range(100):
        door.come(TenantId(f"t{number}"), can_leave=False)
    assert door.counts().total() == 62
    assert None not in [door.come() for _ in range(10)]


@pytest.mark.parametrize("most", range(1, 10))
def test_the_first_is_let_in_however_few_there_may_be(most: int) -> None:
    assert Door(most).come(ALICE)


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
