"""The suite in `sdk/` with each supported SDK release, each in its own environment, which is made if it's missing."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.contract_envs import VERBOSE, VERSIONS, calls_since, environment, run_suite, table
from tests.service import Service, running

CORE = {
    "POST /create_model",
    "POST /forward_backward",
    "POST /optim_step",
    "POST /save_weights",
    "POST /save_weights_for_sampler",
    "POST /load_weights",
    "POST /asample",
    "POST /retrieve_future",
    "GET /training_runs/{run}/checkpoints",
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running(tmp_path_factory.mktemp("versions") / "data", *VERBOSE) as service:
        yield service


@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", VERSIONS)
def test_the_suite_passes(service: Service, version: str) -> None:
    """The release that these tests are installed with needs no environment of its own here."""
    ours = importlib.metadata.version("tinker") == version
    report = run_suite(version, Path(sys.executable) if ours else environment(version), service)
    assert report.returncode == 0, report.output[-8000:]
    assert set(report.calls) >= CORE, table([report])


def test_ids_are_left_out_of_the_table(tmp_path: Path) -> None:
    log = tmp_path / "log"
    line = '{"event": "request", "method": "GET", "path": "/api/v1/training_runs/%s/checkpoints/weights/a/ttl"}\n'
    log.write_text("noise\n" + line % f"s{'0' * 24}:train:0" + line % f"s{'1' * 24}:train:12")
    assert calls_since(log, 0) == {"GET /training_runs/{run}/checkpoints/weights/{name}/ttl": 2}
