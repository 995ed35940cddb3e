"""How much of what waits goes into one pass, so that clients who are far away keep the engine busy. Pure.

Clients whose requests share a pass get their answers at the same moment. If each of them waits for its answer before it
goes on, they are away together, and come back together: with W seconds of computing for all of them and g seconds away,
the engine works W / (W + g) of the time. In k passes, one group is computed while the others are away, and nothing is
idle once (k - 1) W / k >= g. So a pass is cut to W / k where sharing it among all would leave more than `MAX_IDLE` of
the time unused, and only if that helps: where g >= W the engine can't be filled at all. Clients that send ahead, or
sit beside the server, are hardly away, and share one pass.
"""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict
from dataclasses import dataclass

from tinsmith.types import RunId

MAX_IDLE = 0.1
MAX_AWAY_S = 5.0  # who takes longer thinks, or has left: it isn't waited for
MAX_RUNS = 4096


@dataclass(slots=True)
class _Run:
    """work: of its requests in one pass. away_s: from an answer to the request after it; None before it came back.

    seen_at, answered_at: seconds of the clock; answered_at is None while it has requests under way.
    """

    work: float = 0.0
    away_s: float | None = None
    seen_at: float = 0.0
    answered_at: float | None = None


class Tempo:
    """Of the runs that train. Times are those of one clock, in seconds."""

    def __init__(self) -> None:
        self._runs: OrderedDict[RunId, _Run] = OrderedDict()

    def begun(self, run_id: RunId, work: int, arrived_at: float, now: float) -> None:
        """A pass begins in which the run has so much work; the first of its requests in it arrived then."""
        run = self._runs.setdefault(run_id, _Run())
        self._runs.move_to_end(run_id)
        if run.answered_at is not None:
            away_s = max(0.0, arrived_at - run.answered_at)
            if away_s <= MAX_AWAY_S:
                run.away_s = away_s if run.away_s is None else (run.away_s + away_s) / 2
        run.work, run.seen_at, run.answered_at = float(work), now, None
        while len(self._runs) > MAX_RUNS:
            self._runs.popitem(last=False)

    def ended(self, run_id: RunId, now: float) -> None:
        """Its requests of a pass are answered."""
        run = self._runs.get(run_id)
        if run is not None:
            run.answered_at = run.seen_at = now

    def most_work(self, speed: float, now: float) -> int | None:
        """What a pass should take in at most; None if all that waits.

        Args:
            speed: work a second.
        """
        here = [run for run in self._runs.values() if run.away_s is not None and now - run.seen_at <= 2 * MAX_AWAY_S]
        work = sum(run.work for run in here)
        if len(here) < 2 or not speed or not work:
            return None
        all_s = work / speed
        away_s = statistics.median(run.away_s for run in here if run.away_s is not None)
        if away_s <= MAX_IDLE * (all_s + away_s) or away_s >= all_s:
            return None
        num_passes = min(len(here), math.ceil(all_s / (all_s - away_s)))
        return math.ceil(work / num_passes)
