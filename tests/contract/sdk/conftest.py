"""Lends torch to the client's environment before the SDK looks for it (only custom losses need it), and the proxy.

Counts which of the SDK's calls the tests make; a run of the whole suite that leaves one out fails, and names it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

if extra := os.environ.get("TORCH_FROM"):
    sys.path.append(extra)
sys.path.append(str(Path(__file__).resolve().parents[1]))  # lossy.py, which knows the standard library alone

import calls
import forks
import tinker
from tinker_cli import Commands

WORKERS = 3  # commands at the same time
LEDGER = calls.Ledger()
calls.count_calls(LEDGER)


@pytest.fixture
def ledger() -> calls.Ledger:
    return LEDGER


@pytest.fixture(autouse=True)
def _calls_settled(request: pytest.FixtureRequest) -> Iterator[None]:
    LEDGER.test = request.node.nodeid
    yield
    LEDGER.settle()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        LEDGER.failed.add(item.nodeid)
    elif report.skipped:
        LEDGER.skipped[item.nodeid] = str(report.longrepr[2]) if report.longrepr else ""


def pytest_sessionfinish(session: pytest.Session) -> None:
    if path := os.environ.get("CALLS_TO"):
        LEDGER.write(Path(path), tinker.__version__)


@pytest.fixture(scope="session")
def pool() -> Iterator[ThreadPoolExecutor]:
    forks.serve_forks()
    with ThreadPoolExecutor(WORKERS) as pool:
        yield pool


@pytest.fixture
def cli(tmp_path: Path, ledger: calls.Ledger, pool: ThreadPoolExecutor) -> Commands:
    """Towards the server that computes with the model."""
    return Commands("TINKER", tmp_path, ledger, pool)


@pytest.fixture
def token_cli(tmp_path: Path, ledger: calls.Ledger, pool: ThreadPoolExecutor) -> Commands:
    """Towards the server that has clients exchange their keys for tokens."""
    return Commands("TOKENS", tmp_path, ledger, pool)
