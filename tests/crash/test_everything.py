"""Everything at once: two workers of a base that die again and again, tenants with weights and quotas, damaged files.

In one process over the fake engine, where a death is a worker that is dropped at some moment; `chaos.py` kills real
ones. All that comes out is held against the same requests on a server that nobody disturbs and that has no quotas.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.crash.chaos import meaning
from tests.flow.house import House, settle, train
from tinsmith.store.quota_rules import Quota
from tinsmith.store.rows import OpRow
from tinsmith.types import OpState, RunId, SamplerId, SessionId, TenantId
from tinsmith.upkeep.verify import verify
from tinsmith.worker.loop import Worker

SLOTS = ("0", "0-2")
NAMES = ("alice", "bob", "carol")
ROUNDS = 6
STEPS_A_TURN = 12
NUM_RUNS = 2
DEATHS_A_ROUND = 3
SETTINGS: dict[str, Any] = {"inline_bytes": 64, "snapshot_debt_bytes": 200, "deterministic": True}


@dataclass
class Tenant:
    """What one of them has asked for, and what it was told."""

    name: str
    tenant: TenantId
    session: SessionId
    key_id: str
    runs: list[RunId] = field(default_factory=list)
    sampler: SamplerId | None = None
    ops: dict[str, OpRow] = field(default_factory=dict)
    seen: dict[str, str] = field(default_factory=dict)


class Asking:
    """The same requests of all tenants in every house, round by round."""

    def __init__(self, house: House) -> None:
        self.house = house
        self.tenants = [self._tenant(name) for name in NAMES]

    def _tenant(self, name: str) -> Tenant:
        house = self.house
        if name != "alice":
            house.be(name)
        key, _ = house.store.tenants.create_key(house.tenant, name)
        return Tenant(name, house.tenant, SessionId(house.session), key.key_id)

    @contextlib.contextmanager
    def as_(self, tenant: Tenant) -> Iterator[House]:
        self.house.tenant, self.house.session, self.house.key_id = tenant.tenant, tenant.session, tenant.key_id
        yield self.house

    def begin(self) -> None:
        for tenant in self.tenants:
            with self.as_(tenant) as house:
                for number in range(NUM_RUNS):
                    house._num_runs = number
                    tenant.runs.append(house.create_run(seed=number))
                tenant.sampler = house.sampler()

    def ask(self, number: int) -> None:
        for tenant in self.tenants:
            with self.as_(tenant) as house:
                for place, run in enumerate(tenant.runs):
                    made = train(house, run, range(number, number + 1))
                    tenant.ops.update({f"{place}/{number}/{i}": op for i, op in enumerate(made)})
                assert tenant.sampler is not None
                tenant.ops[f"sample/{number}"] = house.sample(tenant.sampler, number, seed=number, max_tokens=12)

    def look(self) -> None:
        """Fetch what is done, as clients do: a result that was seen is the one that will be seen for ever."""
        for tenant in self.tenants:
            for name, op in tenant.ops.items():
                row = self.house.get(op)
                if row.state is OpState.DONE:
                    digest = hashlib.sha256(self.house.result(row)).hexdigest()
                    assert tenant.seen.setdefault(name, digest) == digest, f"{tenant.name}: {name} was changed"

    def results(self) -> dict[str, dict[str, Any]]:
        """Without what depends on who shared the passes."""
        rows = {t.name: {name: self.house.get(op) for name, op in t.ops.items()} for t in self.tenants}
        return {
            tenant: {name: meaning(row.kind.value, self.house.result(row)) for name, row in ops.items()}
            for tenant, ops in rows.items()
        }

    def metered(self) -> dict[str, Counter[str]]:
        """Tokens by tenant and kind; cached prompt tokens are prompt tokens."""
        made: dict[str, Counter[str]] = {}
        for tenant in self.tenants:
            sums: Counter[str] = Counter()
            for row in self.house.store.ledger.usage(tenant.tenant, 0, int(time.time()) + 7200, 10_000):
                sums["prefill" if "prefill" in row.kind else row.kind.value] += row.quantity
            made[tenant.name] = sums
        return made

    def states(self) -> dict[str, Any]:
        """Weights and moments of all runs, as a new worker finds them."""
        found: dict[str, Any] = {}
        for slot in SLOTS:
            self.house.store.workers.vacate(slot)
        for tenant in self.tenants:
            for run in tenant.runs:
                with self.as_(tenant) as house:
                    house.forward_backward(run, 2 * ROUNDS + 1, [1], forward_only=True)
        worker = self.house.worker(SLOTS[0])
        settle(worker)
        for tenant in self.tenants:
            for place, run in enumerate(tenant.runs):
                found[f"{tenant.name}/{place}"] = self.house.state(run)
        worker.close()
        return found


class Trouble:
    """Two workers, and what becomes of them."""

    def __init__(self, asking: Asking, rng: random.Random) -> None:
        self.asking, self.house, self.rng = asking, asking.house, rng
        self.count: Counter[str] = Counter()
        self.workers: dict[str, Worker] = {}
        for slot in SLOTS:
            self._start(slot)

    def _start(self, slot: str) -> None:
        self.workers[slot] = self.house.worker(slot)
        self.house.store.workers.set_ready(self.workers[slot]._me)

    def kill(self) -> None:
        """One or both, at whatever they are; sometimes a snapshot is found damaged afterwards."""
        dead = list(SLOTS) if self.rng.random() < 0.25 else [self.rng.choice(SLOTS)]
        for slot in dead:
            del self.workers[slot]
        self.count["deaths"] += len(dead)
        for slot in dead:  # first, so that threads of the dead record no snapshot on top of the damaged one
            self._start(slot)
        if self.rng.random() < 0.7:
            self._damage()

    def _damage(self) -> None:
        """The newest snapshot of a run that nobody holds in memory, and of which there is an older one."""
        rows = [self.house.store.runs.get(t.tenant, run) for t in self.asking.tenants for run in t.runs]
        for row in self.rng.sample(rows, len(rows)):
            if row.has_previous and row.snapshot_blob is not None and row.lease_owner is None:
                path = self.house.root / "blobs" / row.snapshot_blob
                with contextlib.suppress(FileNotFoundError):
                    path.write_bytes(path.read_bytes()[:-1])
                    self.count["damaged"] += 1
                return

    def work(self) -> None:
        for _ in range(STEPS_A_TURN):
            worker = self.workers[self.rng.choice(SLOTS)]
            worker._must_look = True
            worker.step()
        most = {
            t.name: [self.house.get(op).state for op in t.ops.values()].count(OpState.RUNNING)
            for t in self.asking.tenants
        }
        self.count["too many at once"] += most["bob"] > 3

    def settle(self) -> None:
        for _ in range(3):
            for worker in list(self.workers.values()):
                settle(worker)


def limit(house: House, tenant: Tenant, key_id: str | None, **limits: float | None) -> None:
    changes = {Quota(name): amount for name, amount in limits.items()}
    house.store.quotas.put(tenant.tenant, key_id, changes, time.time())


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_is_lost_done_twice_or_changed(tmp_path: Path, seed: int) -> None:
    with (
        contextlib.closing(House(tmp_path / "a", **SETTINGS)) as house,
        contextlib.closing(House(tmp_path / "b", **SETTINGS)) as calm,
    ):
        asking, quiet = Asking(house), Asking(calm)
        _, bob, carol = asking.tenants
        house.store.weights.set("bob", 3.0)
        limit(house, bob, None, requests=3)
        limit(house, carol, carol.key_id, tokens_per_day=20)
        trouble = Trouble(asking, random.Random(seed))
        asking.begin()
        for number in range(ROUNDS):
            asking.ask(number)
            for _ in range(DEATHS_A_ROUND):
                trouble.work()
                trouble.kill()
                asking.look()
        trouble.settle()
        held = [house.get(op).state for op in carol.ops.values()]
        assert OpState.QUEUED in held, "the quota of the key held nothing back"
        assert not {OpState.FAILED, OpState.CANCELLED} & set(held)
        limit(house, carol, carol.key_id, tokens_per_day=None)
        trouble.settle()
        asking.look()

        quiet.begin()
        for number in range(ROUNDS):
            quiet.ask(number)
        settle(calm.worker(SLOTS[0]))
        assert {house.get(op).state for t in asking.tenants for op in t.ops.values()} == {OpState.DONE}
        assert asking.results() == quiet.results()
        assert asking.metered() == quiet.metered(), "something was metered twice, or not at all"
        states, expected = asking.states(), quiet.states()
        assert states.keys() == expected.keys()
        for name, state in states.items():
            assert state.step == expected[name].step
            for tensor, values in expected[name].tensors.items():
                np.testing.assert_array_equal(state.tensors[tensor], values, err_msg=f"{name}: {tensor}")
        assert trouble.count["deaths"] >= ROUNDS * DEATHS_A_ROUND
        assert trouble.count["damaged"] >= 1
        assert house.store.upkeep.damaged_snapshots() != [], "no damaged snapshot was met"
        assert not trouble.count["too many at once"]
        assert verify(house.store, house.blobs).findings == []
