"""Kills at random while sixteen clients train and sample, and what must be true afterwards.

    python -m tests.crash.chaos --kills 500 [--seed N] [--device fake|cpu] [--workers 1]

Every kind of process is among the killed: workers, the API process, both, `serve` itself (started again as an init
system would), clients; by SIGKILL, by SIGTERM, by being stopped. Then the clients end their work, and everything is
compared with the same work on a server that nobody disturbed. A failed run is tried again with the seed that is
printed: the kills are drawn from it alone, when they meet the server is chance.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.crash.raw_client import Client, Journal, asks
from tests.service import Service, is_alive, until
from tinsmith.files.blobs import Blobs
from tinsmith.files.checkpoint_file import read_state
from tinsmith.store import DATABASE_FILE
from tinsmith.types import BlobKey
from tinsmith.wire import wire_pb2 as pb

NUM_CLIENTS = 16
NUM_PROCESSES = 2
FLAGS = ("--inline-bytes", "256", "--snapshot-debt-bytes", "4000", "--lease-s", "3", "--hang-timeout-s", "3")
END_WITHIN_S = 240.0
READY_S = 100.0
KINDS = {"worker": 6, "api": 5, "both": 3, "clients": 3, "serve": 1, "halt": 1, "end": 1, "stop": 1, "relief": 1}
POLITE = frozenset({"halt", "end", "relief"})  # all others end with SIGKILL; who is stopped gets it from `serve`


class Clients:
    """Client processes, each with some of the clients, on one directory of journals."""

    def __init__(self, service: Service, directory: Path) -> None:
        self._service = service
        self.directory = directory
        directory.mkdir()
        share = NUM_CLIENTS // NUM_PROCESSES
        self._spans = [(n * share, (n + 1) * share) for n in range(NUM_PROCESSES)]
        self._log = (directory / "log").open("ab")
        self._processes = [self._start(*span) for span in self._spans]

    def _start(self, first: int, last: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.crash.raw_client", self._service.url, self._service.key]
        return subprocess.Popen(
            [*command, str(self.directory), str(first), str(last)], stdout=self._log, stderr=self._log
        )

    def kill(self, index: int) -> None:
        """One process of them, which is started again at once."""
        self._processes[index].kill()
        self._processes[index].wait()
        self._processes[index] = self._start(*self._spans[index])

    def journals(self) -> list[Journal]:
        return [Journal.read(self.directory / f"client-{n}.jsonl") for n in range(NUM_CLIENTS)]

    def end(self, limits: dict[str, int] | None = None) -> list[Journal]:
        """Have them take so many steps each, or those that they have begun, and wait until all have ended."""
        path = self.directory / "stop"
        path.with_suffix(".new").write_text("" if limits is None else json.dumps(limits))
        path.with_suffix(".new").rename(path)
        deadline = time.monotonic() + END_WITHIN_S
        while any(process.poll() is None for process in self._processes):
            assert time.monotonic() < deadline, f"clients wait for ever: {self._say_where()}"
            time.sleep(0.05)
        said = (self.directory / "log").read_text()
        assert all(process.returncode == 0 for process in self._processes), said[-3000:]
        return self.journals()

    def _say_where(self) -> str:
        return str({j.path.name: (len(j.acks), len(j.results)) for j in self.journals() if not j.is_over})

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._log.close()


class Chaos:
    def __init__(self, service: Service, clients: Clients, rng: random.Random) -> None:
        self._service, self._clients, self._rng = service, clients, rng
        self.count: Counter[str] = Counter()

    def strike(self, kind: str) -> None:
        """One kill, and sometimes a while until what was killed is back."""
        is_awaited = self._rng.random() < 0.6
        pause_s = self._rng.random() * 0.5
        index = self._rng.randrange(NUM_PROCESSES)
        self.count[kind] += 1
        getattr(self, f"hit_{kind}")(index)
        if is_awaited and kind != "clients":
            until(self._service.is_ready, READY_S, self._service.log.read_text)
        time.sleep(pause_s)

    def _pids(self, *, api: bool = False, workers: bool = False) -> list[int]:
        info = self._service.info()
        return [info["api_pid"]] * api + list(info["worker_pids"].values()) * workers

    def _send(self, number: signal.Signals, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                if _is_child_of(pid, self._service.process.pid):
                    os.kill(pid, number)

    def hit_worker(self, index: int) -> None:
        pids = self._pids(workers=True)
        self._send(signal.SIGKILL, [pids[index % len(pids)]])

    def hit_api(self, index: int) -> None:
        self._send(signal.SIGKILL, self._pids(api=True))

    def hit_both(self, index: int) -> None:
        self._send(signal.SIGKILL, self._pids(api=True, workers=True))

    def hit_end(self, index: int) -> None:
        self._send(signal.SIGTERM, self._pids(api=index == 0, workers=index != 0))

    def hit_stop(self, index: int) -> None:
        self._send(signal.SIGSTOP, self._pids(api=index == 0, workers=index != 0))

    def hit_relief(self, index: int) -> None:
        self._service.process.send_signal(signal.SIGUSR1)

    def hit_clients(self, index: int) -> None:
        self._clients.kill(index)

    def hit_serve(self, index: int) -> None:
        self._restart(self._service.kill)

    def hit_halt(self, index: int) -> None:
        self._restart(self._service.process.terminate)

    def _restart(self, end: Callable[[], object]) -> None:
        """`serve` is ended, and started again once its children have gone with it."""
        children = self._pids(api=True, workers=True)
        end()
        self._service.process.wait(60)
        until(lambda: not any(map(is_alive, children)), 10)
        self._service.restart()


def _is_child_of(pid: int, parent: int) -> bool:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == parent
    return False


def check(service: Service, journals: list[Journal]) -> None:
    """Nothing acknowledged is lost, nothing was done twice, and every result is the one that was seen first."""
    for number, journal in enumerate(journals):
        client = Client(number, service.url, service.key, journal.path.parent)
        for each, request_id in journal.acks.items():
            again = [client.fetch(request_id) for _ in range(2)]
            assert again == [journal.results[each]] * 2, f"client {number}: the result of {each} changed"
    acked = Counter(request_id for journal in journals for request_id in journal.acks.values())
    acked.update(journal.names["create"] for journal in journals)
    assert set(acked.values()) == {1}
    with _database(service) as database:
        states = dict(database.execute("SELECT op_id, state FROM ops"))
        failed = list(database.execute("SELECT op_id, kind, state, failure_message FROM ops WHERE state != 'done'"))
        places = "SELECT count(*) FROM ops GROUP BY coalesce(run_id, sampler_id), seq_id"
        assert {count for (count,) in database.execute(places)} == {1}
        assert list(database.execute("SELECT * FROM replays")) == []
    lost = acked.keys() - states.keys()
    assert not lost, f"acknowledged requests were lost: {lost}"
    assert not failed, f"acknowledged requests failed: {failed}"
    left = states.keys() - acked.keys()
    assert not left, "requests that nobody was told of"


def metered(service: Service) -> dict[str, int]:
    """Tokens and checkpoints in the ledger; cached prompt tokens are prompt tokens."""
    with _database(service) as database:
        sums: Counter[str] = Counter()
        for kind, quantity in database.execute("SELECT kind, quantity FROM usage"):
            sums["sampling_prefill" if "prefill" in kind or "cache" in kind else kind] += quantity
    return dict(sums)


def answers(journal: Journal) -> list[Any]:
    """What the client was told, without what depends on who shared its passes."""
    return [meaning(ask.kind, journal.results[ask.number]) for ask in asks(iter(range(journal.steps)))]


def meaning(kind: str, result: bytes) -> Any:
    if kind == "forward_backward":
        output = pb.ForwardBackwardOutput.FromString(result)
        return [output.loss_fn_outputs[0].fields["logprobs"].data, output.metrics["loss:sum"]]
    if kind == "sample":
        return [(s.tokens, s.logprobs, s.stop_reason) for s in pb.SampleResponse.FromString(result).sequences]
    if kind == "optim_step":
        return json.loads(result)
    return json.loads(result)["type"]


def final_state(service: Service, journal: Journal) -> dict[str, np.ndarray[Any, Any]]:
    """Weights and moments of the client's last save."""
    with _database(service) as database:
        query = "SELECT blob FROM checkpoints WHERE run_id = ? AND name = 'final'"
        (blob,) = database.execute(query, (journal.names["run"],)).fetchone()
    return dict(Blobs(service.data_dir / "blobs").load(BlobKey(blob), read_state).tensors)


def compare(
    service: Service, journals: list[Journal], quiet: Service, expected: list[Journal], *, is_exact: bool
) -> None:
    """What an undisturbed server gives: bit for bit, or the final weights within 1e-5."""
    for journal, undisturbed in zip(journals, expected, strict=True):
        for place, (found, right) in enumerate(zip(answers(journal), answers(undisturbed), strict=True)):
            is_same = found == right or not is_exact
            assert is_same, f"{journal.path.name}: request {place} is {found}, undisturbed {right}"
        state, right_state = final_state(service, journal), final_state(quiet, undisturbed)
        assert state.keys() == right_state.keys()
        compared = [name for name in right_state if is_exact or name.startswith("param/")]
        assert compared
        for name in compared:
            tensor = right_state[name]
            difference = float(np.abs(state[name] - tensor).max(initial=0.0))
            assert difference <= (0.0 if is_exact else 1e-5), f"{journal.path.name}: {name} is off by {difference}"
    assert metered(service) == metered(quiet) or not is_exact


@contextlib.contextmanager
def _database(service: Service) -> Iterator[sqlite3.Connection]:
    uri = f"file:{service.data_dir / DATABASE_FILE}?mode=ro"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
        yield connection


def draw(kills: int, rng: random.Random) -> list[str]:
    """Kinds of kills, as often as `KINDS` weighs them."""
    return rng.choices(list(KINDS), list(KINDS.values()), k=kills)


def run(
    root: Path, kinds: Sequence[str], rng: random.Random, *flags: str, say: Callable[[str], None] = lambda line: None
) -> dict[str, int]:
    """These kills, and all that must be true after them; how many there were of each kind."""
    with contextlib.ExitStack() as held:
        service = Service(root / "data", "--port", str(_free_port()), *FLAGS, *flags)
        held.callback(lambda: service.stop() if service.process.poll() is None else 0)
        clients = Clients(service, root / "clients")
        held.callback(clients.close)
        chaos = Chaos(service, clients, rng)
        until(lambda: all(len(journal.results) > 1 for journal in clients.journals()), 60)
        started = time.monotonic()
        for number, kind in enumerate(kinds, 1):
            chaos.strike(kind)
            if number % max(1, len(kinds) // 20) == 0:
                done = sum(len(journal.results) for journal in clients.journals())
                say(f"{number} kills, {done} results, {time.monotonic() - started:.0f} s: {dict(chaos.count)}")
        until(service.is_ready, READY_S, service.log.read_text)
        journals = clients.end()
        say(f"{sum(len(journal.acks) for journal in journals)} requests acknowledged; comparing")
        check(service, journals)
        quiet = Service(root / "quiet", *FLAGS, *flags)
        held.callback(quiet.stop)
        undisturbed = Clients(quiet, root / "undisturbed")
        held.callback(undisturbed.close)
        expected = undisturbed.end({str(number): journal.steps for number, journal in enumerate(journals)})
        compare(service, journals, quiet, expected, is_exact="--no-deterministic" not in flags)
    return dict(chaos.count)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=None, help="of an earlier run, to have its kills again")
    parser.add_argument("--device", default="fake")
    parser.add_argument("--workers", type=int, default=1, help="of the base")
    parser.add_argument("--default-mode", action="store_true", help="not deterministic: weights within 1e-5")
    parser.add_argument("--keep", type=Path, help="a new directory for data and logs, which stays")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    flags = ("--device", args.device, *(("--workers-per-base", str(args.workers)) if args.workers > 1 else ()))
    flags = (*flags, *(("--no-deterministic",) if args.default_mode else ()))
    with tempfile.TemporaryDirectory() as scratch:
        root = args.keep or Path(scratch)
        root.mkdir(exist_ok=True)
        rng = random.Random(seed)
        count = run(root, draw(args.kills, rng), rng, *flags, say=lambda line: print(line, flush=True))
    print(f"{args.kills} kills {count}: nothing lost, done twice or changed, and the weights are as they should be")


if __name__ == "__main__":
    main()
