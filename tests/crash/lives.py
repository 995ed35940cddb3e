"""Lives of a worker over the fake engine, each a process that may die at a crash point; and of the client beside it.

The client asks for the same in every life: what was acknowledged before answers as a duplicate. So a life that dies and
one that goes on after it must leave what a single calm one leaves. Processes are forked from a server that has all
modules loaded, which takes milliseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import multiprocessing
import os
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import structlog

from tests.flow.house import House, settle, train
from tinsmith import crashpoints
from tinsmith.errors import GoneError
from tinsmith.files.blobs import Blobs
from tinsmith.store import DATABASE_FILE, Store, open_as_it_is, open_store
from tinsmith.store.rows import OpRow
from tinsmith.types import CheckpointKind, OpId, OpKind, OpState, RunId, SamplerId, SessionId, TenantId
from tinsmith.upkeep.backup import back_up, restore
from tinsmith.upkeep.cooling import Cooling
from tinsmith.upkeep.janitor import sweep
from tinsmith.upkeep.verify import verify
from tinsmith.wire import wire_pb2 as pb
from tinsmith.worker.loop import Worker

FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["tests.crash.lives"])

ACKNOWLEDGED, SEEN, WHO, HARMED = "acknowledged", "seen", "who", "harmed"
SETTINGS: dict[str, Any] = {
    "inline_bytes": 16,
    "snapshot_debt_bytes": 300,
    "max_resident_runs": 2,
    "session_timeout_s": 1e6,
}
NUM_RUNS = 3


class Home(House):
    """The house of a client who comes back: the same tenant and session in every life."""

    def be(self, name: str) -> None:
        who = self.root / WHO
        if not who.exists():
            super().be(name)
            who.write_text(json.dumps([self.tenant, self.session]))
        self.tenant, self.session = json.loads(who.read_text())

    def acknowledged(self, row: OpRow) -> None:
        self.note(ACKNOWLEDGED, [row.tenant_id, row.id])

    def note(self, what: str, entry: Any) -> None:
        """What the client knows, in a file that isn't the server's."""
        _append(self.root / what, entry)


class NotedHome(Home):
    """Says what the client knows into the notes of what is durable (test_power_loss.py) too, in the same order."""

    synchronous = "FULL"

    def note(self, what: str, entry: Any) -> None:
        super().note(what, entry)
        with Path(os.environ["POWER_LOSS_NOTES"], "index").open("a") as index:
            fcntl.flock(index, fcntl.LOCK_EX)
            index.write(f"{what} {json.dumps(entry)}\n")


def runs_of(home: Home, num_runs: int) -> list[RunId]:
    return [RunId(f"{home.session}:train:{number}") for number in range(num_runs)]


class Client:
    """What is asked for, round by round; the numbers of requests are the same in every life."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.runs = runs_of(home, NUM_RUNS)
        self.sampler = SamplerId(f"{home.session}:sample:0")

    def rounds(self) -> list[Callable[[], object]]:
        return [self.create, self.step, self.save, self.harm, self.sample, self.load, self.step_again, self.clean]

    def create(self) -> None:
        for number, run in enumerate(self.runs):
            self.home._num_runs = number
            self.home.create_run(seed=number)
            self.home.forward_backward(run, 1, [number + 1, 2, 3], copies=2)

    def step(self) -> None:
        for run in self.runs:
            train(self.home, run, range(1, 3))  # requests 3 to 6
            self.home.forward_backward(run, 2, [9, 9])

    def save(self) -> None:
        self.home.save(self.runs[0], 7, "middle")
        self.home.forward_backward(self.runs[1], 7, [4, 4])
        self.home.save_sampler(self.runs[1], 8, self.sampler)
        self.home.optim_step(self.runs[1], 9)

    def harm(self) -> None:
        """Once, the newest snapshot of the first run is changed on the disk; no worker is there."""
        row = self.home.store.runs.get(self.home.tenant, self.runs[0])
        mark = self.home.root / HARMED
        if not mark.exists() and row.has_previous and row.snapshot_blob is not None:
            mark.touch()
            path = self.home.root / "blobs" / row.snapshot_blob
            path.write_bytes(path.read_bytes()[:-1])

    def sample(self) -> None:
        self.home.sample(self.sampler, 0)
        self.home.optim_step(self.runs[2], 7)
        self.home.forward_backward(self.runs[0], 8, [5, 6], copies=3)

    def load(self) -> None:
        saved = self.home.store.checkpoints.get(self.home.tenant, self.runs[0], CheckpointKind.TRAINING, "middle")
        self.home.load(self.runs[0], 9, saved.blob)
        self.home.optim_step(self.runs[2], 8)
        self.home.forward_backward(self.runs[2], 9, [3, 3])

    def step_again(self) -> None:
        for run in self.runs:
            train(self.home, run, range(5, 7))  # requests 11 to 14
            self.home.forward_backward(run, 10, [1, 1])
        self.home.forward_backward(self.runs[1], 15, [2, 3], forward_only=True)
        self.home.sample(self.sampler, 1, max_tokens=9)

    def clean(self) -> None:
        """The janitor's round after the session's end; no worker is there."""
        store, now = self.home.store, time.time()
        store.sessions.finish(self.home.tenant, SessionId(self.home.session), "success", None, now)
        Cooling().sweep(store, self.home.blobs, now + 120, now)
        sweep(store, self.home.blobs, self.home.settings, now + 120)


AGED = SETTINGS | {"run_ttl_s": 2 * 86400.0, "audit_ttl_s": 30 * 86400.0, "usage_hours_s": 31 * 86400.0}


def age(root: Path, crash_point: str) -> None:
    """The janitor's rounds forty days after the session's end; all is old then."""
    structlog.configure(processors=[_drop])
    crashpoints.arm_from(crash_point)
    with contextlib.closing(Home(root, **AGED)) as home:
        now = time.time()
        home.store.sessions.finish(home.tenant, SessionId(home.session), "success", None, now)
        for at in (now, now + 120, now + 240):
            sweep(home.store, home.blobs, home.settings, at + 40 * 86400.0)


def live(root: Path, crash_point: str, rounds: Iterable[int]) -> None:
    """Some rounds, with the worker's work after each; a clean stop and a new worker where a round wants none there."""
    structlog.configure(processors=[_drop])
    crashpoints.arm_from(crash_point)
    with contextlib.closing(Home(root, **SETTINGS)) as home:
        _live(home, rounds)


def live_noted(root: str, synchronous: str) -> None:
    """A whole life whose notes say what was durable when."""
    structlog.configure(processors=[_drop])
    NotedHome.synchronous = synchronous
    with contextlib.closing(NotedHome(Path(root), **SETTINGS)) as home:
        _live(home, range(8))


def _live(home: Home, rounds: Iterable[int]) -> None:
    client = Client(home)
    worker: Worker | None = None
    for number in rounds:
        if client.rounds()[number] in (client.harm, client.clean) and worker is not None:
            worker.close()
            worker = None
        client.rounds()[number]()
        worker = worker or home.worker()
        settle(worker)
        see(home)
    if worker is not None:
        worker.close()


def see(home: Home) -> None:
    """Fetch every result, as clients do."""
    for tenant, op_id in _lines(home.root / ACKNOWLEDGED):
        row = home.store.ops.get(tenant, op_id)
        if row.state is OpState.DONE:
            home.note(SEEN, [op_id, hashlib.sha256(home.result(row)).hexdigest()])


def has(store: Store, tenant: TenantId, op_id: OpId) -> bool:
    """Whether the request is there."""
    try:
        return store.ops.get(tenant, op_id).id == op_id
    except GoneError:
        return False


def account(root: Path, out: Path, num_runs: int = NUM_RUNS) -> None:
    """What all that came to, whatever its ids: states, results, what was metered. Writes it to `out` as JSON."""
    structlog.configure(processors=[_drop])
    with contextlib.closing(Home(root, **SETTINGS)) as home:
        results: dict[str, str] = {}
        seen: dict[str, set[str]] = {}
        for op_id, digest in _lines(root / SEEN):
            seen.setdefault(op_id, set()).add(digest)
        for tenant, op_id in _lines(root / ACKNOWLEDGED):
            row = home.store.ops.get(tenant, op_id)
            result = home.result(row)
            assert seen[op_id] == {hashlib.sha256(result).hexdigest()}, f"the result of {row.kind} was changed"
            masked = plain(row, result).replace(home.session.encode(), b"S").replace(op_id.encode(), b"R")
            results[f"{(row.run_id or row.sampler_id or '').partition(':')[2]}/{row.seq_id}"] = masked.hex()
        with contextlib.closing(sqlite3.connect(root / DATABASE_FILE)) as connection:
            metered = dict(connection.execute("SELECT kind, sum(quantity) FROM usage GROUP BY kind").fetchall())
        findings = [f"{finding.owner}: {finding.problem}" for finding in verify(home.store, home.blobs).findings]
        states = {}
        for run in runs_of(home, num_runs):
            home.forward_backward(run, home.store.runs.get(home.tenant, run).head_seq + 1, [1], forward_only=True)
            settle(home.worker())
            state = home.state(run)
            states[run[-1]] = [state.step, {name: tensor.tobytes().hex() for name, tensor in state.tensors.items()}]
    out.write_text(json.dumps({"results": results, "metered": metered, "states": states, "findings": findings}))


def plain(row: OpRow, result: bytes) -> bytes:
    """A result without what tells how its pass was packed, and its metrics in one order."""
    if row.kind not in (OpKind.FORWARD, OpKind.FORWARD_BACKWARD):
        return result
    output = pb.ForwardBackwardOutput.FromString(result)
    del output.metrics["pass_runs:max"], output.metrics["pass_tokens:max"]
    return bytes(output.SerializeToString(deterministic=True))


def migrate(root: Path, crash_point: str) -> None:
    crashpoints.arm_from(crash_point)
    open_store(root).close()


def keep(verb: str, source: Path, target: Path, crash_point: str) -> None:
    crashpoints.arm_from(crash_point)
    {"back_up": back_up, "restore": restore}[verb](source, target)


def repair(root: Path, crash_point: str) -> None:
    crashpoints.arm_from(crash_point)
    with contextlib.closing(open_as_it_is(root / DATABASE_FILE)) as store:
        verify(store, blobs_of(root), is_repairing=True)


def die_and_tell(task: Callable[..., object], *args: Any) -> None:
    """In the child: its error goes to the standard error stream, whoever catches that."""
    try:
        task(*args)
    except BaseException:
        traceback.print_exc(file=sys.stderr)
        os._exit(1)


def run(task: Callable[..., object], *args: Any) -> bool:
    """The task in a process of its own; whether it died at a crash point. It may not fail otherwise."""
    process = FORKING.Process(target=die_and_tell, args=(task, *args))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL), f"{task.__name__}{args} ended with {process.exitcode}"
    return process.exitcode != 0


def blobs_of(root: Path) -> Blobs:
    return Blobs(root / "blobs")


def _append(path: Path, entry: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def _lines(path: Path) -> Iterator[Any]:
    return iter([json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [])


def _drop(*_: Any) -> Any:
    raise structlog.DropEvent
