"""Closed and open loops of raw requests on many runs, from one thread: see `overload.py`."""

from __future__ import annotations

import heapq
import select
import socket
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from urllib.parse import urlsplit

from raw_load import END, ID_BYTES, MARK, Requests, Setup, drive
from served import Server

from tinsmith.wire import wire_pb2 as pb

WARM_UP_S = 2.0
MAKERS = 32  # connections that make runs
TOKENS = 8
SEQ_TAG = pb.ForwardBackwardRequest.DESCRIPTOR.fields_by_name["seq_id"].number << 3


class Arm(Enum):
    CLOSED = "closed"
    PATIENT = "patient"
    STUBBORN = "stubborn"


@dataclass(slots=True, eq=False)
class Conn:
    """asked: the request of `run` that is under way on it."""

    sock: socket.socket
    run: Run | None = None
    asked: bytes = b""
    is_poll: bool = False

    def send(self, run: Run, request: bytes, *, is_poll: bool = False) -> None:
        self.run, self.asked, self.is_poll = run, request, is_poll
        self.sock.sendall(request)


@dataclass(slots=True, eq=False)
class Run:
    """A run and its next request. due: when that is; unfetched: requests whose results it has not got; own: its
    connection, in an open loop."""

    head: bytes
    body: bytes
    number: int
    seq: int = 1
    due: float = 0.0
    unfetched: deque[bytes] = field(default_factory=deque)
    own: Conn | None = None
    is_posting: bool = False
    is_polling: bool = False

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

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in Counts.__slots__))


@dataclass(frozen=True, slots=True)
class Rates:
    """Results a second, and for each second of the server's processor time."""

    per_s: float
    per_server_s: float

    @classmethod
    def of(cls, spent: float, counts: Counts) -> Rates:
        return cls(counts.fetched / spent, counts.fetched / max(0.01, counts.api_s + counts.worker_s))


def varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


class Load:
    def __init__(self, server: Server, num_runs: int) -> None:
        self._server = server
        requests = Requests(server.url, server.key)
        self._poll_head = requests.poll_head()
        address = urlsplit(server.url)
        self._address = address.hostname or "", address.port or 0
        self._epoll = select.epoll()
        self._by_fd: dict[int, Conn] = {}
        self._spare: list[Conn] = []
        head = requests.post("forward_backward", b"", "application/x-protobuf").removesuffix(b"0" + END) + b"%d" + END
        names = make_runs(server, requests, num_runs)
        self.runs = [Run(head, body_of(name), n) for n, name in enumerate(names)]
        self._idle = deque(self.runs)
        self.counts = Counts()
        self._arm = Arm.CLOSED
        self._due: list[tuple[float, int]] = []
        self._interval = 0.0
        self._is_over = True

    def closed(self, num_clients: int, seconds: float) -> tuple[float, Counts]:
        """(seconds, what was counted in them) where each of so many clients awaits every result before it goes on,
        with the run that has waited longest."""
        self._arm, self._is_over = Arm.CLOSED, False
        for _ in range(num_clients):
            self._post(self._idle.popleft())
        self._turn_until(time.perf_counter() + 0.5)
        spent, counts = self._measure(seconds)
        self.drain()
        return spent, counts

    def rate(self, num_clients: int, seconds: float) -> float:
        spent, counts = self.closed(num_clients, seconds)
        return counts.fetched / spent

    def open(self, arm: Arm, rate: float, seconds: float) -> list[tuple[float, Counts]]:
        """Two halves, each (seconds, what was counted in them), where `rate` requests a second fall due."""
        self._arm, self._is_over = arm, False
        self._interval = len(self.runs) / rate
        for run in self.runs:
            run.own = self._open(run)
        started = time.perf_counter()
        for number, run in enumerate(self.runs):
            run.due = started + number / rate
        self._due = [(run.due, run.number) for run in self.runs]
        self._turn_until(started + WARM_UP_S)
        halves = [self._measure(seconds / 2) for _ in range(2)]
        self.drain()
        for run in self.runs:
            if run.own is not None:
                self._close(run.own)
                run.own = None
        return halves

    def drain(self) -> None:
        """Until nothing is under way; what was refused is not sent again."""
        self._is_over, self._due = True, []
        while any(run.unfetched or run.is_posting for run in self.runs):
            self._turn(0.05)
        self._idle = deque(sorted(self.runs, key=lambda run: run.due))

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
            conn = self._by_fd.get(fd)
            if conn is None:  # it was closed a moment ago
                continue
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
            assert conn.run is not None
            if conn is not conn.run.own:
                self._spare.append(conn)
            (self._polled if conn.is_poll else self._posted)(conn.run, answer)

    def _post(self, run: Run) -> None:
        self.counts.sent += 1
        run.is_posting = True
        if self._arm is Arm.CLOSED:
            self._lent().send(run, run.request())
            return
        if run.own is None:
            run.own = self._open(run)
        run.own.send(run, run.request())

    def _poll(self, run: Run) -> None:
        if run.unfetched and not run.is_polling:
            run.is_polling = True
            self._lent().send(run, self._poll_head + run.unfetched[0] + b'"}', is_poll=True)

    def _posted(self, run: Run, answer: bytes) -> None:
        status = answer[9:12]
        run.is_posting = False
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
        run.is_polling = False
        if status == b"200" and b'"error"' not in answer:
            run.unfetched.popleft()
            self.counts.fetched += 1
            if self._arm is Arm.CLOSED:
                run.due = time.perf_counter()
                self._idle.append(run)
                if not self._is_over:
                    self._post(self._idle.popleft())
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
        self._close(conn)
        if conn in self._spare:
            self._spare.remove(conn)
        if conn.run is None:
            return
        is_own = conn is conn.run.own
        if is_own:
            conn.run.own = None
        if conn.asked:
            new = self._open(conn.run)
            if is_own:
                conn.run.own = new
            new.send(conn.run, conn.asked, is_poll=conn.is_poll)

    def _lent(self) -> Conn:
        """The spare connection that was used last, or a new one."""
        return self._spare.pop() if self._spare else self._open()

    def _open(self, run: Run | None = None) -> Conn:
        conn = Conn(socket.create_connection(self._address), run)
        conn.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._by_fd[conn.sock.fileno()] = conn
        self._epoll.register(conn.sock.fileno(), select.EPOLLIN)
        return conn

    def _close(self, conn: Conn) -> None:
        del self._by_fd[conn.sock.fileno()]
        self._epoll.unregister(conn.sock.fileno())
        conn.sock.close()


def body_of(name: str) -> bytes:
    """A forward_backward of a run without its number, which may be put after it."""
    whole = Requests("http://none", "").forward_backward(name, 0, TOKENS)
    return whole.partition(END)[2]


def make_runs(server: Server, requests: Requests, num_runs: int) -> Iterator[str]:
    setup = Setup(server.url, server.key)
    session = setup.ask("create_session", {"tags": [], "sdk_version": "0.38.0"})["session_id"]
    loads = [[requests.create_model(session, n) for n in range(first, num_runs, MAKERS)] for first in range(MAKERS)]
    drive(server.url, server.key, loads)
    return (f"{session}:train:{number}" for number in range(num_runs))
