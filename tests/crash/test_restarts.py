"""Restarts that clients don't notice: of the API process without a gap, of processes that hang, of all of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tinker import types

from tests.crash.raw_client import PROTOBUF, Ask, Line, training
from tests.crash.test_kill import connect, datum, free_port
from tests.service import Service, is_alive, running, until
from tests.unit.test_metrics import samples

FAKE = ("--device", "fake")
PATIENCE_S = 120.0  # on a machine that others use as well
PAUSE_S = 0.01  # between requests: the process that starts beside them needs the processor

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    data_dir = tmp_path_factory.mktemp("restarts") / "data"
    with running(data_dir, *FAKE, "--port", str(free_port()), "--hang-timeout-s", "6") as service:
        yield service


class Strict:
    """A client that asks once: whatever is lost is an error.

    After a pause it takes a new connection, since one that was idle for five seconds may be closed.
    """

    def __init__(self, service: Service) -> None:
        self._line = Line(service.url, service.key)
        self._used_at = 0.0
        self.statuses: Counter[int] = Counter()
        session = self.ask("create_session", tags=[], sdk_version="0.38.0")["session_id"]
        run = self.ask("create_model", session_id=session, model_seq_id=0, base_model="tinsmith/tiny")
        self.run = run["model_id"]
        assert self.fetch(run["request_id"])["type"] == "create_model"

    def ask(self, path: str, **body: Any) -> Any:
        return json.loads(self._once(path, json.dumps(body).encode())[1])

    def step(self, seq: int) -> None:
        """A pass, whose numbers are `seq`'s, and its result."""
        ask = Ask(seq, "forward_backward", seq, seq)
        self.fetch(json.loads(self._once("forward_backward", training(self.run, ask, 0), PROTOBUF)[1])["request_id"])

    def fetch(self, request_id: str) -> Any:
        while True:
            status, answer = self._once("retrieve_future", json.dumps({"request_id": request_id}).encode())
            if status == 200:
                return json.loads(answer) if answer.startswith(b"{") else answer
            assert status == 408, answer

    def _once(self, path: str, body: bytes, media: str = "application/json") -> tuple[int, bytes]:
        if time.monotonic() - self._used_at > 1.0:
            self._line.close()
        status, answer = self._line.try_once(path, body, media)
        self._used_at = time.monotonic()
        self.statuses[status] += 1
        assert status in (200, 408), answer
        return status, answer


def relieve(service: Service) -> None:
    """A new API process takes over, and the old one ends."""
    before = service.info()["api_pid"]
    service.process.send_signal(signal.SIGUSR1)
    until(lambda: service.info()["api_pid"] != before, PATIENCE_S)
    until(lambda: not is_alive(before), PATIENCE_S)


def test_a_new_api_process_takes_over_and_no_request_is_lost(service: Service) -> None:
    """Clients that never ask twice keep on asking over their connections, and one waits for a result all the while."""
    clients = [Strict(service) for _ in range(4)]
    waiting = Strict(service)
    early = waiting.ask("optim_step", model_id=waiting.run, seq_id=2, adam_params={"learning_rate": 0.1})["request_id"]
    over = threading.Event()

    def work(client: Strict) -> int:
        seq = 0
        while not over.is_set():
            seq += 1
            client.step(seq)
            time.sleep(PAUSE_S)
        return seq

    with ThreadPoolExecutor() as pool:
        poll = pool.submit(waiting.fetch, early)
        counts = [pool.submit(work, client) for client in clients]
        try:
            for _ in range(2):
                relieve(service)
                assert not poll.done()
        finally:
            over.set()
            first = Strict(service)
            first.run = waiting.run
            first.step(1)
        assert poll.result(PATIENCE_S)["type"] == "optim_step"
        assert all(count.result(PATIENCE_S) > 10 for count in counts)
    assert waiting.statuses[408] >= 2, "its poll was handed back by each process that ended"
    assert "died" not in service.log.read_text()


def health(service: Service, query: str = "") -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"{service.url}/api/v1/healthz{query}", timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_stopped_supervisor_is_noticed_while_all_goes_on(service: Service) -> None:
    client = Strict(service)
    assert health(service, "?supervised=true") == (200, {"status": "ok"})
    service.process.send_signal(signal.SIGSTOP)
    try:
        until(lambda: "warnings" in health(service)[1], PATIENCE_S)
        assert health(service)[0] == 200
        assert "no sign of life" in health(service)[1]["warnings"][0]
        assert health(service, "?supervised=true")[0] == 503
        client.step(1)
        asked = urllib.request.Request(f"{service.url}/metrics", headers={"X-API-Key": service.key})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            assert samples(answer.read())[("tinsmith_supervisor_silent_seconds", ())] > 6.0
    finally:
        service.process.send_signal(signal.SIGCONT)
    until(lambda: health(service, "?supervised=true") == (200, {"status": "ok"}), PATIENCE_S)
    assert "died" not in service.log.read_text()


@pytest.mark.parametrize("which", ["api", "worker"])
def test_a_stopped_process_is_replaced(service: Service, which: str) -> None:
    client = Strict(service)
    client.step(1)
    info = service.info()
    pid = info["api_pid"] if which == "api" else info["worker_pids"]["tinsmith/tiny"]
    os.kill(pid, signal.SIGSTOP)
    until(lambda: not is_alive(pid), PATIENCE_S)
    until(service.is_ready, PATIENCE_S)
    if which == "api":
        with contextlib.suppress(ConnectionError):
            old = client._line._connection
            assert old is None or old.sock is None or old.sock.recv(1) == b"", "the old process is there still"
        client._line.close()
    client.step(2)
    assert f"{'api' if which == 'api' else 'worker tinsmith/tiny'} hangs" in service.log.read_text()


def finish(service: Service, number: int, on_step: Callable[[], None] = lambda: None) -> list[Any]:
    """What a user writes: no retries, no error handling. The same numbers for every `number`."""
    run = connect(service).create_lora_training_client("tinsmith/tiny", rank=4, seed=1).result()
    seen: list[Any] = []
    params = types.SamplingParams(max_tokens=16, seed=5)
    for step in range(8):
        on_step()
        passed = run.forward_backward([datum(step)], "cross_entropy")
        stepped = run.optim_step(types.AdamParams(learning_rate=0.01))
        seen += [passed.result().loss_fn_outputs[0]["logprobs"].tolist(), stepped.result().metrics]
        if step % 3 == 2:
            sampler = run.save_weights_and_get_sampling_client()
            sampler = sampler if not hasattr(sampler, "result") else sampler.result()
            prompt = types.ModelInput.from_ints([1, 2, 3])
            seen.append([s.tokens for s in sampler.sample(prompt, 2, params).result().sequences])
    return seen


def test_sdk_clients_without_retries_ride_through_restarts_of_everything(service: Service) -> None:
    expected = finish(service, 0)
    steps = threading.Semaphore(0)
    strikes: list[Callable[[], object]] = [
        service.kill_api, service.kill_worker, lambda: restart(service),
        lambda: os.kill(worker(service), signal.SIGTERM),
    ]  # fmt: skip
    with ThreadPoolExecutor() as pool:
        found = [pool.submit(finish, service, number, steps.release) for number in range(4)]
        for strike in strikes:
            for _ in range(4):
                assert steps.acquire(timeout=PATIENCE_S)
            strike()
            until(service.is_ready, PATIENCE_S)
        assert [each.result(2 * PATIENCE_S) for each in found] == [expected] * 4


def worker(service: Service) -> int:
    pid: int = service.info()["worker_pids"]["tinsmith/tiny"]
    return pid


def restart(service: Service) -> None:
    service.kill()
    service.restart()


def test_a_worker_that_comes_back_after_its_lease_says_nothing(tmp_path: Path) -> None:
    """Two workers of one base: one is stopped in the middle of its work, the other takes over, and then it goes on."""
    flags = ("--workers-per-base", "2", "--lease-s", "1.5", "--hang-timeout-s", "60")
    with running(tmp_path / "data", *FAKE, *flags) as service:
        clients = [Strict(service) for _ in range(4)]
        for client in clients:
            client.step(1)
        pids = service.info()["worker_pids"]
        assert set(pids) == {"tinsmith/tiny", "tinsmith/tiny 2"}
        stopped = pids["tinsmith/tiny"]
        os.kill(stopped, signal.SIGSTOP)
        for client in clients:
            client.step(2)  # whoever held its run
        os.kill(stopped, signal.SIGCONT)
        for client in clients:
            client.step(3)
        until(lambda: not is_alive(stopped), PATIENCE_S)
        until(lambda: service.info()["worker_pids"]["tinsmith/tiny"] != stopped, PATIENCE_S)
        assert "lease lost" in service.log.read_text()
        for client in clients:
            client.step(4)
