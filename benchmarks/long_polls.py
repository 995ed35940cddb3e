"""What do 10,000 long polls cost the API process while nothing happens, and how fast does it wake one of them?

    ulimit -n 12000; python benchmarks/long_polls.py

Each poll is a connection of its own that waits for a request of its own, which can't run yet: one before it is missing.
A poll that is answered "try again" after `--poll-hold-s` (40) is sent again at once, as the SDK does. Processor time is
that of the API process, first while all polls are held and none comes, then over a whole hold, in which each is sent
again once. Memory is that process's resident set, with what the kernel holds in TCP buffers on the whole machine. The
server is `tinsmith serve` on the fake engine, in processes of its own. A wake-up is timed with all polls open, from the
request that was missing to the answer that its successor's poll waited for: with the POST, the computing and the
recording, so the wake-up itself is shorter.

Needs more open files than polls: it raises its own limit up to the hard one (`ulimit -Hn`), the server does the same.
"""

from __future__ import annotations

import argparse
import resource
import selectors
import socket
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import rows
from raw_load import END, ID_BYTES, LENGTH, MARK, Requests, Setup
from served import Server, serving

from tinsmith.config import Settings

SPARE_FILES = 600
WAKES = 40
HELD_S = Settings().poll_hold_s
FLAGS = ("--device", "fake", "--gap-timeout-s", "36000", "--log-level", "warning")


class Client:
    """One connection that asks and reads whole answers."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sock = socket.create_connection(address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, request: bytes) -> bytes:
        self.sock.sendall(request)
        return self.read()

    def read(self) -> bytes:
        answer = bytearray()
        while not is_whole(answer):
            piece = self.sock.recv(65536)
            if not piece:
                raise SystemExit(f"the server closed a connection: {bytes(answer)!r}")
            answer += piece
        return bytes(answer)

    def promise(self, request: bytes) -> bytes:
        """Send a request that is carried out later, again while the server has too much to do; its id."""
        answer = self.ask(request)
        while answer[9:12] == b"429":
            time.sleep(1.0)
            answer = self.ask(request)
        if answer[9:12] != b"200":
            raise SystemExit(f"refused: {answer!r}")
        begin = answer.index(MARK) + len(MARK)
        return answer[begin : begin + ID_BYTES]


class Polls(threading.Thread):
    """Many connections, each with a poll that is sent again whenever it is answered 408. num_again: how often."""

    def __init__(self, address: tuple[str, int], polls: list[bytes], within_s: float) -> None:
        super().__init__(daemon=True)
        self.num_again = 0
        self._selector = selectors.DefaultSelector()
        self._is_over = threading.Event()
        for number, poll in enumerate(polls):
            client = Client(address)
            client.sock.sendall(poll)
            self._selector.register(client.sock, selectors.EVENT_READ, (client, poll))
            time.sleep(within_s / len(polls) if number % 10 == 0 else 0)

    def run(self) -> None:
        while not self._is_over.is_set():
            for key, _ in self._selector.select(0.2):
                client, poll = key.data
                if client.read()[9:12] != b"408":
                    raise SystemExit("a poll was answered that waits for what can't run")
                client.sock.sendall(poll)
                self.num_again += 1

    def stop(self) -> None:
        self._is_over.set()
        self.join()
        for key in list(self._selector.get_map().values()):
            key.data[0].sock.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--polls", type=int, default=10_000)
    rows.add_flag(parser)
    args = parser.parse_args()
    allow_files(args.polls + SPARE_FILES)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        server = stack.enter_context(serving(Path(directory) / "data", *FLAGS))
        measure(server, args)


def measure(server: Server, args: argparse.Namespace) -> None:
    address = urlsplit(server.url).hostname or "", urlsplit(server.url).port or 0
    requests = Requests(server.url, server.key)
    waiting, *waking = Setup(server.url, server.key).create_runs("tinsmith/tiny", 1 + WAKES)
    client = Client(address)
    poll_head = requests.poll_head()
    ids = [client.promise(requests.optim_step(waiting, 2 + number)) for number in range(args.polls)]
    alone = wake_up(address, requests, waking[: WAKES // 4])
    before, tcp_before = rss_mib(server.api_pid), tcp_mib()
    started = time.perf_counter()
    polls = Polls(address, [poll_head + op_id + b'"}' for op_id in ids], within_s=6.0)
    opened_s = time.perf_counter() - started
    polls.start()
    time.sleep(2.0)
    held = rss_mib(server.api_pid) - before
    quiet, again = busy_share(server, HELD_S - 4.0 - (time.perf_counter() - started)), polls.num_again
    share = busy_share(server, HELD_S)
    again = polls.num_again - again
    held = max(held, rss_mib(server.api_pid) - before)
    tcp = tcp_mib() - tcp_before
    wakes = wake_up(address, requests, waking[WAKES // 4 :])
    polls.stop()
    print(
        f"{args.polls} polls opened in {opened_s:.0f} s; {again} were sent again in {HELD_S:g} s\n\n"
        "| | alone | with all polls |\n|---|---|---|\n"
        f"| resident memory of the API, MiB | {before:.0f} | {before + held:.0f} |\n"
        f"| the kernel's TCP buffers, both ends, MiB | | +{tcp:.1f} |\n"
        f"| processor time of the API while all are held, % of a core | | {100 * quiet:.1f} |\n"
        f"| the same over a hold, in which all come anew | | {100 * share:.1f} |\n"
        f"| from the missing request to the woken poll's answer, median ms | {1e3 * statistics.median(alone):.1f} | "
        f"{1e3 * statistics.median(wakes):.1f} |\n"
        f"| the same, longest ms | {1e3 * max(alone):.1f} | {1e3 * max(wakes):.1f} |"
    )
    what = f"{args.polls} long polls open"
    rows.save(
        args.rows,
        [
            rows.Row(f"{what}: memory more, API and kernel", held + tcp, "MiB", "< 300", 1),
            rows.Row(f"{what}: processor time of the API while they are held", 100 * quiet, "% of a core", "< 5", 1),
            rows.Row(f"{what}: the same with each sent again once", 100 * share, "% of a core", "< 5", 1),
            rows.Row(
                f"{what}: median wake-up, with its request", 1e3 * statistics.median(wakes), "ms", "< 50", len(wakes)
            ),
        ],
    )


def busy_share(server: Server, seconds: float) -> float:
    """The API's processor time in so many seconds, of one core's."""
    cpu, since = server.cpu_s(server.api_pid), time.perf_counter()
    time.sleep(max(1.0, seconds))
    return (server.cpu_s(server.api_pid) - cpu) / (time.perf_counter() - since)


def wake_up(address: tuple[str, int], requests: Requests, runs: list[str]) -> list[float]:
    """Seconds from a request that was missing to the answer to its successor's poll."""
    sender, poller = Client(address), Client(address)
    seconds = []
    for run in runs:
        op_id = sender.promise(requests.optim_step(run, 2))
        poller.sock.sendall(requests.poll_head() + op_id + b'"}')
        time.sleep(0.05)
        started = time.perf_counter()
        sender.promise(requests.optim_step(run, 1))
        answer = poller.read()
        seconds.append(time.perf_counter() - started)
        if answer[9:12] != b"200":
            raise SystemExit(f"no result: {answer!r}")
    return seconds


def allow_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SystemExit(f"{wanted} open files are needed, {hard} may be had: run `ulimit -Hn {wanted}` as root first")
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("the API is gone")


def tcp_mib() -> float:
    """What the kernel holds in TCP buffers."""
    for line in Path("/proc/net/sockstat").read_text().splitlines():
        if line.startswith("TCP:"):
            return int(line.split()[-1]) * resource.getpagesize() / 2**20
    return 0.0


def is_whole(answer: bytearray) -> bool:
    end = answer.find(END)
    if end < 0:
        return False
    begin = answer.find(LENGTH) + len(LENGTH)
    return len(answer) >= end + len(END) + int(answer[begin : answer.index(b"\r", begin)])


if __name__ == "__main__":
    main()
