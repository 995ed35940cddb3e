"""A clean stop while a pass computes: the pass is finished and recorded, and the next server serves its result."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tinker
from tinker import types

from tests.crash.test_kill import connect, free_port, new_run
from tests.service import running, until

NUM_DATA, NUM_TOKENS = 6, 500  # a pass of about a second


def data() -> list[types.Datum]:
    rng = np.random.default_rng(5)
    made = []
    for _ in range(NUM_DATA):
        tokens = rng.integers(3, 900, NUM_TOKENS).tolist()
        inputs = {"target_tokens": np.array(tokens[1:])}
        made.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    return made


def rows(data_dir: Path, run: tinker.TrainingClient) -> dict[str, tuple[str, Any, Any]]:
    """kind -> state, start and end of each request of the run, read beside the server."""
    with contextlib.closing(sqlite3.connect(f"file:{data_dir / 'tinsmith.db'}?mode=ro", uri=True)) as database:
        query = "SELECT kind, state, started_at, finished_at FROM ops WHERE run_id = ?"
        return {kind: tuple(rest) for kind, *rest in database.execute(query, (run.model_id,))}


def submit(run: tinker.TrainingClient) -> Callable[[], tuple[float, float]]:
    """A pass and a step; the loss and the norm of the gradient, once they are there."""
    passed = run.forward_backward(data(), "cross_entropy")
    stepped = run.optim_step(types.AdamParams(learning_rate=1e-3))
    return lambda: (passed.result().metrics["loss:sum"], (stepped.result().metrics or {})["grad_norm"])


def test_the_pass_under_way_is_finished_recorded_and_served(tmp_path: Path) -> None:
    """By either signal; the step behind the pass stays queued, and the next server carries it out."""
    data_dir = tmp_path / "data"
    with running(data_dir, "--port", str(free_port())) as service:
        found = []
        for number in (signal.SIGINT, signal.SIGTERM):
            run = new_run(connect(service))
            results = submit(run)
            until(lambda run=run: is_under_way(rows(data_dir, run)), 20.0)
            stopped_at = time.time()
            os.kill(service.process.pid, number)
            assert service.process.wait(40) == 0
            left = rows(data_dir, run)
            state, started_at, finished_at = left["forward_backward"]
            assert state == "done"
            assert started_at < stopped_at < finished_at, "the signal came while the pass computed"
            service.restart()
            found.append(results())
            assert rows(data_dir, run)["forward_backward"] == left["forward_backward"], "served, not computed again"
        assert "by force" not in service.log.read_text()
        assert found == [submit(new_run(connect(service)))()] * 2


def is_under_way(found: dict[str, tuple[str, Any, Any]]) -> bool:
    return "optim_step" in found and found["forward_backward"][0] == "running"
