"""Whole servers, with the engine that computes nothing: what a user of `tinsmith serve` sees."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from tests.service import Service, is_alive, running, until
from tinsmith.bases.catalog import SHIPPED_PATH
from tinsmith.cli import main as cli
from tinsmith.files.datadir import DataDir
from tinsmith.store import open_store

FAKE = ("--device", "fake")


def tinsmith(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """A command as a process of its own."""
    command = [sys.executable, "-m", "tinsmith", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def keys(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """`tinsmith keys` in this process, which has everything loaded."""
    command = ["tinsmith", "keys", *map(str, args)]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", command)
        try:
            status = cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Of two bases; it is neither stopped nor killed by a test."""
    bases = ("--base-model", "tinsmith/tiny", "--base-model", f"org/big={SHIPPED_PATH}")
    with running(tmp_path_factory.mktemp("serve") / "data", *FAKE, *bases) as service:
        yield service


def children(service: Service) -> list[int]:
    info = service.info()
    return [info["api_pid"], *info["worker_pids"].values()]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_a_server_says_how_to_reach_it(service: Service) -> None:
    data_dir, info = service.data_dir, service.info()
    assert set(info) == {
        "version", "url", "port", "pid", "api_pid", "worker_pids", "certificate", "restarts", "oom_kills",
        "places",
    }  # fmt: skip
    assert info["pid"] == service.process.pid
    assert set(info["worker_pids"]) == {"tinsmith/tiny", "org/big"}
    assert all(map(is_alive, children(service)))
    if sys.platform == "linux":  # where memory runs out, the kernel takes a worker first
        scores = [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (info["pid"], *children(service))]
        assert scores[2] > scores[1] == scores[0]
    log = service.log.read_text()
    assert f"export TINKER_BASE_URL={service.url}" in log
    assert log.count(f"export TINKER_API_KEY={service.key}") == 1
    assert f"{service.url}/schema" in log
    assert (data_dir / "admin.key").stat().st_mode & 0o777 == 0o600
    assert data_dir.stat().st_mode & 0o777 == 0o700
    holder = DataDir(data_dir).holder()
    assert holder is not None
    sockets = Path(holder.socket_dir)
    assert len([path for path in sockets.iterdir() if path.is_socket()]) >= 3
    for path in (*data_dir.rglob("*"), sockets, *sockets.iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path
    until(lambda: "ready after" in service.log.read_text(), 10)


def test_a_directory_that_others_may_open_is_said_so(data_dir: Path) -> None:
    """It may be meant so, and is left as it is; what lies in it is its owner's alone all the same."""
    data_dir.mkdir(mode=0o755, parents=True)
    data_dir.chmod(0o755)
    (data_dir / "blobs").mkdir(mode=0o755)
    with closing(open_store(data_dir)):
        (data_dir / "tinsmith.db").chmod(0o644)
    with running(data_dir, *FAKE) as service:
        assert "chmod 700" in service.log.read_text()
        assert data_dir.stat().st_mode & 0o777 == 0o755
        assert not [path for path in data_dir.rglob("*") if path.stat().st_mode & 0o077]


def test_a_key_of_the_command_line_can_be_rotated(service: Service) -> None:
    """That in admin.key is replaced there, so that the next call works with the old one gone."""
    there = ("--data-dir", service.data_dir)
    own = tinsmith("keys", "list", *there).stdout
    key_id = next(word for line in own.splitlines() for word in line.split() if re.fullmatch("k[0-9a-f]{16}", word))
    made = keys("rotate", key_id, "--grace", "0", *there)
    assert made.stdout.strip() == (service.data_dir / "admin.key").read_text().strip() != service.key
    assert (service.data_dir / "admin.key").stat().st_mode & 0o777 == 0o600
    again = keys("create", "--name", "ci", "--scope", "sample", "--expires", "90d", *there)
    assert again.stdout.startswith("tml-")
    listed = keys("list", *there).stdout
    assert "sample" in listed
    for wrong in (("--expires", "soon"), ("--expires", "0"), ("--admin", "--scope", "read")):
        assert keys("create", "--name", "x", *wrong, *there).returncode == 2


def test_keys_come_and_go_by_the_command_line(service: Service) -> None:
    there = ("--data-dir", service.data_dir)
    made = keys("create", "--name", "alice", *there)
    assert made.stdout.startswith("tml-")
    key_id = made.stderr.split()[1]
    listed = keys("list", *there).stdout
    assert key_id in listed
    assert made.stdout.strip() not in listed
    assert keys("revoke", key_id, *there).returncode == 0
    again = keys("revoke", "no-such-key", *there)
    assert (again.returncode, again.stderr.count("\n")) == (1, 1)


def test_a_second_server_on_the_directory_is_refused(service: Service) -> None:
    second = tinsmith("serve", *FAKE, "--port", "0", "--data-dir", service.data_dir)
    assert second.returncode == 2
    assert f"pid {service.process.pid}" in second.stderr
    assert second.stderr.count("\n") == 1
    assert service.is_ready()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly(data_dir: Path, number: signal.Signals) -> None:
    with running(data_dir, *FAKE) as service:
        pids = children(service)
        os.kill(service.process.pid, number)
        assert service.process.wait(30) == 0
        assert not any(map(is_alive, pids))
        assert not (data_dir / "server.json").exists()


def test_a_killed_server_leaves_nothing_and_is_taken_over_on_its_port(data_dir: Path) -> None:
    port = free_port()
    with running(data_dir, *FAKE, "--port", str(port)) as service:
        pids, key = children(service), service.key
        service.kill()
        until(lambda: not any(map(is_alive, pids)), 5)
        assert json.loads((data_dir / "server.json").read_text())["port"] == port
        service.restart()
        assert service.url == f"http://127.0.0.1:{port}"
        assert (data_dir / "admin.key").read_text().strip() == key
        assert "$(cat" in service.log.read_text()


def test_a_worker_that_cannot_load_ends_the_start(data_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in SHIPPED_PATH.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "config.json").write_text('{"model_type": "qwen3", "vocab_size": 1024}')
    done = tinsmith("serve", "--port", "0", "--data-dir", data_dir, "--base-model", f"a={broken}")
    assert done.returncode == 2
    assert "max_position_embeddings" in done.stderr
    assert done.stderr.count("\n") == 1
