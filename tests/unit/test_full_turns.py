"""Turns at the places for snapshots of full runs."""

from __future__ import annotations

from tinsmith.types import TenantId
from tinsmith.worker.full_turns import TURN_S, FullTurns

ANN, BOB = TenantId("ann"), TenantId("bob")


def test_those_that_are_open_serve_and_free_places_are_given() -> None:
    turns = FullTurns()
    assert turns.choose([(ANN, "a"), (BOB, "b")], {}, 2, 0.0) == {"a", "b"}
    assert turns.choose([(ANN, "a"), (BOB, "c")], {"a": True, "b": False}, 1, 0.1) == {"a", "c"}
    assert turns.choose([], {"a": True}, 1, 0.2) == frozenset()


def test_an_idle_one_that_is_wanted_keeps_its_place() -> None:
    turns = FullTurns()
    wanted = [(ANN, "c"), (ANN, "a")]
    assert turns.choose(wanted, {"a": False, "b": True}, 1, 0.0) == {"a"}
    assert turns.choose(wanted, {"a": False, "b": False}, 2, 0.1) == {"a", "c"}


def test_tenants_take_turns() -> None:
    """A tenant with many snapshots doesn't hold back one with a single one."""
    turns = FullTurns()
    wanted = [(ANN, "a1"), (BOB, "b"), (ANN, "a2"), (ANN, "a3")]
    assert turns.choose(wanted, {}, 1, 0.0) == {"a1"}
    assert turns.choose(wanted[1:], {"a1": False}, 1, 1.0) == {"b"}
    assert turns.choose(wanted[1:], {"a1": False}, 1, 1.1) == {"b"}, "it is chosen until it is there"
    assert turns.choose(wanted[2:], {"b": False}, 1, 2.0) == {"a2"}


def test_nobody_holds_a_place_for_ever() -> None:
    """Requests without end: the others wait for a turn and for what is under way, and so does the first then."""
    turns = FullTurns()
    both = [(ANN, "a"), (BOB, "b")]
    assert turns.choose(both[:1], {}, 1, 0.0) == {"a"}
    assert turns.choose(both, {"a": True}, 0, 1.0) == {"a"}
    assert turns.choose(both, {"a": True}, 0, 1.0 + TURN_S) == frozenset(), "it takes no further requests"
    assert turns.choose(both, {"a": True}, 0, 2.0 + TURN_S) == frozenset()
    assert turns.choose(both, {"a": False}, 1, 3.0 + TURN_S) == {"b"}
    at = 4.0 + TURN_S
    assert turns.choose(both, {"b": True}, 0, at) == {"b"}
    assert turns.choose(both, {"b": True}, 0, at + TURN_S) == frozenset()
    assert turns.choose(both, {"b": False}, 1, at + TURN_S) == {"a"}


def test_who_was_closed_opens_again_when_nobody_waits_any_more() -> None:
    turns = FullTurns()
    both = [(ANN, "a"), (BOB, "b")]
    turns.choose(both, {"a": True}, 0, 0.0)
    assert turns.choose(both, {"a": True}, 0, TURN_S) == frozenset()
    assert turns.choose(both[:1], {"a": True}, 0, TURN_S + 1) == {"a"}


def test_only_as_many_close_as_others_wait() -> None:
    turns = FullTurns()
    held = {"a": True, "b": True, "c": False}
    wanted = [(ANN, "a"), (ANN, "b"), (ANN, "c"), (BOB, "d")]
    turns.choose(wanted, held, 1, 0.0)
    closed = {"a", "b", "c"} - turns.choose(wanted, held, 1, TURN_S)
    assert len(closed) == 1
    assert {"a", "b", "c"} - turns.choose(wanted, held, 1, 2 * TURN_S) == closed


def test_nothing_is_left_of_those_who_gave_up() -> None:
    """Who waited, left while nothing was open, and comes again begins to wait anew."""
    turns = FullTurns()
    both = [(ANN, "a"), (BOB, "b")]
    assert turns.choose(both, {}, 1, 0.0) == {"a"}
    assert turns.choose([], {}, 1, TURN_S) == frozenset()
    assert turns.choose(both[:1], {}, 1, TURN_S) == {"a"}
    assert turns.choose(both, {"a": True}, 0, TURN_S + 0.1) == {"a"}
    assert turns.choose(both, {"a": True}, 0, 2 * TURN_S - 0.1) == {"a"}, "b waits for less than a turn now"
