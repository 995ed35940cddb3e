"""What is left of the service's goodput when three times as much is asked of it as it can do?

    python benchmarks/overload.py [--seconds 6] [--rounds 5]

Raw HTTP against `tinsmith serve` on the fake engine, in processes of its own: requests of a few tokens, each fetched
with a poll. First closed loops, of more and more connections: the most results a second is the peak. Then, in turns
with closed loops of that many connections, an open loop offers three times the peak: requests are sent when their time
has come, whatever became of those before. Who is refused with 429 sends the same request again when its next time
comes, whatever `Retry-After` says, so the pressure stays. Goodput is results that were fetched, a second; both loops
run against the same server, and all else that the machine has to do, this client included, weighs on either.
"""

from __future__ import annotations

import argparse
import heapq
import selectors
import socket
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import rows
from long_polls import is_whole
from raw_load import ID_BYTES, MARK, Requests, Setup
from served import Server, serving

TIMES = 3.0
WARM_UP_S = 3.0  # in which connections are opened again that were idle
CLOSED = (16, 64, 256)
RUNS = 1536
TOKENS = 8
FLAGS = ("--device", "fake", "--log-level", "error", "--max-resident-runs", "2048")


@dataclass(slots=True, eq=False)
class Conn:
    """A connection with at most one request under way. what: of `post` or `poll`."""

    sock: socket.socket
    run: Run
    what: str
    is_asking: bool = False
    answer: bytearray = field(default_factory=bytearray)

    def send(self, request: bytes) -> None:
        self.is_asking = True
        self.sock.sendall(request)


@dataclass(slots=True, eq=False)
class Run:
    """A run's next request, and those whose results have not been fetched."""

    name: str
    number: int
    seq: int = 1
    due: float = 0.0
    request: bytes = b""
    unfetched: list[bytes] = field(default_factory=list)
    post: Conn | None = None
    poll: Conn | None = None


class Load:
    """All runs' connections. Counts: results fetched, requests accepted, refused with 429 and offered."""

    def __init__(self, server: Server) -> None:
        self._requests = Requests(server.url, server.key)
        self._poll_head = self._requests.poll_head()
        address = urlsplit(server.url)
        self._address = address.hostname or "", address.port or 0
        self._selector = selectors.DefaultSelector()
        names = Setup(server.url, server.key).create_runs("tinsmith/tiny", RUNS)
        self.runs = [Run(name, number) for number, name in enumerate(names)]
        for run in self.runs:
            run.post, run.poll = self._connect(run, "post"), self._connect(run, "poll")
        self.num_fetched = self.num_accepted = self.num_refused = self.num_offered = 0
        self._is_closed_loop = True
        self._due: list[tuple[float, int]] = []  # when runs whose connection is free send next

    def _connect(self, run: Run, what: str) -> Conn:
        conn = Conn(self._open(), run, what)
        self._selector.register(conn.sock, selectors.EVENT_READ, conn)
        return conn

    def closed(self, num_runs: int, seconds: float) -> float:
        """Results a second where each of so many runs awaits every result before it goes on."""
        self._is_closed_loop = True
        started, fetched = time.perf_counter(), self.num_fetched
        for run in self.runs[:num_runs]:
            self._post(run)
        until = started + seconds
        while time.perf_counter() < until:
            self._turn(0.05)
        rate = (self.num_fetched - fetched) / (time.perf_counter() - started)
        self.drain()
        return rate

    def open(self, rate: float, seconds: float) -> tuple[float, float, float]:
        """(results, requests offered, and requests refused) a second, where `rate` requests a second fall due."""
        self._is_closed_loop = False
        begun = time.perf_counter()
        started, before = begun, (0, 0, 0)
        interval = len(self.runs) / rate
        for number, run in enumerate(self.runs):
            run.due = started + number / rate
        self._due = [(run.due, number) for number, run in enumerate(self.runs)]
        now, is_timed = started, False
        while now < begun + WARM_UP_S + seconds:
            if not is_timed and now > begun + WARM_UP_S:
                started, before, is_timed = now, (self.num_fetched, self.num_offered, self.num_refused), True
            while self._due and self._due[0][0] <= now:
                _, number = heapq.heappop(self._due)
                run = self.runs[number]
                run.due = max(run.due + interval, now - interval)
                self._post(run)
            wait = self._due[0][0] - time.perf_counter() if self._due else 0.002
            self._turn(min(0.002, max(0.0, wait)))
            now = time.perf_counter()
        spent = now - started
        after = self.num_fetched, self.num_offered, self.num_refused
        self._is_closed_loop = True
        results, offered, refused = ((b - a) / spent for a, b in zip(before, after, strict=True))
        return results, offered, refused

    def drain(self) -> None:
        """Until nothing is under way."""
        self._is_closed_loop = False
        while any(run.unfetched or (run.post is not None and run.post.is_asking) for run in self.runs):
            self._turn(0.05)

    def _post(self, run: Run) -> None:
        if not run.request:
            run.request = self._requests.forward_backward(run.name, run.seq, TOKENS)
        self.num_offered += 1
        assert run.post is not None
        run.post.send(run.request)

    def _fetch(self, run: Run) -> None:
        if run.unfetched and run.poll is not None and not run.poll.is_asking:
            run.poll.send(self._poll_head + run.unfetched[0] + b'"}')

    def _turn(self, wait_s: float) -> None:
        for key, _ in self._selector.select(wait_s):
            conn: Conn = key.data
            try:
                piece = conn.sock.recv(65536)
            except ConnectionResetError:
                piece = b""
            if not piece:
                self._again(conn)
                continue
            conn.answer += piece
            if is_whole(conn.answer):
                answer, conn.answer, conn.is_asking = bytes(conn.answer), bytearray(), False
                self._posted(conn.run, answer) if conn.what == "post" else self._polled(conn.run, answer)

    def _again(self, conn: Conn) -> None:
        """The server closes connections that were idle for some seconds; what was on its way then is sent again."""
        if conn.answer:
            raise SystemExit("the server closed a connection in the middle of an answer")
        self._selector.unregister(conn.sock)
        conn.sock.close()
        conn.sock = self._open()
        self._selector.register(conn.sock, selectors.EVENT_READ, conn)
        if conn.is_asking and conn.what == "post":
            conn.send(conn.run.request)
        elif conn.is_asking:
            conn.send(self._poll_head + conn.run.unfetched[0] + b'"}')

    def _open(self) -> socket.socket:
        sock = socket.create_connection(self._address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def _posted(self, run: Run, answer: bytes) -> None:
        status = answer[9:12]
        heapq.heappush(self._due, (run.due, run.number))
        if status == b"429" and b"retry-after: " in answer:
            self.num_refused += 1
        elif status != b"200":
            raise SystemExit(f"a request was refused: {answer!r}")
        else:
            begin = answer.index(MARK) + len(MARK)
            run.unfetched.append(answer[begin : begin + ID_BYTES])
            run.seq, run.request = run.seq + 1, b""
            self.num_accepted += 1
            self._fetch(run)

    def _polled(self, run: Run, answer: bytes) -> None:
        status = answer[9:12]
        if status == b"200" and b'"error"' not in answer:
            run.unfetched.pop(0)
            self.num_fetched += 1
            if self._is_closed_loop and not run.unfetched:
                self._post(run)
        elif status not in (b"408", b"429"):
            raise SystemExit(f"a request failed: {answer!r}")
        self._fetch(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", default=None, help="for the data; one in memory takes the disk out of it")
    rows.add_flag(parser)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=args.directory) as directory,
        serving(Path(directory) / "data", *FLAGS) as server,
    ):
        load = Load(server)
        load.closed(16, 2.0)
        found = {num: load.closed(num, args.seconds) for num in CLOSED}
        best = max(found, key=lambda num: found[num])
        print("closed loops: " + ", ".join(f"{num} runs {rate:.0f}/s" for num, rate in found.items()))
        ratios, lines = [], []
        for _ in range(args.rounds):
            peak = load.closed(best, args.seconds)
            cpu = server.cpu_s(server.api_pid)
            results, offered, refused = load.open(TIMES * peak, args.seconds)
            cpu = (server.cpu_s(server.api_pid) - cpu) / (WARM_UP_S + args.seconds)
            load.drain()
            ratios.append(results / peak)
            shown = f"{peak:.0f} | {offered / peak:.2f} | {refused / offered:.2f} | {results:.0f}"
            lines.append(f"| {shown} | {ratios[-1]:.2f} | {cpu:.2f} |")
        print(
            "\n| peak, results/s | offered, of peak | refused, of offered | results/s | of peak | API cores |\n"
            "|---|---|---|---|---|---|\n" + "\n".join(lines)
        )
        what = "goodput at 3 x the peak load / at the peak (closed loop)"
        rows.save(args.rows, [rows.Row(what, statistics.median(ratios), "x", ">= 0.9", len(ratios))])


if __name__ == "__main__":
    main()
