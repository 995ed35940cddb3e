"""What is left of the service's goodput when three times as much is asked of it as it can do?

    python benchmarks/overload.py [--seconds 4] [--rounds 5]

Raw HTTP against `tinsmith serve` on the fake engine, in processes of its own: requests of a few tokens, each fetched
with a poll. First closed loops, of more and more connections: the most results a second is the peak. Then, in turns
with closed loops of that many connections, open loops offer three times the peak: requests are sent when their time
has come, whatever became of those of other runs. What a refused run (429) does next is the arm:

* patient: it waits as long as `Retry-After` says and sends the request again, as the SDK does;
* stubborn: it sends the request again when its next one is due, so the pressure stays.

Goodput is results that were fetched, a second; all loops run against the same server, and all else that the machine
has to do, this client included, weighs on each. `by API time` is the same ratio of results for each second of processor
time that the API, which is the bottleneck, was given: it holds on a machine that does other work as well. Requests are
bytes made beforehand; a run sends on one connection and polls on another, for its requests one after the other. The
client's processor time is printed.
"""

from __future__ import annotations

import argparse
import heapq
import select
import socket
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from urllib.parse import urlsplit

import rows
from long_polls import allow_files
from raw_load import END, ID_BYTES, MARK, Requests, Setup, drive
from served import Server, serving

from tinsmith.wire import wire_pb2 as pb

TIMES = 3.0
WARM_UP_S = 2.0
CLOSED = (64, 256, 512)
RUNS = 5632  # with two connections each, nearly as many as the server takes
MAKERS = 32  # connections that make runs
TOKENS = 8
NO_BOUND = ("--max-resident-runs", str(2 * RUNS), "--max-tenant-disk-mib", "1000000")
FLAGS = ("--device", "fake", "--log-level", "error", *NO_BOUND)
SEQ_TAG = pb.ForwardBackwardRequest.DESCRIPTOR.fields_by_name["seq_id"].number << 3


class Arm(Enum):
    CLOSED = "closed"
    PATIENT = "patient"
    STUBBORN = "stubborn"


@dataclass(slots=True, eq=False)
class Conn:
    """A connection of a run's. asked: the request that is under way."""

    sock: socket.socket
    run: Run
    asked: bytes = b""

    def send(self, request: bytes) -> None:
        self.asked = request
        self.sock.sendall(request)


@dataclass(slots=True, eq=False)
class Run:
    """A run and its next request. due: when that is; unfetched: requests whose results it has not got."""

    head: bytes
    body: bytes
    number: int
    seq: int = 1
    due: float = 0.0
    unfetched: deque[bytes] = field(default_factory=deque)
    post: Conn | None = None
    poll: Conn | None = None

    def request(self) -> bytes:
        body = self.body + bytes([SEQ_TAG]) + varint(self.seq)
        return self.head % len(body) + body


@dataclass(slots=True)
class Counts:
    """Of results fetched, requests sent and refused; seconds of this client's processor time, and the API's."""

    fetched: int = 0
    sent: int = 0
    refused: int = 0
    client_s: float = 0.0
    api_s: float = 0.0
    worker_s: float = 0.0


def varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


class Load:
    def __init__(self, server: Server) -> None:
        self._server = server
        requests = Requests(server.url, server.key)
        self._poll_head = requests.poll_head()
        address = urlsplit(server.url)
        self._address = address.hostname or "", address.port or 0
        self._epoll = select.epoll()
        self._by_fd: dict[int, Conn] = {}
        head = requests.post("forward_backward", b"", "application/x-protobuf").removesuffix(b"0" + END) + b"%d" + END
        self.runs = [Run(head, body_of(name), n) for n, name in enumerate(make_runs(server, requests))]
        for run in self.runs:
            run.post, run.poll = self._watch(Conn(self._open(), run)), self._watch(Conn(self._open(), run))
        self.counts = Counts()
        self._arm = Arm.CLOSED
        self._due: list[tuple[float, int]] = []
        self._interval = 0.0
        self._is_over = True

    def closed(self, num_runs: int, seconds: float) -> tuple[float, Counts]:
        """(seconds, what was counted in them) where each of so many runs awaits every result before it goes on."""
        self._arm, self._is_over = Arm.CLOSED, False
        for run in self.runs[:num_runs]:
            self._post(run)
        self._turn_until(time.perf_counter() + 0.5)
        spent, counts = self._measure(seconds)
        self.drain()
        return spent, counts

    def rate(self, num_runs: int, seconds: float) -> float:
        spent, counts = self.closed(num_runs, seconds)
        return counts.fetched / spent

    def open(self, arm: Arm, rate: float, seconds: float) -> tuple[float, Counts]:
        """(seconds, what was counted in them) where `rate` requests a second fall due."""
        self._arm, self._is_over = arm, False
        self._interval = len(self.runs) / rate
        started = time.perf_counter()
        for number, run in enumerate(self.runs):
            run.due = started + number / rate
        self._due = [(run.due, run.number) for run in self.runs]
        self._turn_until(started + WARM_UP_S)
        spent, counts = self._measure(seconds)
        self.drain()
        return spent, counts

    def drain(self) -> None:
        """Until nothing is under way; what was refused is not sent again."""
        self._is_over, self._due = True, []
        while any(run.unfetched or (run.post and run.post.asked) for run in self.runs):
            self._turn(0.05)

    def _measure(self, seconds: float) -> tuple[float, Counts]:
        began, before = time.perf_counter(), self._now()
        self._turn_until(began + seconds)
        now = self._now()
        counts = Counts(*(getattr(now, name) - getattr(before, name) for name in Counts.__slots__))
        return time.perf_counter() - began, counts

    def _now(self) -> Counts:
        counts, server = self.counts, self._server
        api_s, worker_s = server.cpu_s(server.api_pid), server.cpu_s(*server.worker_pids)
        return Counts(counts.fetched, counts.sent, counts.refused, time.process_time(), api_s, worker_s)

    def _turn_until(self, until: float) -> None:
        while (now := time.perf_counter()) < until:
            while self._due and self._due[0][0] <= now:
                self._post(self.runs[heapq.heappop(self._due)[1]])
            self._turn(0.001 if self._due else 0.02)

    def _turn(self, wait_s: float) -> None:
        for fd, _ in self._epoll.poll(wait_s):
            conn = self._by_fd[fd]
            try:
                answer = conn.sock.recv(65536)
            except ConnectionResetError:
                answer = b""
            if not answer:
                self._again(conn)
                continue
            end = answer.index(END)
            length = int(answer[answer.index(b"content-length: ") + 16 : end].partition(b"\r")[0])
            while len(answer) < end + len(END) + length:
                answer += conn.sock.recv(65536)
            conn.asked = b""
            if conn is conn.run.post:
                self._posted(conn.run, answer)
            else:
                self._polled(conn.run, answer)

    def _post(self, run: Run) -> None:
        assert run.post is not None
        self.counts.sent += 1
        run.post.send(run.request())

    def _poll(self, run: Run) -> None:
        if run.unfetched and run.poll is not None and not run.poll.asked:
            run.poll.send(self._poll_head + run.unfetched[0] + b'"}')

    def _posted(self, run: Run, answer: bytes) -> None:
        status = answer[9:12]
        if status == b"429":
            self.counts.refused += 1
            begin = answer.index(b"retry-after: ") + 13
            wait_s = float(answer[begin:].partition(b"\r")[0])
            self._wait(run, time.perf_counter() + wait_s if self._arm is not Arm.STUBBORN else self._next(run))
        elif status != b"200":
            raise SystemExit(f"a request was refused: {answer!r}")
        else:
            begin = answer.index(MARK) + len(MARK)
            run.unfetched.append(answer[begin : begin + ID_BYTES])
            run.seq += 1
            self._poll(run)
            if self._arm is not Arm.CLOSED:
                self._wait(run, self._next(run))

    def _polled(self, run: Run, answer: bytes) -> None:
        status = answer[9:12]
        if status == b"200" and b'"error"' not in answer:
            run.unfetched.popleft()
            self.counts.fetched += 1
            if self._arm is Arm.CLOSED and not self._is_over:
                self._post(run)
        elif status not in (b"408", b"429"):
            raise SystemExit(f"a request failed: {answer!r}")
        self._poll(run)

    def _next(self, run: Run) -> float:
        run.due = max(run.due + self._interval, time.perf_counter())
        return run.due

    def _wait(self, run: Run, until: float) -> None:
        if not self._is_over:
            heapq.heappush(self._due, (until, run.number))

    def _again(self, conn: Conn) -> None:
        """The server closes connections that were idle for some seconds; what was on its way then is sent again."""
        del self._by_fd[conn.sock.fileno()]
        conn.sock.close()
        conn.sock = self._open()
        self._watch(conn)
        if conn.asked:
            conn.sock.sendall(conn.asked)

    def _watch(self, conn: Conn) -> Conn:
        self._by_fd[conn.sock.fileno()] = conn
        self._epoll.register(conn.sock.fileno(), select.EPOLLIN)
        return conn

    def _open(self) -> socket.socket:
        sock = socket.create_connection(self._address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock


def body_of(name: str) -> bytes:
    """A forward_backward of a run without its number, which may be put after it."""
    whole = Requests("http://none", "").forward_backward(name, 0, TOKENS)
    return whole.partition(END)[2]


def make_runs(server: Server, requests: Requests) -> Iterator[str]:
    setup = Setup(server.url, server.key)
    session = setup.ask("create_session", {"tags": [], "sdk_version": "0.38.0"})["session_id"]
    loads = [[requests.create_model(session, n) for n in range(first, RUNS, MAKERS)] for first in range(MAKERS)]
    drive(server.url, server.key, loads)
    return (f"{session}:train:{number}" for number in range(RUNS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", default=None, help="for the data; one in memory takes the disk out of it")
    rows.add_flag(parser)
    args = parser.parse_args()
    allow_files(2 * RUNS + 600)
    with (
        tempfile.TemporaryDirectory(dir=args.directory) as directory,
        serving(Path(directory) / "data", *FLAGS) as server,
    ):
        load = Load(server)
        load.closed(RUNS, args.seconds)  # each run has been asked for something
        found = {num: load.rate(num, args.seconds) for num in CLOSED}
        best = max(found, key=lambda num: found[num])
        print("closed loops: " + ", ".join(f"{num} runs {rate:.0f}/s" for num, rate in found.items()))
        print(
            "\n| arm | peak, results/s | sent, of peak | refused, of sent | results/s | of peak | by API time | "
            "cores: client, API, worker |\n|---|---|---|---|---|---|---|---|",
            flush=True,
        )
        ratios: dict[Arm, list[float]] = {Arm.PATIENT: [], Arm.STUBBORN: []}
        by_time: dict[Arm, list[float]] = {arm: [] for arm in ratios}
        for _ in range(args.rounds):
            for arm, found_ratios in ratios.items():
                spent, at_peak = load.closed(best, args.seconds)
                peak = at_peak.fetched / spent
                spent, c = load.open(arm, TIMES * peak, args.seconds)
                found_ratios.append(c.fetched / spent / peak)
                by_time[arm].append((c.fetched / c.api_s) / (at_peak.fetched / at_peak.api_s))
                cores = ", ".join(f"{s / spent:.2f}" for s in (c.client_s, c.api_s, c.worker_s))
                print(
                    f"| {arm.value} | {peak:.0f} | {c.sent / spent / peak:.2f} | {c.refused / max(1, c.sent):.2f} | "
                    f"{c.fetched / spent:.0f} | {found_ratios[-1]:.2f} | {by_time[arm][-1]:.2f} | {cores} |",
                    flush=True,
                )
        what = "goodput at 3 x the peak load / at the peak (closed loop), clients that "
        kinds = ((Arm.PATIENT, "wait as Retry-After says"), (Arm.STUBBORN, "don't wait"))
        for arm, found_ratios in by_time.items():
            print(
                f"{arm.value}: {statistics.median(found_ratios):.2f} of the results for each second of the API's time"
            )
        rows.save(
            args.rows,
            [
                rows.Row(what + kind, statistics.median(ratios[arm]), "x", ">= 0.9", len(ratios[arm]))
                for arm, kind in kinds
            ],
        )


if __name__ == "__main__":
    main()
