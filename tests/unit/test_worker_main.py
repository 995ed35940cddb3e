"""The worker process around its loop: how it ends, and a lease that outlives a hiccup of the storage."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tinsmith.errors import CapacityError, CorruptError, FencedError, TinsmithError, UnsupportedError
from tinsmith.store.rows import WorkerId
from tinsmith.worker import main as worker
from tinsmith.worker.busy import Busy
from tinsmith.worker.slim import leave_out_unused


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnsupportedError("softcap"), worker.EXIT_UNUSABLE),
        (FencedError("replaced"), worker.EXIT_FENCED),
        (CapacityError("busy"), worker.EXIT_FAILED),
        (CorruptError("the disk is full"), worker.EXIT_FAILED),
    ],
)
def test_only_what_no_restart_mends_is_final(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: TinsmithError, status: int
) -> None:
    """Status 2 ends the server at its start; with any other the worker is started again."""

    def fails(*args: object) -> None:
        raise error

    monkeypatch.setenv("TINSMITH_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(worker, "_serve", fails)
    monkeypatch.setattr(worker.signal, "signal", lambda *args: None)
    bells = ("--bell", str(tmp_path / "w"), "--api-bell", str(tmp_path / "a"))
    assert worker.main(["--base", "tinsmith/tiny", "--slot", "0", *bells]) == status


def test_a_lease_is_renewed_again_after_the_storage_failed() -> None:
    stop = threading.Event()
    calls: list[float] = []

    class Store:
        class workers:
            @staticmethod
            def renew(me: WorkerId, lease_s: float, now: float, busy_s: float) -> None:
                calls.append(now)
                if len(calls) < 3:
                    raise CapacityError("busy")
                stop.set()

    store: Any = Store()
    worker._renew(store, WorkerId("0", 1), 0.01, Busy(), stop)
    assert len(calls) == 3


def test_a_worker_without_a_gpu_holds_no_triton() -> None:
    script = (
        "from tinsmith.worker.slim import leave_out_unused\n"
        "leave_out_unused('cpu')\n"
        "import tinsmith.torch_engine, torch._dynamo.utils, pathlib\n"
        "assert 'libtriton' not in pathlib.Path('/proc/self/maps').read_text()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_worker_for_a_gpu_may_load_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    leave_out_unused("cuda:0")
    assert "triton" not in sys.modules
