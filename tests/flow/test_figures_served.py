"""Figures of a real server: counters outlive its workers and its API process, and its files are never more."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any

from tests.service import Service, running, until
from tests.unit.test_metrics import samples
from tinsmith.files.datadir import DataDir


def read(service: Service) -> dict[tuple[str, tuple[str, ...]], float]:
    asked = urllib.request.Request(f"{service.url}/metrics", headers={"X-API-Key": service.key})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return samples(answer.read())


def test_figures_outlive_the_processes_that_counted(tmp_path: Path) -> None:
    with running(tmp_path / "data", "--device", "fake", "--no-deterministic") as service:
        holder = DataDir(service.data_dir).holder()
        assert holder is not None
        shared = Path(holder.socket_dir) / "metrics"

        def counted(name: str, *labels: str) -> float:
            return read(service).get((name, labels), 0.0)

        def is_counted(name: str, *labels: str, at_least: float) -> Any:
            return lambda: service.is_ready() and counted(name, *labels) >= at_least

        def readiness() -> float:
            """Of the worker, which is in every scrape, dead or alive."""
            return read(service)[("tinsmith_worker_ready", ("tinsmith/tiny", "all", "0"))]

        health = ("tinsmith_http_requests_total", "/api/v1/healthz", "200")
        until(is_counted("tinsmith_commit_seconds_count", at_least=3), 60)
        before, files = read(service), sorted(path.name for path in shared.iterdir())
        for number in (1, 2):
            service.kill_worker()
            until(lambda: readiness() == 0, 60)
            until(is_counted("tinsmith_restarts_total", "worker tinsmith/tiny", at_least=number), 60)
            until(lambda: readiness() == 1 and service.is_ready(), 60)
        until(is_counted("tinsmith_commit_seconds_count", at_least=before["tinsmith_commit_seconds_count", ()] + 1), 60)
        commits = counted("tinsmith_commit_seconds_count")
        service.kill_api()
        until(is_counted("tinsmith_restarts_total", "api", at_least=1), 60)
        after = read(service)
        assert sorted(path.name for path in shared.iterdir()) == files
        assert after[("tinsmith_commit_seconds_count", ())] >= commits
        assert after[(health[0], health[1:])] >= before[(health[0], health[1:])]
        assert ("tinsmith_process_memory_bytes", ("worker tinsmith/tiny",)) in after
