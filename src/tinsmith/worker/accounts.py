"""What tenants have had of this worker, and how much they are to have: an account for passes, and one for samples.

Joins the rows' weights with the scheduler's virtual time. Weights are read again every `refresh_s`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

from tinsmith.fair_queueing import Queued, Shares, Standing, line_of
from tinsmith.scheduler import Batch, Candidate
from tinsmith.store import Store
from tinsmith.store.rows import OpRow
from tinsmith.types import TenantId
from tinsmith.worker.suspects import Suspects


def candidate_of(op: OpRow, suspects: Suspects, *, is_resident: bool = True) -> Candidate:
    """A queued op, as the scheduler sees it."""
    return Candidate(
        op.id, op.tenant_id, op.run_id, op.kind, op.seq_id, op.cost_tokens,
        attempts=suspects.attempts(op), is_resident=is_resident, sampler_id=op.sampler_id,
    )  # fmt: skip


class Accounts:
    def __init__(self, store: Store, refresh_s: float) -> None:
        self._store = store
        self._refresh_s = refresh_s
        self._read_at = float("-inf")
        self._weights: Mapping[TenantId, float] = {}
        self._trained = Shares()
        self._sampled = Shares()

    def weight(self, tenant_id: TenantId) -> float:
        """1, unless an administrator has set another."""
        return self._weights.get(tenant_id, 1.0)

    def enter(
        self, candidates: Sequence[Candidate], training: AbstractSet[TenantId], sampling: AbstractSet[TenantId]
    ) -> tuple[Standing, Standing]:
        """Whose turn it is to train, and to sample. training, sampling: tenants of whom something is under way."""
        self._refresh()
        trained = self._trained.enter((line_of(c) for c in candidates if c.run_id is not None), training)
        return trained, self.enter_samples((c for c in candidates if c.run_id is None), sampling)

    def enter_samples(self, samples: Iterable[Candidate], sampling: AbstractSet[TenantId]) -> Standing:
        """Whose turn it is to sample, between two calls of `enter`."""
        return self._sampled.enter((line_of(sample) for sample in samples), sampling)

    def took(self, batch: Batch | None) -> None:
        """What was chosen from the last standings."""
        if batch is not None:
            self._trained.took(batch.trained)
            self._sampled.took(batch.sampled)

    def charge_pass(self, op: Queued, num_tokens: int) -> None:
        """It is computed in a pass that begins."""
        self._trained.charge(op, max(1, num_tokens))

    def charge_sample(self, op: Queued, num_tokens: int) -> None:
        """It may cost so many tokens; a negative number gives back what it didn't."""
        self._sampled.charge(op, num_tokens)

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._read_at > self._refresh_s:
            self._read_at = now
            self._weights = self._store.weights.others()
            self._trained.weigh(self._weights)
            self._sampled.weigh(self._weights)
