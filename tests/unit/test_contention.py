"""A thread that has to share its core is seen to wait, and one that sleeps is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tinsmith.machine.contention import Contention

BURN = "while True: pass"


def burn(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


def test_who_shares_a_core_waits_for_it() -> None:
    cores = os.sched_getaffinity(0)
    contention = Contention()
    os.sched_setaffinity(0, {min(cores)})
    other = subprocess.Popen([sys.executable, "-c", BURN])
    try:
        burn(0.3)
        contention.share()
        burn(1.0)
        assert contention.share() > 0.1
        time.sleep(0.5)
        assert contention.share() < 0.1
    finally:
        other.kill()
        other.wait()
        os.sched_setaffinity(0, cores)


def test_where_nothing_is_counted_nobody_waits(tmp_path: Path) -> None:
    contention = Contention(tmp_path)
    assert contention.share() == 0.0
