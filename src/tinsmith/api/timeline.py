"""A session's requests as a Perfetto trace: pure, from rows to bytes.

A track for each run and sampler, in as many lanes as requests overlap; each request a slice, with what it waited and
what it was computed inside it. Above them a track of passes for each worker, which says how many requests, runs and
tokens shared each one. Other tenants' requests are counted, never named.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush

from tinsmith.store.usage_rows import SharedStep, TracedOp
from tinsmith.wire import perfetto

Step = tuple[str, float, str]
MAX_NAMED = 16  # runs that a slice names as those beside it


def write_trace(title: str, ops: Sequence[TracedOp], shared: Mapping[Step, SharedStep]) -> bytes:
    """`ops` in order of arrival; `shared` by `TracedOp.step`."""
    session = 1
    packets = [perfetto.track(session, title)]
    number = session + 1
    together: defaultdict[Step, list[TracedOp]] = defaultdict(list)
    for op in ops:
        if op.step is not None:
            together[op.step].append(op)
    places = {step: tuple(sorted({op.place for op in of_step})) for step, of_step in together.items()}
    flows = {step: _flow(step) for step, of_step in together.items() if len(of_step) > 1}
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
                if op.step is None:
                    packets += _request_slices(number, op, (), None, None)
                else:
                    mates, flow = places[op.step], flows.get(op.step)
                    packets += _request_slices(number, op, mates, flow, shared.get(op.step))
            number += 1
    return b"".join(packets)


def lanes(ops: Sequence[TracedOp]) -> list[list[TracedOp]]:
    """The fewest lanes in which no two requests overlap; each in order of arrival."""
    made: list[list[TracedOp]] = []
    free: list[int] = []
    taken: list[tuple[float, int]] = []  # (until when, lane)
    for op in sorted(ops, key=lambda op: op.created_at):
        while taken and taken[0][0] <= op.created_at:
            heappush(free, heappop(taken)[1])
        if not free:
            heappush(free, len(made))
            made.append([])
        lane = heappop(free)
        made[lane].append(op)
        heappush(taken, (float("inf") if op.finished_at is None else op.finished_at, lane))
    return made


def _pass_slice(track: int, ops: Sequence[TracedOp], shared: SharedStep | None) -> list[bytes]:
    started = _ns(ops[0].started_at)
    ends = [op.finished_at for op in ops]
    mine = {op.place for op in ops}
    args: dict[str, str | int] = {"runs_of_this_session": _named(sorted(mine))}
    name = "pass"
    if shared is not None:
        name = f"pass of {shared.num_requests} requests"
        args |= _share_args(shared) | {"other_runs": shared.num_runs - len(mine)}
    packets = [perfetto.begin(track, started, name, args)]
    if None not in ends:
        packets.append(perfetto.end(track, max(started, *(_ns(end) for end in ends))))
    return packets


def _request_slices(
    track: int, op: TracedOp, mates: Sequence[str], flow: int | None, shared: SharedStep | None
) -> list[bytes]:
    """mates: the places of all that were computed in its step, its own among them."""
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
        packets.append(perfetto.begin(track, began, "running", _running(op, mates, shared), flow))
    if op.finished_at is not None:
        ended = max(began, _ns(op.finished_at))
        packets += [perfetto.end(track, ended), perfetto.end(track, ended)]
    return packets


def _running(op: TracedOp, mates: Sequence[str], shared: SharedStep | None) -> dict[str, str | int]:
    args: dict[str, str | int] = {"worker": op.owner or ""}
    if op.attempts > 1:
        args["attempts"] = op.attempts
    if shared is not None:
        args |= _share_args(shared)
    if len(mates) > 1:
        args["with_runs_of_this_session"] = _named(mates, without=op.place)
    return args


def _named(places: Sequence[str], without: str = "") -> str:
    names = [place for place in places[: MAX_NAMED + 1] if place != without][:MAX_NAMED]
    num_more = len(places) - bool(without) - len(names)
    return ", ".join(names) + (f" and {num_more} more" if num_more else "")


def _share_args(shared: SharedStep) -> dict[str, str | int]:
    return {
        "requests_together": shared.num_requests,
        "runs_together": shared.num_runs,
        "tokens_together": shared.num_tokens,
    }


def _flow(step: Step) -> int:
    return int.from_bytes(hashlib.sha256(repr(step).encode()).digest()[:8])


def _ns(unix_s: float | None) -> int:
    return round((unix_s or 0.0) * 1e6) * 1000  # a float of today is good for a microsecond
