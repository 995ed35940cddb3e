"""What all tests share: the math libraries set up before torch loads, data directories, and a real server."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tinsmith.cpu import math_env

os.environ.update({**math_env(), **os.environ})  # read when torch loads and first computes
os.environ.update(HF_HUB_OFFLINE="1", TINKER_TELEMETRY="0")
if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU, slowly; read when triton loads
for name in [name for name in os.environ if name.startswith(("TINSMITH_", "TINKER_BASE_URL", "TINKER_API_KEY"))]:
    if not name.startswith("TINSMITH_TEST_"):  # how much the tests themselves try
        del os.environ[name]

import pytest  # noqa: E402
import structlog  # noqa: E402

from tests.service import Service, running  # noqa: E402

# by itself structlog has rich draw each traceback with the values of all its names, which is slow
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)


@pytest.fixture(scope="module", autouse=True)
def _sdk_clients_closed() -> Iterator[None]:
    """What a module's SDK clients still have running in their thread ends with it: requests to a stopped server."""
    yield
    if sdk := sys.modules.get("tinker.lib.internal_client_holder"):
        for holder in [thing for thing in gc.get_objects() if type(thing) is sdk.InternalClientHolder]:
            holder.close()
        sdk.sessionless_holder_cache._holders.clear()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Where a server may keep its data; not made yet."""
    return tmp_path / "data"


@pytest.fixture
def server(data_dir: Path) -> Iterator[Service]:
    """A `tinsmith serve` of the shipped model on a free port, ready, stopped afterwards."""
    with running(data_dir) as service:
        yield service
