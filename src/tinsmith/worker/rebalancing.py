"""Which of its runs a worker gives back, so that another one of its base that has nothing to do takes them.

A worker holds its runs as long as it lives, and workers take runs when they are new or free: so one may come to hold
all that are at work. The one that has too much gives, and nobody takes: a run leaves as it would leave memory, state on
disk and lease given back in one place, and its next holder takes it over as after any other end of a lease. What stays
true: a run moves only towards a worker that has nothing to do and holds at least two active runs less, half of the
difference at most, so each move makes the numbers more equal, and none is undone by the next; one that has come stays
for `STAY_S`, who has given gives no more for `RETURN_S`, and what nobody took within that time comes back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet

from tinsmith.store.burdens import Burden
from tinsmith.types import RunId

CHECK_S = 1.0
STAY_S = 30.0
RETURN_S = 10.0


def num_to_give(mine: str, burdens: Sequence[Burden]) -> int:
    """How many runs the worker in slot `mine` should let go. Pure."""
    own = next((burden for burden in burdens if burden.slot == mine), None)
    idle = [burden.num_active for burden in burdens if burden.slot != mine and burden.is_idle]
    if own is None or not idle:
        return 0
    return max(0, (own.num_active - min(idle)) // 2)


class Rebalancing:
    """Of one worker. `clock`: monotonic seconds; `burdens` looks them up."""

    def __init__(
        self, mine: str, burdens: Callable[[], Sequence[Burden]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._mine, self._burdens, self._clock = mine, burdens, clock
        self._checked_at = clock()
        self._waited: AbstractSet[RunId] = frozenset()
        self._given: dict[RunId, float] = {}

    @property
    def given(self) -> AbstractSet[RunId]:
        """Runs that are left to others for now."""
        since = self._clock() - RETURN_S
        self._given = {run_id: at for run_id, at in self._given.items() if at > since}
        return self._given.keys()

    @property
    def is_due(self) -> bool:
        """Whether it is time to look; who has given sees first what came of it."""
        return self._clock() - self._checked_at >= CHECK_S and not self.given

    def choose(self, waiting: Collection[RunId], held_since: Mapping[RunId, float]) -> list[RunId]:
        """Runs to give back, of those that have work and wait for this worker.

        They have waited at the last look as well, `CHECK_S` before: a moment's crowd moves nobody.
        """
        now = self._checked_at = self._clock()
        waited, self._waited = self._waited, frozenset(waiting)
        ripe = [run_id for run_id in waiting if run_id in waited and now - held_since[run_id] >= STAY_S]
        if not ripe:
            return []
        chosen = sorted(ripe)[: num_to_give(self._mine, self._burdens())]
        self._given |= dict.fromkeys(chosen, now)
        return chosen
