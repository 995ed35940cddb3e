"""What all tests share: the math libraries set up before torch loads, data directories, and a real server."""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

from tinsmith.machine.cpu import math_env

gc.disable()  # until all tests are collected: nothing that is imported becomes garbage
os.environ.update({**math_env(), **os.environ})  # read when torch loads and first computes
os.environ.update(HF_HUB_OFFLINE="1", TINKER_TELEMETRY="0")
if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the CPU, slowly; read when triton loads
for name in [name for name in os.environ if name.startswith(("TINSMITH_", "TINKER_BASE_URL", "TINKER_API_KEY"))]:
    if not name.startswith("TINSMITH_TEST_"):  # how much the tests themselves try
        del os.environ[name]

import pytest  # noqa: E402
import structlog  # noqa: E402

import tinsmith.store  # noqa: E402
from tests.service import Service, running  # noqa: E402
from tinsmith.machine import heap  # noqa: E402
from tinsmith.store.database import Database  # noqa: E402
from tinsmith.store.prepared import driver_of  # noqa: E402

# by itself structlog has rich draw each traceback with the values of all its names, which is slow
structlog.configure(
    processors=[
        structlog.processors.add_log_level,
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Thousands of tests and all that they import stay to the end; no collection needs to walk them again."""
    gc.enable()
    heap.settle()


STUCK_AFTER = 2.5  # times what a test may take


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    _end_if_stuck(item)
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    _end_if_stuck(item)  # anew, since a failure takes it back
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _end_if_stuck(item: pytest.Item) -> None:
    """End the process, and so fail the test, where its limit doesn't: in a second try, or outside of Python."""
    marked = item.get_closest_marker("timeout")
    limit_s = float(marked.args[0] if marked else item.config.getoption("timeout") or item.config.getini("timeout"))
    faulthandler.dump_traceback_later(STUCK_AFTER * limit_s, exit=True)


@pytest.fixture(scope="session", autouse=True)
def _migrated_once() -> Iterator[None]:
    """A new database in this process is a copy of the first one, which was brought to its schema step by step.

    One that is there already, and those of other processes, are upgraded as ever (unit/test_store_upgrade.py).
    """
    upgrade, made = tinsmith.store.upgrade, list[bytes]()

    def copied(database: Database, lock_file: Path) -> None:
        path = lock_file.with_suffix(Path(tinsmith.store.DATABASE_FILE).suffix)
        if path.exists() or not made:
            is_new = not path.exists()
            upgrade(database, lock_file)
            if is_new:
                with database.read() as connection:
                    made.append(driver_of(connection).serialize())
        else:
            path.write_bytes(made[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tinsmith.store, "upgrade", copied)
        yield


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


@pytest.fixture(scope="session")
def plain_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server of the shipped model for several modules: starting one takes as long as most of their tests.

    Its processes may be killed, which come back; the server itself may not be stopped.
    """
    with running(tmp_path_factory.mktemp("plain-server") / "data") as service:
        yield service
