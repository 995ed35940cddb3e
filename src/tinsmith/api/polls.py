"""Who asked for which sample, when.

Remembered by this process alone: after a restart everything counts as asked for at its start.
"""

from __future__ import annotations

import time

from tinsmith.store.rows import OpRow
from tinsmith.types import OpId, OpKind, SamplerId
from tinsmith.wire.requests import CLONE_SEQS


class Polls:
    """Times are monotonic seconds. May be called from any thread."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._samples: dict[OpId, float] = {}
        self._samplers: dict[tuple[SamplerId, int], float] = {}

    def of_sample(self, op: OpRow) -> None:
        """A client asks, or asked until now, for a request. One that has ended is not remembered."""
        if op.kind is not OpKind.SAMPLE:
            return
        if op.state.is_final:
            self._samples.pop(op.id, None)
        else:
            self._samples[op.id] = time.monotonic()

    def of_sampler(self, sampler_id: SamplerId, clone: int) -> None:
        """A client asks for all requests of one sampling client."""
        self._samplers[sampler_id, clone] = time.monotonic()

    def last(self, op: OpRow) -> float:
        """When a sample was asked for last."""
        of_sampler = 0.0
        if op.sampler_id is not None:
            of_sampler = self._samplers.get((op.sampler_id, op.seq_id // CLONE_SEQS), 0.0)
        return max(self._started, self._samples.get(op.id, 0.0), of_sampler)

    def forget(self, before: float) -> None:
        """Nothing asks any more for what was asked for last before that."""
        for op_id, at in list(self._samples.items()):
            if at < before:
                self._samples.pop(op_id, None)
        for sampler, at in list(self._samplers.items()):
            if at < before:
                self._samplers.pop(sampler, None)
