"""A clean stop while a pass computes: the pass is finished and recorded, and the next server serves its result."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.crash.test_kill import connect, free_port, new_run
from tests.service import running, until

NUM_DATA, NUM_TOKENS = 10, 500  # a pass of about a second


def data() -> list[types.Datum]:
    rng = np.random.default_rng(5)
    made = []
    for _ in range(NUM_DATA):
        tokens = rng.integers(3, 900, NUM_TOKENS).tolist()
        inputs = {"target_tokens": np.array(tokens[1:])}
        made.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    return made


def rows(data_dir: Path) -> dict[str, tuple[str, Any, Any]]:
    """kind -> state, start and end of each request of the one run, read beside the server."""
    with contextlib.closing(sqlite3.connect(f"file:{data_dir / 'tinsmith.db'}?mode=ro", uri=True)) as database:
        found = database.execute("SELECT kind, state, started_at, finished_at FROM ops").fetchall()
    return {kind: (state, started_at, finished_at) for kind, state, started_at, finished_at in found}


def loss(run: tinker.TrainingClient) -> tuple[float, float]:
    """Of a pass over `data`, and the norm of its gradient."""
    passed = run.forward_backward(data(), "cross_entropy")
    stepped = run.optim_step(types.AdamParams(learning_rate=1e-3))
    return passed.result().metrics["loss:sum"], (stepped.result().metrics or {})["grad_norm"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_pass_under_way_is_finished_recorded_and_served(tmp_path: Path, number: signal.Signals) -> None:
    data_dir = tmp_path / "data"
    with running(data_dir, "--port", str(free_port())) as service:
        run = new_run(connect(service))
        passed = run.forward_backward(data(), "cross_entropy")
        stepped = run.optim_step(types.AdamParams(learning_rate=1e-3))
        until(lambda: "optim_step" in rows(data_dir) and rows(data_dir)["forward_backward"][0] == "running", 20.0)
        stopped_at = time.time()
        os.kill(service.process.pid, number)
        assert service.process.wait(40) == 0
        left = rows(data_dir)
        state, started_at, finished_at = left["forward_backward"]
        assert state == "done"
        assert started_at < stopped_at < finished_at, "the signal came while the pass computed"
        assert "by force" not in service.log.read_text()
        service.restart()
        found = (passed.result().metrics["loss:sum"], (stepped.result().metrics or {})["grad_norm"])
        assert rows(data_dir)["forward_backward"] == left["forward_backward"], "served from its row, not computed again"
        assert found == loss(new_run(connect(service)))
