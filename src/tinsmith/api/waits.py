"""How long those who are turned away are told to stay away.

To refuse takes time from those who are served, so as many are to come again as can be let in beside those who come for
the first time, and a few more: the more stay away already, the longer is told. The times are spread, so that those who
were refused together don't come back together.
"""

from __future__ import annotations

from collections import Counter, deque

LEAST_S, MOST_S = 2.0, 8.0  # in the mean
SPREAD = 0.5  # of the mean, either way
MORE = 0.5  # refusals for each that is let in
EACH_S = 0.5
OVER = 4  # looks, over which the rates are measured
GOLDEN = 0.6180339887498949  # its multiples, modulo 1, are spread evenly however many they are
MAX_WAIT_S = int((1 + SPREAD) * MOST_S) + 1


class Waits:
    """From the moment on when too much is asked for. `now` is in seconds, of one clock. For the event loop's own
    thread."""

    def __init__(self, now: float) -> None:
        self._mean_s = LEAST_S
        self._phase = 0.0
        self._away: Counter[int] = Counter()  # how many, by the second in which they come back
        self._num_let_in = self._num_told = 0
        self._looks: deque[tuple[float, int, int]] = deque(maxlen=OVER)  # seconds, how many let in, how many new ones
        self._looked_at = now

    def told(self, now: float) -> int:
        """What to tell one more: whole seconds."""
        self._num_told += 1
        self._phase = (self._phase + GOLDEN) % 1.0
        wait_s = round(self._mean_s * (1 - SPREAD + 2 * SPREAD * self._phase))
        self._away[int(now) + wait_s] += 1
        return wait_s

    def let_in(self) -> None:
        """One more."""
        self._num_let_in += 1

    def look(self, now: float) -> None:
        """To be called often, while too much is asked for."""
        since_s = now - self._looked_at
        if since_s < EACH_S:
            return
        num_back = sum(self._away.pop(second) for second in list(self._away) if second <= now)
        self._looks.append((since_s, self._num_let_in, self._num_let_in + self._num_told - num_back))
        seconds, num_let_in, num_first = (sum(of) for of in zip(*self._looks, strict=True))
        most_back = max((1 + MORE) * num_let_in - num_first, MORE * num_let_in, 1)
        self._mean_s = min(MOST_S, max(LEAST_S, self._away.total() * seconds / most_back))
        self._num_let_in = self._num_told = 0
        self._looked_at = now
