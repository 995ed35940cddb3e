"""A tenant's weight: set by an administrator, read by workers, and what it does to seats and to passes."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.flow.house import House
from tests.unit.test_sampling_seats import request
from tinsmith.errors import NotFoundError, UserError
from tinsmith.sampling.seats import Seats
from tinsmith.sampling.sequence import Sequence


def test_every_tenant_has_the_weight_one_until_another_is_set(world: Any) -> None:
    weights = world.store.weights
    assert (weights.all(), weights.others()) == ({"alice": 1.0}, {})
    weights.set("alice", 2.5)
    assert (weights.all(), weights.others()) == ({"alice": 2.5}, {world.tenant: 2.5})
    for wrong in (0.0, -1.0, 1000.0, float("nan")):
        with pytest.raises(UserError, match="between"):
            weights.set("alice", wrong)
    with pytest.raises(NotFoundError):
        weights.set("nobody", 2.0)


def test_a_cut_view_of_the_queue_has_the_first_of_every_tenant_and_line(world: Any) -> None:
    flood, quiet = world.sampler(0), world.sampler(1)
    for seq in range(40):
        world.sample(flood, seq)
    last = world.sample(quiet, 0).row.id
    runs = [world.run(number) for number in range(3)]
    world.lease()
    for seq in range(1, 40):
        world.put(runs[0], seq)
    world.put(runs[2], 1)
    look = world.store.waiting.all(world.worker, "tiny", 10)
    assert look.is_cut
    assert last in [op.id for op in look.ops]
    assert {op.run_id for op in look.ops if op.run_id is not None} == set(runs)


def test_seats_are_shared_by_weight() -> None:
    tenants = {"a": request("a", weight=3.0), "b": request("b")}
    held = Counter({"a": 32})
    for _ in range(300):
        crowded = max(held, key=lambda name: held[name] / tenants[name].item.weight)
        held[crowded] -= 1
        seats = Seats(64, (Sequence(tenants[name], 0) for name, count in held.items() for _ in range(count)))
        for chosen in seats.in_turn(tenants.values()):
            seats.take(chosen)
            held[chosen.tenant] += 1
    assert 2.7 <= held["a"] / held["b"] <= 3.3
    assert held.total() >= 56
    assert Seats(256, ()).room("a") == 224, "alone, whatever its weight"


def test_a_worker_gives_passes_by_weight_and_follows_a_change(tmp_path: Path) -> None:
    house = House(tmp_path, pass_max_tokens=40, scan_interval_s=0.01)
    try:
        worker = house.worker()
        runs, names = {}, ("heavy", "light")
        for name in names:
            house.be(name)
            runs[name] = (house.tenant, house.create_run())
        for _ in range(50):
            worker.step()
        house.store.weights.set("heavy", 3.0)
        for name in names:
            house.tenant, run = runs[name]
            for seq in range(1, 41):
                house.forward_backward(run, seq, [1] * 10)
        time.sleep(0.02)
        order: list[str] = []
        by_tenant = {tenant: name for name, (tenant, _) in runs.items()}
        record = worker._recorder.record

        def watched(outcomes: Any, **how: Any) -> None:
            order.extend(by_tenant[outcome.op.tenant_id] for outcome in outcomes)
            record(outcomes, **how)

        worker._recorder.record = watched  # type: ignore[method-assign]
        for _ in range(400):
            worker._must_look = True
            worker.step()
        assert len(order) == 80
        first = Counter(order[:40])
        assert 2.2 <= first["heavy"] / first["light"] <= 4.0
    finally:
        house.close()
