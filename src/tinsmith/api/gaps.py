"""Gaps in a run's log: numbers that a client took and never sent, because a check or the network failed them there.

The requests after a gap wait, as the chunks of one call may overtake one another. What never came counts as failed
once nothing of the run has arrived for `gap_timeout_s` and someone waits; if it comes after all, that's its answer. A
number that was turned away for a lack of room comes again: while its tenant is turned away nothing counts as failed,
for longer than a client tries.
"""

from __future__ import annotations

import time
from uuid import uuid4

import structlog

from tinsmith.api.services import Services
from tinsmith.errors import UserError
from tinsmith.store.rows import NewOp, OpRow, RunRow
from tinsmith.types import Failure, OpId, OpKind

log = structlog.get_logger("tinsmith.api")

FILL_AT_MOST = 256
MAX_AHEAD = 100_000
COMES_AGAIN_S = 45.0  # the SDK pauses for 30 s at most, and for `Retry-After`
LONGEST_TRY_S = 600.0  # twice as long as it goes on


def refuse_far_ahead(run: RunRow, seq_id: int) -> None:
    """Raises: UserError: more would be missing before this request than a client could have on its way."""
    if seq_id > run.head_seq + MAX_AHEAD:
        raise UserError(
            f"seq_id {seq_id} is more than {MAX_AHEAD} above {run.head_seq}, up to which this run's requests have "
            f"arrived: number requests one by one; the next is {run.head_seq + 1}"
        )


async def close_gap(services: Services, op: OpRow) -> None:
    """Fail what an early op has waited for long enough. One short write each, so that others get their turn."""
    if op.run_id is None or op.state.is_final:
        return
    timeout_s = services.settings.gap_timeout_s
    run = await services.work(services.store.runs.get, op.tenant_id, op.run_id)
    waited_s = time.time() - run.last_request_at
    if not services.clock.is_even(timeout_s) or waited_s < timeout_s:
        return
    if services.turned_away.up_for_s() < timeout_s:
        return
    if services.turned_away.ago_s(op.tenant_id) < COMES_AGAIN_S and waited_s < timeout_s + LONGEST_TRY_S:
        return
    filled: list[int] = []
    while len(filled) < FILL_AT_MOST:
        _, missing = await services.work(services.store.ops.queue_position, op.id)
        if missing is None:
            break
        await services.enqueue(_never_arrived(op, missing, timeout_s))
        filled.append(missing)
    if filled:
        ids = {"run_id": op.run_id, "tenant_id": op.tenant_id}
        log.warning("requests never arrived", **ids, seq_ids=filled[:8], count=len(filled))
        services.ring(op.base_model)


def _never_arrived(op: OpRow, seq_id: int, timeout_s: float) -> NewOp:
    message = (
        f"request {seq_id} of this run did not arrive within {timeout_s:g} s of those after it, and the run went on "
        "without it: send it again as a new request"
    )
    return NewOp(
        tenant_id=op.tenant_id,
        kind=OpKind.FORWARD_BACKWARD,
        base_model=op.base_model,
        id=OpId(f"req-{uuid4().hex}"),
        seq_id=seq_id,
        run_id=op.run_id,
        failure=Failure(code="never_arrived", category="user", message=message),
    )
