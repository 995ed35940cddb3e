"""`python -m tests.fuzz --count 1000000`: so many inputs over all targets, going on where the last call stopped.

The state lies in `--state`; with the same seeds, input NUMBER of a target is always the same: `--again TARGET:NUMBER`
runs it alone. Ends with 1 if anything was found; each finding is printed when it is met and kept beside the state.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import structlog

from tests.fuzz import targets as room
from tests.fuzz.app import Api
from tests.fuzz.mutate import draw

APP_SHARES = {"api": 4, "http": 3}
BATCH = 500
HANG_CPU_S = 10.0  # of one input
STUCK_S = 300.0  # of a batch, if even signals don't get through
MAX_GROWTH_KIB = 1 << 20
SAY_EVERY_S = 10.0


class HangError(BaseException):
    """One input takes too long."""


@dataclass
class State:
    """next: by target, the number of its next input."""

    next: dict[str, int] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> State:
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else cls()

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        part.replace(path)

    @property
    def num_done(self) -> int:
        return sum(self.next.values())


def shares() -> dict[str, int]:
    return {**{name: target.share for name, target in room.targets().items()}, **APP_SHARES}


def runner(api: Api) -> Callable[[str, int], None]:
    def run(name: str, number: int) -> None:
        """Raises: whatever is wrong with this input."""
        if name in APP_SHARES:
            said = api.send(name, number)
            assert not said, said
        else:
            target = room.targets()[name]
            target.run(draw(name, number, target.seeds, target.words))

    return run


def hunt(count: int, state: State, state_file: Path | None, say: Callable[[str], None]) -> None:
    """Run inputs until the state has `count` of them behind it."""
    api = Api()
    run, plan = runner(api), shares()
    total = sum(plan.values())
    began, begun_at, said_at = state.num_done, time.monotonic(), time.monotonic()
    base_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGVTALRM, _on_hang)
    try:
        while state.num_done < count:
            name = min(plan, key=lambda name: state.next.get(name, 0) / plan[name])
            size = min(BATCH, max(1, count * plan[name] // total // 4), count - state.num_done)
            faulthandler.dump_traceback_later(STUCK_S, exit=True)
            for number in range(start := state.next.get(name, 0), start + size):
                _one(run, name, number, state, state_file, say)
            state.next[name] = start + size
            if state_file is not None:
                state.save(state_file)
            grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base_kib
            if grown_kib > MAX_GROWTH_KIB:
                raise MemoryError(f"{grown_kib >> 10} MiB more memory by {name}:{start}..{start + size}")
            if time.monotonic() - said_at > SAY_EVERY_S:
                said_at = time.monotonic()
                rate = (state.num_done - began) / (said_at - begun_at)
                say(f"{state.num_done} of {count} inputs, {rate:.0f} a second, {len(state.found)} findings, now {name}")
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        api.close()
    elapsed_s = time.monotonic() - begun_at
    num_now = state.num_done - began
    say(
        f"{state.num_done} inputs, {len(state.found)} findings; {num_now} of them now in {elapsed_s:.1f} s, "
        f"{num_now / max(elapsed_s, 1e-9):.0f} inputs a second"
    )


def _one(
    run: Callable[[str, int], None],
    name: str,
    number: int,
    state: State,
    state_file: Path | None,
    say: Callable[[str], None],
) -> None:
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_CPU_S)
    try:
        run(name, number)
    except (Exception, HangError):
        report = f"{name}:{number}\n{traceback.format_exc(limit=-8)[-4000:]}"
        state.found.append(f"{name}:{number}")
        say(f"FOUND {report}")
        if state_file is not None:
            state_file.parent.mkdir(parents=True, exist_ok=True)
            (state_file.parent / f"{name}-{number}.txt").write_text(report, encoding="utf-8", errors="replace")


def _on_hang(number: int, frame: Any) -> None:
    raise HangError(f"more than {HANG_CPU_S} s of CPU time")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="inputs, those of earlier calls among them")
    parser.add_argument("--state", type=Path, default=Path(".fuzz/state.json"), help="where the last call stopped")
    parser.add_argument("--again", metavar="TARGET:NUMBER", help="run this one input alone")
    parser.add_argument("--fresh", action="store_true", help="begin at 0 again")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    room.settle()
    if args.again:
        name, _, number = args.again.partition(":")
        api = Api()
        try:
            runner(api)(name, int(number))
        finally:
            api.close()
        return 0
    state = State() if args.fresh else State.load(args.state)
    hunt(args.count, state, args.state, lambda line: print(line, flush=True))
    return 1 if state.found else 0


if __name__ == "__main__":
    sys.exit(main())
