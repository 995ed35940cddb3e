"""What a line of the log says of the requests that it is about: which, of which runs and whose. Knows rows alone."""

from __future__ import annotations

from collections.abc import Sequence

from tinsmith.store.rows import OpRow

MAX_IDS = 8  # of a kind, in a line of the log


def about(ops: Sequence[OpRow]) -> dict[str, object]:
    """Their ids, their runs or samplers, and tenants; some of many."""
    if len(ops) == 1:
        op = ops[0]
        where = {"sampler_id": op.sampler_id} if op.run_id is None else {"run_id": op.run_id, "seq_id": op.seq_id}
        return {"op_id": op.id, "kind": op.kind.value, "tenant_id": op.tenant_id, **where}
    found: dict[str, list[str]] = {
        "op_ids": [op.id for op in ops],
        "run_ids": [op.run_id for op in ops if op.run_id is not None],
        "sampler_ids": [op.sampler_id for op in ops if op.run_id is None and op.sampler_id is not None],
        "tenant_ids": [op.tenant_id for op in ops],
    }
    return {"ops": len(ops)} | {name: list(dict.fromkeys(ids))[:MAX_IDS] for name, ids in found.items() if ids}
