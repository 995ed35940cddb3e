"""How long does a small run wait for its answers beside nine tenants that flood, against its fair share of the time?

    python benchmarks/beside_floods.py [--steps 30]

A worker in this process, over a store and files of its own, on the fake engine, made to take the time that its tokens
take at `--speed` (8,000 tokens a second, packs of 256): one tenant trains one run, a request of 32 tokens at a time,
each awaited; nine others have requests of 256 tokens waiting all the time, put there before the clock starts. Two
stretches take turns, with and without the floods, five of each.

The fair share is that of a fluid server (processor sharing: Parekh and Gallager 1993) which gives each of ten
tenants a tenth of the engine: a request of c tokens then takes 10 x c / speed, from its arrival on. No scheduler that
computes one pack after another can interrupt the one under way, so what the last pack of another takes is added (the
packet version's bound, theorem 1 there); the same measured wait without floods stands for what the service adds to the
computing. The rows are the median, and what 95 % are within, of the measured waits with floods over
10 x 32 / speed + 256 / speed + (median without floods - 32 / speed).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import rows
from house import BASE, House

from tinsmith.engine import PassStats
from tinsmith.fake_engine import FakeEngine, FakePass
from tinsmith.types import OpId, RunId, TenantId

FLOODS = 9
SMALL, LARGE = 32, 256  # tokens of a request, and of a pack
WAITING = 24
ROUNDS = 5
WARM_UP = 3


class TimedPass(FakePass):
    """Takes the time that its tokens cost."""

    speed = 1.0

    def advance(self, max_work: int) -> PassStats | None:
        stats = super().advance(max_work)
        if stats is not None:
            time.sleep(stats.work / self.speed)
        return stats


class TimedEngine(FakeEngine):
    def start_pass(self, items):  # type: ignore[no-untyped-def]
        return TimedPass(self, items)


class Tenant:
    """One run of a tenant's and the requests of it that wait."""

    def __init__(self, house: House, name: str, length: int) -> None:
        self._house = house
        self._length = length
        self.tenant: TenantId = house.client.tenants.create(name).tenant_id
        self._session = house.client.sessions.create(self.tenant).session_id
        house.tenant, house.session = self.tenant, self._session
        self._run: RunId = house.create_run(0, 4)
        self._seq = 0
        self._waiting: list[OpId] = []

    def send(self) -> OpId:
        self._seq += 1
        self._house.tenant, self._house.session = self.tenant, self._session
        return self._house.forward_backward(self._run, self._seq, self._length)

    @property
    def num_waiting(self) -> int:
        self._waiting = [op for op in self._waiting if op not in self._house.answered]
        return len(self._waiting)

    def flood(self) -> None:
        while self.num_waiting < WAITING:
            self._waiting.append(self.send())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="requests of the small run in each stretch")
    parser.add_argument("--directory", default=None, help="for the data; one in memory takes the disk out of it")
    parser.add_argument(
        "--request", type=int, default=LARGE, help="tokens of a flood's request; more than a pack's are several"
    )
    parser.add_argument("--speed", type=float, default=8000.0, help="tokens a second")
    rows.add_flag(parser)
    args = parser.parse_args()
    TimedPass.speed = args.speed
    with tempfile.TemporaryDirectory(dir=args.directory) as directory, ExitStack() as stack:
        house = House(Path(directory) / "data", stack, lambda _: TimedEngine(BASE, LARGE), device="fake")
        floods = [Tenant(house, f"flood{number}", args.request) for number in range(FLOODS)]
        small = Tenant(house, "small", SMALL)
        house.work()
        alone: list[float] = []
        beside: list[float] = []
        for _ in range(ROUNDS):
            alone += stretch(house, small, [], args.steps)
            beside += stretch(house, small, floods, args.steps)
            TimedPass.speed = 1e9
            house.work()
            TimedPass.speed = args.speed
        report(alone, beside, args)
        house.worker.close()


def stretch(house: House, small: Tenant, floods: list[Tenant], steps: int) -> list[float]:
    """Seconds from each request of the small run to its answer, beside the floods."""
    seconds = []
    for flood in floods:
        flood.flood()
    for number in range(WARM_UP + steps):
        if any(flood.num_waiting == 0 for flood in floods):
            raise SystemExit("a flood ran dry: give it more")
        if floods:  # its request comes at any moment of a pack
            for _ in range(number % 4):
                house.turn()
        started = time.perf_counter()
        op = small.send()
        house._wake.ring()
        while op not in house.answered:
            house.turn()
        seconds.append(house.answered[op] - started)
    return seconds[WARM_UP:]


def report(alone: list[float], beside: list[float], args: argparse.Namespace) -> None:
    own, pack = SMALL / args.speed, LARGE / args.speed
    overhead = max(0.0, statistics.median(alone) - own)
    fair = (FLOODS + 1) * own + pack + overhead
    ratio = statistics.median(beside) / fair
    worst = sorted(beside)[int(0.95 * len(beside))] / fair
    print(
        f"| | median ms | 95 % ms |\n|---|---|---|\n"
        f"| alone | {1e3 * statistics.median(alone):.1f} | {1e3 * sorted(alone)[int(0.95 * len(alone))]:.1f} |\n"
        f"| beside {FLOODS} floods | {1e3 * statistics.median(beside):.1f} | {1e3 * worst * fair:.1f} |\n"
        f"| fair share | {1e3 * fair:.1f} | |\n\n95 % of the waits are within {worst:.2f} x the fair share"
    )
    what = f"a small run beside {FLOODS} tenants that flood: median wait / its fair share"
    late = "the same: 95 % of the waits are within / its fair share"
    rows.save(
        args.rows,
        [rows.Row(what, ratio, "x", "< 1.5", len(beside)), rows.Row(late, worst, "x", "< 1.5", len(beside))],
    )


if __name__ == "__main__":
    main()
