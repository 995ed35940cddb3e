"""The parts of serve that need no children; whole servers are in tests/flow/test_serve.py and tests/crash."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest

from tinsmith.bases.catalog import parse
from tinsmith.config import Settings
from tinsmith.errors import ConfigError
from tinsmith.serve.main import bind, child_specs, local_url, serve
from tinsmith.serve.placement import num_threads


def test_a_taken_port_is_refused_at_once() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        with pytest.raises(ConfigError, match="choose another with --port"):
            bind("127.0.0.1", sock.getsockname()[1], may_be_left=False)


def test_a_port_that_a_killed_server_held_is_waited_for() -> None:
    left = socket.socket()
    left.bind(("127.0.0.1", 0))
    left.listen()
    port = left.getsockname()[1]
    threading.Timer(0.5, left.close).start()
    started = time.monotonic()
    bind("127.0.0.1", port, may_be_left=True).close()
    assert time.monotonic() - started < 3


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match="--host"):
        bind("192.0.2.1", 0, may_be_left=False)
    with pytest.raises(ConfigError, match="--host"):
        bind("no such host", 0, may_be_left=False)


def test_urls_can_be_reached() -> None:
    assert local_url(Settings(host="0.0.0.0", port=5)) == "http://127.0.0.1:5"
    assert local_url(Settings(host="::1", port=5)) == "http://[::1]:5"


def test_children_get_all_that_was_decided(tmp_path: Path) -> None:
    settings = Settings(threads=3, port=1234)
    refs = [parse("a/b=" + str(parse("tinsmith/tiny").path)), parse("tinsmith/tiny")]
    api, first, second = child_specs(settings, refs, tmp_path, listen_fd=8, parent_fd=9, heart_fd=7)
    assert (api.pass_fds, first.pass_fds) == ((8, 9, 7), (9,))
    assert api.argv[api.argv.index("--heart-fd") + 1] == "7"
    assert api.env["OMP_NUM_THREADS"] == "1"
    assert first.env["OMP_NUM_THREADS"] == first.env["TINSMITH_THREADS"] == "3"
    assert first.env["OMP_WAIT_POLICY"] == "PASSIVE"
    assert api.argv.count("--worker-bell") == 2
    assert f"a/b={tmp_path / 'worker-0.sock'}" in api.argv
    assert first.argv[first.argv.index("--base") + 1] == str(refs[0])
    assert second.argv[second.argv.index("--slot") + 1] == "1"
    assert (first.name, second.name) == ("worker a/b", "worker tinsmith/tiny")


def test_a_sampler_of_its_own_shares_the_cores(tmp_path: Path) -> None:
    settings = Settings(threads=1, port=1234, separate_sampler=True, device="cpu", sampler_device="fake")
    api, trainer, sampler = child_specs(
        settings, [parse("tinsmith/tiny")], tmp_path, listen_fd=8, parent_fd=9, heart_fd=7
    )
    assert (trainer.name, sampler.name) == ("worker tinsmith/tiny", "sampler tinsmith/tiny")
    assert [spec.argv[spec.argv.index("--role") + 1] for spec in (trainer, sampler)] == ["train", "sample"]
    assert [spec.argv[spec.argv.index("--slot") + 1] for spec in (trainer, sampler)] == ["0", "0-sample"]
    assert [spec.env["TINSMITH_DEVICE"] for spec in (trainer, sampler)] == ["cpu", "fake"]
    for name in ("worker-0.sock", "worker-0-sample.sock"):
        assert f"tinsmith/tiny={tmp_path / name}" in api.argv
    assert num_threads(Settings(separate_sampler=True), 8) == 4
    assert num_threads(Settings(separate_sampler=True), 1) == num_threads(Settings(), 1) == 1
    assert num_threads(Settings(separate_sampler=True, threads=3), 8) == 3


def test_nothing_is_left_of_a_start_that_failed(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        settings = Settings.load({}, data_dir=tmp_path / "data", port=sock.getsockname()[1])
        with pytest.raises(ConfigError, match="taken"):
            serve(settings)
    with pytest.raises(ConfigError, match="there is no directory"):
        serve(Settings.load({}, data_dir=tmp_path / "data", base_model=("a=/nowhere",)))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["serve.lock"]
