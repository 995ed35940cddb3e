"""What is left of the service's goodput when three times as much is asked of it as it can do?

    python benchmarks/overload.py [--rounds 5] [--engine fake] [--engine real]

Raw HTTP against `tinsmith serve` in processes of its own: requests of a few tokens, each fetched with a poll. Two
cases: with the fake engine, where the API and the store are the bottleneck, and with the shipped model on the CPU,
where its passes are. First closed loops of more and more clients, who take the runs in turn: the most results a second
is the peak. Then, in turns with closed loops of that many, open loops offer three times the peak: each run is a client
of its own, and its requests are sent when their time has come, whatever became of those of other runs. What a refused
run (429) does next is the arm:

* patient: it waits as long as `Retry-After` says and sends the request again, as the SDK does;
* stubborn: it sends the request again when its next one is due, so the pressure stays; where the server leaves its
  connection unread, what it sent waits there.

Goodput is results that were fetched, a second, against the mean of the closed loops before and after. An open loop
lasts twice as long as a closed one and counts whole, its beginning too, in which the queue fills and nobody is refused
yet; its halves are shown. All loops run against the same server and the same runs. The server, workers included, has a
core of its own and so has this client, so neither takes time from the other, where there are two cores. `by its time`
is the same ratio of results for each second of processor time that the server was given: it holds on a machine that
does other work as well. Requests are bytes made beforehand; a client has a connection to send on, and polls on others
that are kept for that.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import rows
from long_polls import allow_files
from run_loops import Arm, Load, Rates
from served import Server, serving

TIMES = 3.0
OPEN = 2  # times as long as the closed loops: in its first seconds the queue fills, and nobody is refused


@dataclass(frozen=True, slots=True)
class Case:
    """num_runs: in open loops each has a connection, in the first case nearly as many as the server takes. levels: of
    closed loops. seconds: of each measurement, in which there are to be many passes."""

    title: str
    device: str
    num_runs: int
    levels: tuple[int, ...]
    seconds: float

    @property
    def flags(self) -> tuple[str, ...]:
        bounds = ("--max-resident-runs", str(2 * self.num_runs), "--max-tenant-disk-mib", "1000000")
        return ("--device", self.device, "--log-level", "error", *bounds)


CASES = {
    "fake": Case("the API as the bottleneck", "fake", 5632, (64, 256, 512), 6.0),
    "real": Case("the engine as the bottleneck", "cpu", 1024, (32, 64, 128), 16.0),
}


@contextmanager
def apart(data_dir: Path, flags: tuple[str, ...]) -> Iterator[Server]:
    """A server on one core and this process on another, where there are two."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[-1:])
    try:
        with serving(data_dir, *flags) as server:
            os.sched_setaffinity(0, cores[:1])
            yield server
    finally:
        os.sched_setaffinity(0, cores)


def run_case(case: Case, args: argparse.Namespace) -> list[rows.Row]:
    allow_files(2 * case.num_runs + 600)
    seconds = args.seconds or case.seconds
    with (
        tempfile.TemporaryDirectory(dir=args.directory) as directory,
        apart(Path(directory) / "data", case.flags) as server,
    ):
        load = Load(server, case.num_runs)
        load.closed(case.num_runs, seconds)  # each run has been asked for something
        found = {num: load.rate(num, seconds) for num in case.levels}
        best = max(found, key=lambda num: found[num])
        print(f"\n{case.title}: closed loops: " + ", ".join(f"{n} clients {rate:.0f}/s" for n, rate in found.items()))
        print(
            "\n| arm | peak, results/s | sent, of peak | refused, of sent | results/s | of peak | its halves | "
            "by its time | cores: client, API, worker |\n|---|---|---|---|---|---|---|---|---|",
            flush=True,
        )
        ratios: dict[Arm, list[float]] = {Arm.PATIENT: [], Arm.STUBBORN: []}
        by_time: dict[Arm, list[float]] = {arm: [] for arm in ratios}
        spent, c = load.closed(best, seconds)
        before, at_peak = Rates.of(spent, c), c
        for arm in args.rounds * list(ratios):
            (first_s, first), (last_s, last) = load.open(arm, TIMES * before.per_s, OPEN * seconds)
            spent, c = first_s + last_s, first + last
            closed_s, closed = load.closed(best, seconds)
            found_rates, after, at_peak = Rates.of(spent, c), Rates.of(closed_s, closed), at_peak + closed
            peak, peak_by_time = (before.per_s + after.per_s) / 2, (before.per_server_s + after.per_server_s) / 2
            ratios[arm].append(found_rates.per_s / peak)
            by_time[arm].append(found_rates.per_server_s / peak_by_time)
            halves = f"{first.fetched / first_s / peak:.2f}, {last.fetched / last_s / peak:.2f}"
            cores = ", ".join(f"{s / spent:.2f}" for s in (c.client_s, c.api_s, c.worker_s))
            print(
                f"| {arm.value} | {peak:.0f} | {c.sent / spent / peak:.2f} | {c.refused / max(1, c.sent):.2f} | "
                f"{found_rates.per_s:.0f} | {ratios[arm][-1]:.2f} | {halves} | {by_time[arm][-1]:.2f} | {cores} |",
                flush=True,
            )
            before = after
    print(f"\nat the peak {at_peak.refused / at_peak.sent:.3f} of what was sent were refused")
    for arm, of_time in by_time.items():
        print(f"{arm.value}: {statistics.median(of_time):.2f} of the results for each second of the server's time")
    what = f"{case.title}: goodput at 3 x the peak load / at the peak (closed loop), clients that "
    kinds = ((Arm.PATIENT, "wait as Retry-After says"), (Arm.STUBBORN, "don't wait"))
    return [
        rows.Row(what + kind, statistics.median(ratios[arm]), "x", ">= 0.9", len(ratios[arm])) for arm, kind in kinds
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.0, help="of each measurement; 0: as the case says")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", choices=list(CASES), action="append", help="of one case alone; default: both")
    parser.add_argument("--runs", type=int, default=0, help="in place of as many as there should be, for a look")
    parser.add_argument("--directory", default=None, help="for the data; one in memory takes the disk out of it")
    rows.add_flag(parser)
    args = parser.parse_args()
    cases = [CASES[name] for name in args.engine or CASES]
    cases = [replace(case, num_runs=args.runs or case.num_runs) for case in cases]
    rows.save(args.rows, [row for case in cases for row in run_case(case, args)])


if __name__ == "__main__":
    main()
