"""What all tests share: a quiet OpenMP before torch loads, data directories, and a real server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # both are read when torch loads, so before any import of it
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.update(HF_HUB_OFFLINE="1", TINKER_TELEMETRY="0")
for name in [name for name in os.environ if name.startswith(("TINSMITH_", "TINKER_BASE_URL", "TINKER_API_KEY"))]:
    del os.environ[name]

import pytest  # noqa: E402

from tests.service import Service, running  # noqa: E402


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Where a server may keep its data; not made yet."""
    return tmp_path / "data"


@pytest.fixture
def server(data_dir: Path) -> Iterator[Service]:
    """A `tinsmith serve` of the shipped model on a free port, ready, stopped afterwards."""
    with running(data_dir) as service:
        yield service
