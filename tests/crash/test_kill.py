"""Processes are killed between and during requests; the SDK client sees a longer poll and the right answer."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.service import Service, is_alive, running, until

TEXT = [5, 17, 42, 99, 7, 13, 28, 64]
STEPS = 6


def datum(step: int) -> types.Datum:
    tokens = [*TEXT, 10 + step]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": np.array(tokens[1:])}
    )


def connect(service: Service) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=service.url, api_key=service.key)


def train(run: tinker.TrainingClient, between: Any = None) -> list[float]:
    """Six steps; `between(step)` is called before each. The loss of every step, and of a last forward."""
    losses = []
    for step in range(STEPS):
        if between is not None:
            between(step)
        result = run.forward_backward([datum(step)], "cross_entropy")
        run.optim_step(types.AdamParams(learning_rate=5e-3)).result()
        losses.append(result.result().metrics["loss:sum"])
    losses.append(run.forward([datum(0)], "cross_entropy").result().metrics["loss:sum"])
    return losses


def new_run(client: tinker.ServiceClient) -> tinker.TrainingClient:
    return client.create_lora_training_client("tinsmith/tiny", rank=8, seed=1).result()


def test_killing_worker_and_api_between_ops_changes_nothing(plain_server: Service) -> None:
    expected = train(new_run(connect(plain_server)))

    def kill(step: int) -> None:
        if step in (2, 4):
            plain_server.kill_worker()
        if step in (3, 4):
            plain_server.kill_api()

    assert train(new_run(connect(plain_server)), kill) == expected


def test_queued_requests_survive_the_death_of_everything(tmp_path: Path) -> None:
    """serve itself is killed with requests in the queue; the next serve on the directory answers them."""
    data_dir = tmp_path / "data"
    with running(data_dir, "--device", "fake", "--port", str(free_port())) as service:
        client = connect(service)
        expected = train(new_run(client))
        run = new_run(client)
        futures = []
        for step in range(STEPS):
            futures.append(run.forward_backward([datum(step)], "cross_entropy"))
            run.optim_step(types.AdamParams(learning_rate=5e-3))
        last = run.forward([datum(0)], "cross_entropy")
        futures[0].result()
        children = [service.info()["api_pid"], *service.info()["worker_pids"].values()]
        service.kill()
        until(lambda: not any(map(is_alive, children)), 5.0)
        service.restart()
        assert [f.result().metrics["loss:sum"] for f in [*futures, last]] == expected


@pytest.mark.alone
def test_dead_children_are_back_within_five_seconds_on_the_same_port(tmp_path: Path) -> None:
    with running(tmp_path / "data") as service:
        url = service.url
        for kill in (service.kill_api, service.kill_worker):
            dead = kill()
            until(lambda pid=dead: not is_alive(pid), 2.0)
            until(lambda pid=dead: pid not in pids(service) and all(map(is_alive, pids(service))), 5.0)
            until(service.is_ready, 20.0)
            assert service.info()["url"] == url
            assert is_alive(service.process.pid)


def test_a_clean_stop_takes_its_files_along(tmp_path: Path) -> None:
    with running(tmp_path / "data", "--device", "fake") as service:
        children = pids(service)
        run = new_run(connect(service))
        future = run.forward_backward([datum(0)], "cross_entropy")
        future.result()
        os.kill(service.process.pid, signal.SIGINT)
        assert service.process.wait(30) == 0
        assert not (service.data_dir / "server.json").exists()
        until(lambda: not any(map(is_alive, children)), 5.0)


@pytest.mark.alone
def test_healthz_knows_at_once_that_a_worker_is_gone(tmp_path: Path) -> None:
    with running(tmp_path / "data", "--device", "fake") as service:
        service.kill_worker()
        until(lambda: not service.is_ready(), 1.5)
        until(service.is_ready, 15.0)


def pids(service: Service) -> list[int]:
    info = service.info()
    return [info["api_pid"], *info["worker_pids"].values()]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
