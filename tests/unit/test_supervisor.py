"""Supervision with small scripts as children: restart, back-off, clean stop, and a parent that is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service import is_alive, until
from tinsmith.config import Settings, child_env
from tinsmith.errors import ConfigError
from tinsmith.ipc.heartbeat import Ear, Heart
from tinsmith.serve.child import Child, ChildSpec
from tinsmith.serve.supervisor import Backoff, Patience, Supervisor, describe_exit

SLEEP = "import time; print('up', flush=True); time.sleep(60)"
PARENT = """
import os, subprocess, sys
read, write = os.pipe()
code = "import sys, time; from tinsmith.ipc import lifeline; lifeline.watch(int(sys.argv[1]));"
code += "print('up', flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code, str(read)], pass_fds=(read,), stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


class Watched:
    """A supervisor of scripts, running in a thread."""

    def __init__(self, *codes: str | ChildSpec, **options: Any) -> None:
        self.lines: list[str] = []
        self.pids: list[list[int]] = []
        env = child_env(Settings(), {})
        specs = [
            ChildSpec(f"child{i}", (sys.executable, "-c", code), env) if isinstance(code, str) else code
            for i, code in enumerate(codes)
        ]
        self.supervisor = Supervisor(
            specs, on_line=lambda name, line: self.lines.append(line), on_start=self._started, **options
        )
        self.error: ConfigError | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _started(self) -> None:
        self.pids.append([child.pid for child in self.supervisor.children])

    def _run(self) -> None:
        try:
            self.supervisor.run()
        except ConfigError as error:
            self.error = error

    def stop(self) -> None:
        self.supervisor.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def watch() -> Iterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def start(*codes: str, **options: Any) -> Watched:
        made.append(Watched(*codes, **options))
        return made[-1]

    yield start
    for watched in made:
        if watched.thread.is_alive():
            watched.supervisor.stop()
            watched.thread.join(20)


def test_a_dead_child_is_restarted_at_once(watch: Callable[..., Watched]) -> None:
    watched = watch(SLEEP, SLEEP)
    until(lambda: watched.lines.count("up") == 2, 20)
    first, second = watched.pids[-1]
    started = time.monotonic()
    os.kill(first, signal.SIGKILL)
    until(lambda: len(watched.pids) == 2, 5)
    assert time.monotonic() - started < 1.0
    assert watched.pids[-1][0] != first
    assert watched.pids[-1][1] == second
    watched.stop()
    assert not any(is_alive(pid) for pids in watched.pids for pid in pids)


def test_a_crash_loop_backs_off(watch: Callable[..., Watched]) -> None:
    watched = watch("raise SystemExit(7)", backoff=Backoff(steady_s=60.0, max_s=60.0))
    until(lambda: len(watched.pids) == 3, 20)
    (child,) = watched.supervisor.children
    until(lambda: child.restart_at is not None, 10)
    assert child.num_deaths == 3
    started = time.monotonic()
    watched.stop()
    assert time.monotonic() - started < 1.5
    assert len(watched.pids) == 3


def test_back_off_grows_to_its_bound_and_is_forgiven() -> None:
    backoff = Backoff(steady_s=5.0, max_s=30.0)
    deaths, waits = 0, []
    for _ in range(8):
        deaths, wait_s = backoff.after(deaths, 0.1)
        waits.append(wait_s)
    assert waits == [0, 1, 2, 4, 8, 16, 30, 30]
    assert backoff.after(deaths, 5.0) == (1, 0.0)


def test_stopping_waits_for_the_work_under_way(watch: Callable[..., Watched], tmp_path: Path) -> None:
    done = tmp_path / "done"
    code = f"""
import pathlib, signal, time
def end(*_):
    time.sleep(0.5)
    pathlib.Path({str(done)!r}).write_text("finished")
    raise SystemExit(0)
signal.signal(signal.SIGTERM, end)
print("up", flush=True)
time.sleep(60)
"""
    watched = watch(code)
    until(lambda: "up" in watched.lines, 20)
    watched.stop()
    assert done.read_text() == "finished"


def test_a_child_that_will_not_stop_is_ended_by_force(watch: Callable[..., Watched]) -> None:
    watched = watch(f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}", grace_s=0.5)
    until(lambda: "up" in watched.lines, 20)
    watched.stop()
    assert not is_alive(watched.pids[-1][0])


def test_unusable_settings_end_the_start(watch: Callable[..., Watched]) -> None:
    watched = watch(SLEEP, "print('no weights in this directory'); raise SystemExit(2)")
    watched.thread.join(20)
    assert watched.error is not None
    assert watched.error.message == "child1 can't start: no weights in this directory"
    assert not any(is_alive(pid) for pid in watched.pids[-1])


def test_a_json_log_line_is_told_in_its_own_words(watch: Callable[..., Watched]) -> None:
    line = '{"event": "the worker can not start", "error": "no weights"}'
    watched = watch(SLEEP, f"print({line!r}); raise SystemExit(2)")
    watched.thread.join(20)
    assert watched.error is not None
    assert watched.error.message == "child1 can't start: no weights"


def test_a_chatty_child_is_never_blocked(watch: Callable[..., Watched]) -> None:
    watched = watch(
        "for i in range(20000): print('x' * 100)\nprint('through', flush=True)\nimport time; time.sleep(60)"
    )
    until(lambda: "through" in watched.lines, 20)


def test_children_end_when_their_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout as out:
        child = int(out.readline())
    assert is_alive(child)
    parent.kill()
    parent.wait()
    until(lambda: not is_alive(child), 5)


def test_exits_are_named() -> None:
    assert describe_exit(-9) == "killed by SIGKILL"
    assert describe_exit(1) == "exit status 1"


BEATING = """
import os, signal, sys, time
fd = int(sys.argv[sys.argv.index("--pulse-fd") + 1])
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
print("up", flush=True)
while True:
    os.write(fd, b"!")
    time.sleep(0.05)
"""


def pulsing(code: str, **options: Any) -> ChildSpec:
    env = child_env(Settings(), {})
    return ChildSpec("child", (sys.executable, "-c", code), env, has_pulse=True, **options)


def serves(child: Child) -> bool:
    return child.process is not None and child.process.is_serving and child.process.is_running


def test_a_stopped_child_is_found_by_its_silence_and_replaced(watch: Callable[..., Watched]) -> None:
    watched = watch(pulsing(BEATING), patience=Patience(1.0, 30.0))
    until(lambda: serves(watched.supervisor.children[0]), 20)
    (first,) = watched.pids[-1]
    os.kill(first, signal.SIGSTOP)
    until(lambda: len(watched.pids) == 2, 20)
    assert not is_alive(first)
    watched.stop()


def test_children_hear_that_the_supervisor_lives_and_how_long_it_has_been_silent(
    watch: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(Heart()) as heart:
        ear = Ear(heart.inherited_fd, 60.0)
        watched = watch(SLEEP, on_turn=heart.beat)
        begun = time.monotonic()
        until(lambda: time.monotonic() - begun > 1.5 and (ear.silent_s or 0.0) < 1.5, 20)
        assert ear.trouble is None
        watched.stop()
        later = time.monotonic() + 61.5
        monkeypatch.setattr(time, "monotonic", lambda: later)
        assert "tinsmith serve" in (ear.trouble or "")
    assert (Ear(None, 1.0).silent_s, Ear(None, 1.0).trouble) == (None, None)


def test_a_child_that_only_starts_has_more_time(watch: Callable[..., Watched]) -> None:
    watched = watch(pulsing(SLEEP), patience=Patience(0.5, 3600.0))
    until(lambda: "up" in watched.lines, 20)
    time.sleep(2.5)
    assert len(watched.pids) == 1
    watched.supervisor.children[0].process.heard_at -= 3600.0
    until(lambda: len(watched.pids) == 2, 20)
    watched.stop()


def test_a_child_that_stops_while_it_loads_is_found(watch: Callable[..., Watched]) -> None:
    watched = watch(pulsing(BEATING.replace('b"!"', 'b"."')), patience=Patience(0.5, 3600.0, loading_s=1.0))
    (child,) = watched.supervisor.children
    until(lambda: child.process is not None and child.process.was_heard, 20)
    first = child.process.pid
    os.kill(first, signal.SIGSTOP)
    until(lambda: len(watched.pids) == 2, 20)
    assert not is_alive(first)
    watched.stop()


def test_a_child_that_is_stopped_before_its_first_sign_is_found(watch: Callable[..., Watched]) -> None:
    watched = watch(pulsing(SLEEP), patience=Patience(0.5, 3600.0, loading_s=3600.0))
    until(lambda: "up" in watched.lines, 20)
    (first,) = watched.pids[-1]
    os.kill(first, signal.SIGSTOP)
    until(lambda: len(watched.pids) == 2, 20)
    assert not is_alive(first)
    watched.stop()


def test_a_child_that_stopped_while_it_starts_does_not_hold_up_the_end(watch: Callable[..., Watched]) -> None:
    watched = watch(pulsing(SLEEP), patience=Patience(0.5, 3600.0), grace_s=3600.0)
    until(lambda: "up" in watched.lines, 20)
    (first,) = watched.pids[-1]
    os.kill(first, signal.SIGSTOP)
    watched.stop()
    assert not is_alive(first)


def test_the_second_that_memory_ran_out_for_is_not_taken_for_killed_by_hand(
    watch: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are counted by the time that the first death is told."""
    counts = iter([7, 9])
    monkeypatch.setattr("tinsmith.serve.supervisor.num_oom_kills", lambda: next(counts, 9))
    monkeypatch.setattr("tinsmith.serve.supervisor.OOM_S", 5.0)
    deaths: list[bool] = []
    watched = watch(
        pulsing(SLEEP), patience=Patience(5.0, 3600.0), on_death=lambda name, is_excused: deaths.append(is_excused)
    )
    until(lambda: "up" in watched.lines, 20)
    for num in (1, 2):
        os.kill(watched.pids[-1][0], signal.SIGKILL)
        until(lambda num=num: min(watched.lines.count("up"), len(watched.pids)) > num, 20)
    monkeypatch.setattr("tinsmith.serve.supervisor.OOM_S", 0.0)
    os.kill(watched.pids[-1][0], signal.SIGKILL)
    until(lambda: len(deaths) == 3, 20)
    watched.stop()
    assert deaths == [False, False, True]


@pytest.mark.parametrize(
    ("code", "number", "oom_kills", "excused"),
    [
        (SLEEP, signal.SIGKILL, [7], True),
        (SLEEP, signal.SIGKILL, [7, 8], False),
        (SLEEP, signal.SIGKILL, [None], False),
        (SLEEP, signal.SIGSEGV, [7], False),
        (SLEEP, signal.SIGSTOP, [7], False),
    ],
    ids=["killed from outside", "out of memory", "unknown", "a fault of its own", "killed since it was silent"],
)
def test_a_death_by_somebodys_hand_is_told_from_others(
    watch: Callable[..., Watched],
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    number: signal.Signals,
    oom_kills: list[int | None],
    excused: bool,
) -> None:
    counts = iter(oom_kills)
    last = [oom_kills[0]]

    def num_oom_kills() -> int | None:
        last[0] = next(counts, last[0])
        return last[0]

    monkeypatch.setattr("tinsmith.serve.supervisor.num_oom_kills", num_oom_kills)
    deaths: list[bool] = []
    watched = watch(
        pulsing(code), patience=Patience(0.5, 3600.0), on_death=lambda name, is_excused: deaths.append(is_excused)
    )
    until(lambda: "up" in watched.lines, 20)
    os.kill(watched.pids[-1][0], number)
    until(lambda: bool(deaths), 20)
    watched.stop()
    assert deaths[0] is excused


def test_a_successor_serves_before_the_first_one_is_told_to_finish(watch: Callable[..., Watched]) -> None:
    watched = watch(pulsing(BEATING, can_overlap=True), SLEEP)
    child, other = watched.supervisor.children
    until(lambda: serves(child), 20)
    before = child.process
    both_ran = False

    def is_relieved() -> bool:
        nonlocal both_ran
        both_ran = both_ran or (child.successor is not None and before.is_running)
        return child.process is not before

    watched.supervisor.relieve()
    deadline = time.monotonic() + 20
    while not is_relieved():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert both_ran
    assert child.process.is_serving
    until(lambda: not before.is_running and not child.leaving, 20)
    assert before.status == 0
    assert child.num_deaths == 0
    assert watched.pids[-1] == [child.pid, other.pid]
    assert watched.pids[-1][1] == watched.pids[0][1], "what can't overlap stays"
    watched.stop()


def test_a_successor_that_dies_leaves_the_first_one_in_its_place(watch: Callable[..., Watched], tmp_path: Path) -> None:
    mark = tmp_path / "second"
    code = f"""
import pathlib, time
mark = pathlib.Path({str(mark)!r})
if mark.exists():
    time.sleep(0.5)
    raise SystemExit(1)
mark.touch()
"""
    watched = watch(pulsing(code + BEATING, can_overlap=True))
    (child,) = watched.supervisor.children
    until(lambda: serves(child), 20)
    first = child.process
    watched.supervisor.relieve()
    until(lambda: child.successor is not None, 20)
    until(lambda: child.successor is None, 20)
    assert child.process is first
    assert first.is_running
    watched.stop()


def test_one_that_served_is_not_taken_for_one_that_cannot_start(watch: Callable[..., Watched]) -> None:
    watched = watch(pulsing(BEATING))
    (child,) = watched.supervisor.children
    for count in range(1, 5):
        until(lambda: serves(child), 20)
        os.kill(child.pid, signal.SIGKILL)
        until(lambda count=count: len(watched.pids) == count + 1, 20)
    assert child.num_deaths == 2, "the pauses stay at a second"
    watched.stop()
