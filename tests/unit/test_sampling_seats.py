"""Seats are shared between tenants, then between the snapshots of a tenant; a place is free for whoever comes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.test_sampling_admission import NoText
from tinsmith.sampling.admission import Turns
from tinsmith.sampling.blocks import FreeBlocks
from tinsmith.sampling.rng import streams
from tinsmith.sampling.scores import PromptScores
from tinsmith.sampling.seats import Seats, fair_share
from tinsmith.sampling.sequence import Request, Sequence
from tinsmith.sampling.stop import StopRule
from tinsmith.types import OpId, SampleItem, SamplingParams


def request(tenant: str, adapter: str | None = None, num_samples: int = 1000, weight: float = 1.0) -> Request:
    prompt = np.zeros(3, np.int32)
    item = SampleItem(OpId("r"), adapter, prompt, SamplingParams(), num_samples, 0, scope=tenant, weight=weight)
    return Request(
        item, None, StopRule(frozenset(), (), NoText()), 9, streams(0, num_samples), PromptScores(item)
    )  # fmt: skip


def fill(seats: Seats, *ready: Request) -> list[Request]:
    """Who got a seat, in order, until nobody may take one."""
    got: list[Request] = []
    for chosen in seats.in_turn(ready):
        seats.take(chosen)
        chosen.num_started += 1
        got.append(chosen)
    return got


def test_a_tenant_alone_leaves_an_eighth() -> None:
    seats = Seats(256, ())
    assert seats.room("a") == 224 == fair_share(256)
    assert len(fill(seats, request("a"))) == 224
    assert seats.room("a") == 0
    assert seats.room("b") == 28


@pytest.mark.parametrize("total", [1, 2, 3, 8])
def test_few_seats_are_used_all_the_same(total: int) -> None:
    assert len(fill(Seats(total, ()), request("a"))) == max(1, total * 7 // 8)


def test_as_seats_fall_free_all_come_to_hold_the_same() -> None:
    tenants = {name: request(name) for name in "abc"}
    held = dict.fromkeys(tenants, 0)
    held["a"] = len(fill(Seats(64, ()), tenants["a"]))
    for _ in range(200):
        crowded = max(held, key=lambda name: held[name])
        held[crowded] -= 1
        seats = Seats(64, (Sequence(tenants[name], 0) for name, count in held.items() for _ in range(count)))
        for chosen in fill(seats, *tenants.values()):
            held[chosen.tenant] += 1
    assert max(held.values()) - min(held.values()) <= 1
    assert sum(held.values()) >= 60


def test_a_tenants_snapshots_share_its_seats() -> None:
    first, second, other = request("a", "x"), request("a", "y"), request("b")
    got = fill(Seats(20, ()), first, second, other)
    assert abs(got.count(first) - got.count(second)) <= 1
    assert abs(got.count(first) + got.count(second) - got.count(other)) <= 1


def test_prompts_take_turns() -> None:
    turns = Turns()
    crowd, one, other = [request("a") for _ in range(3)], request("b"), request("a", "x")
    assert turns.sorted([*crowd, one])[0] is crowd[0]
    turns.serve(crowd[:1])
    assert turns.sorted([*crowd[1:], one]) == [one, *crowd[1:]]
    turns.serve([one])
    assert turns.sorted([*crowd[1:], other, one]) == [other, *crowd[1:], one]


def test_no_owner_holds_all_blocks() -> None:
    blocks = FreeBlocks(16, owner_total=14)
    for i in range(8):
        assert blocks.try_update({i: 2}, "a") == (i < 7)
    assert blocks.held_by("a") == 14
    assert not blocks.try_update({0: 3}, "a")
    assert blocks.try_update({"b": 2}, "b")
    for i in range(7):
        blocks.release(i, "a")
    assert not blocks.try_update({"large": 15}, "c")
    assert blocks.try_update({"large": 14}, "c")
