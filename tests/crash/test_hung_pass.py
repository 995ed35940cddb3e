"""A pass that never ends: its worker ends itself, the op that hangs is found and fails alone, others are answered."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from pathlib import Path

import pytest

from tests.flow.house import BASE, House
from tests.service import until
from tinsmith.bases.catalog import SHIPPED_PATH
from tinsmith.config import child_env
from tinsmith.serve.child import ChildSpec
from tinsmith.serve.supervisor import Supervisor
from tinsmith.types import OpState

HANGING = 66  # a token
WORKER = f"""
import sys, time
from tinsmith import fake_engine
advance = fake_engine.FakePass.advance
def hangs(self, max_work):
    if any({HANGING} in datum.tokens for item, _ in self._left for datum in item.data):
        time.sleep(3600)
    return advance(self, max_work)
fake_engine.FakePass.advance = hangs
from tinsmith.worker.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.timeout(300)
def test_the_op_that_hangs_fails_alone(tmp_path: Path) -> None:
    deaths: list[str] = []
    with contextlib.closing(House(tmp_path / "house", pass_timeout_s=2.0)) as house:
        runs = [house.create_run(seed=seed) for seed in range(4)]
        ops = [
            house.forward_backward(run, 1, [5, HANGING] if number == 1 else [5, 6]) for number, run in enumerate(runs)
        ]
        after = [house.optim_step(run, 2) for run in runs]
        argv = (sys.executable, "-c", WORKER, "--base", f"{BASE.name}={SHIPPED_PATH}", "--slot", "0")
        bells = ("--bell", str(tmp_path / "w.sock"), "--api-bell", str(tmp_path / "a.sock"))
        spec = ChildSpec("worker", (*argv, *bells), child_env(house.settings, {}), has_pulse=True)

        def died(name: str, is_excused: bool) -> None:
            deaths.append(name)
            house.store.workers.vacate("0", is_excused=is_excused)

        lines: list[str] = []
        supervisor = Supervisor(
            [spec], on_line=lambda _, line: lines.append(line), on_start=lambda: None, on_death=died, grace_s=10
        )
        thread = threading.Thread(target=supervisor.run)
        thread.start()
        try:
            until(lambda: all(house.get(op).state.is_final for op in [*ops, *after]), 240, lambda: "\n".join(lines))
        finally:
            supervisor.stop()
            thread.join(30)
        states = [house.get(op).state for op in ops]
        assert states == [OpState.DONE, OpState.FAILED, OpState.DONE, OpState.DONE]
        assert {house.get(op).state for op in after} == {OpState.DONE}, "its run goes on without it"
        failure = house.get(ops[1]).failure
        assert failure is not None
        assert "ended its worker process each time" in failure.message
        assert len(deaths) == 4
        said = [json.loads(line) for line in lines if "no progress" in line]
        assert len(said) == 4
        assert said[-1].items() >= {"op_id": ops[1].id, "run_id": runs[1], "tenant_id": house.tenant}.items()
