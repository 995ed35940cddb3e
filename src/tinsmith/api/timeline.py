"""A session's requests as a Perfetto trace: pure, from rows to bytes.

A track for each run and sampler, in as many lanes as requests overlap; each request a slice, with what it waited and
what it was computed inside it. Above them a track of passes for each worker, which says how many requests, runs and
tokens shared each one. Other tenants' requests are counted, never named.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

from tinsmith.store.usage_rows import SharedStep, TracedOp
from tinsmith.wire import perfetto

Step = tuple[str, float, str]


def write_trace(title: str, ops: Sequence[TracedOp], shared: Mapping[Step, SharedStep]) -> bytes:
    """`ops` in order of arrival; `shared` by `TracedOp.step`."""
    session = 1
    packets = [perfetto.track(session, title)]
    number = session + 1
    together: defaultdict[Step, list[TracedOp]] = defaultdict(list)
    for op in ops:
        if op.step is not None:
            together[op.step].append(op)
    by_worker: defaultdict[str, list[Step]] = defaultdict(list)
    for step in sorted(together, key=lambda step: step[1]):
        if step[2] == "pass":
            by_worker[step[0]].append(step)
    for worker, steps in by_worker.items():
        packets.append(perfetto.track(number, f"passes of {worker}", session))
        for step in steps:
            packets += _pass_slice(number, together[step], shared.get(step))
        number += 1
    by_place: defaultdict[str, list[TracedOp]] = defaultdict(list)
    for op in ops:
        by_place[op.place].append(op)
    for place, of_place in by_place.items():
        for lane in lanes(of_place):
            packets.append(perfetto.track(number, place, session))
            for op in lane:
                mates = [] if op.step is None else together[op.step]
                packets += _request_slices(number, op, mates, None if op.step is None else shared.get(op.step))
            number += 1
    return b"".join(packets)


def lanes(ops: Sequence[TracedOp]) -> list[list[TracedOp]]:
    """The fewest lanes in which no two requests overlap; each in order of arrival."""
    made: list[list[TracedOp]] = []
    free_at: list[float] = []
    for op in sorted(ops, key=lambda op: op.created_at):
        until = float("inf") if op.finished_at is None else op.finished_at
        for i, free in enumerate(free_at):
            if free <= op.created_at:
                made[i].append(op)
                free_at[i] = until
                break
        else:
            made.append([op])
            free_at.append(until)
    return made


def _pass_slice(track: int, ops: Sequence[TracedOp], shared: SharedStep | None) -> list[bytes]:
    started = _ns(ops[0].started_at)
    ends = [op.finished_at for op in ops]
    mine = {op.place for op in ops}
    args: dict[str, str | int] = {"runs_of_this_session": ", ".join(sorted(mine))}
    name = "pass"
    if shared is not None:
        name = f"pass of {shared.num_requests} requests"
        args |= _share_args(shared) | {"other_runs": shared.num_runs - len(mine)}
    packets = [perfetto.begin(track, started, name, args)]
    if None not in ends:
        packets.append(perfetto.end(track, max(started, *(_ns(end) for end in ends))))
    return packets


def _request_slices(track: int, op: TracedOp, mates: Sequence[TracedOp], shared: SharedStep | None) -> list[bytes]:
    args: dict[str, str | int] = {
        "request_id": op.id,
        "seq_id": op.seq_id,
        "state": op.state.value,
        "tokens": op.cost_tokens,
        "base_model": op.base_model,
    }
    if op.failure_code is not None:
        args["failure"] = op.failure_code
    created = _ns(op.created_at)
    packets = [perfetto.begin(track, created, f"{op.kind.value} {op.seq_id}", args)]
    began = created
    packets.append(perfetto.begin(track, created, "queued", {}))
    if op.started_at is not None:
        began = max(created, _ns(op.started_at))
        packets.append(perfetto.end(track, began))
        packets.append(perfetto.begin(track, began, "running", *_running(op, mates, shared)))
    if op.finished_at is not None:
        ended = max(began, _ns(op.finished_at))
        packets += [perfetto.end(track, ended), perfetto.end(track, ended)]
    return packets


def _running(
    op: TracedOp, mates: Sequence[TracedOp], shared: SharedStep | None
) -> tuple[dict[str, str | int], int | None]:
    args: dict[str, str | int] = {"worker": op.owner or ""}
    if op.attempts > 1:
        args["attempts"] = op.attempts
    if shared is not None:
        args |= _share_args(shared)
    others = sorted({mate.place for mate in mates} - {op.place})
    if others:
        args["with_runs_of_this_session"] = ", ".join(others)
    return args, _flow(op) if len(mates) > 1 else None


def _share_args(shared: SharedStep) -> dict[str, str | int]:
    return {
        "requests_together": shared.num_requests,
        "runs_together": shared.num_runs,
        "tokens_together": shared.num_tokens,
    }


def _flow(op: TracedOp) -> int:
    return int.from_bytes(hashlib.sha256(repr(op.step).encode()).digest()[:8])


def _ns(unix_s: float | None) -> int:
    return round((unix_s or 0.0) * 1e6) * 1000  # a float of today is good for a microsecond
