"""Running out of memory for real: a process whose address space ends, see low_memory.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# each tensor is a mapping of its own, so that what fits doesn't depend on the heap's holes and on what it keeps
NOTHING_KEPT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_ARENA_MAX": "1"}


@pytest.mark.skipif(sys.platform != "linux", reason="address spaces are limited and measured as Linux does it")
def test_what_fits_in_parts_is_computed_and_what_does_not_fails_alone(tmp_path: Path) -> None:
    """A request beyond the memory, a sequence that needs checkpointing, one that can't be held: with a budget by number
    all of them run out and begin again, with the measured one none does; the bits are those of plenty."""
    script = [sys.executable, "-m", "tests.numerics.low_memory", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **NOTHING_KEPT}
    run = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines()[-1] == "all well"
