"""A base is loaded without twice its memory: the peak of a process of its own, against what the base keeps then.

Models of some 290 MB in float32 (see loading_memory.py), sharded, read as workers read them. What a form keeps is
reckoned from its codes and scales; beside it there may be the largest group of layers twice more, and some MiB of the
allocator's and the libraries'. Once trained there are holes in the heap, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.numerics.loading_memory import CASES
from tinsmith.serve.main import WORKER_DEFAULTS

RATIO, BESIDE, BESIDE_TRAINED = 1.35, 40 * 2**20, 100 * 2**20
FEW = ("dense bfloat16 float32 stored",)
ASKED = [" ".join(case) for case in CASES] if os.environ.get("TINSMITH_TEST_ALL_FORMS") else FEW


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    home = tmp_path_factory.mktemp("loading")
    command = [sys.executable, "-m", "tests.numerics.loading_memory", str(home), *ASKED]
    env = {**os.environ, **WORKER_DEFAULTS, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    read: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return read


@pytest.mark.parametrize("case", ASKED)
def test_loading_takes_little_more_than_the_model(found: dict[str, dict[str, int]], case: str) -> None:
    one = found[case]
    assert one["peak"] <= RATIO * one["kept"] + BESIDE, {name: n >> 20 for name, n in one.items()}
    assert one["trained_peak"] <= RATIO * one["trained"] + BESIDE_TRAINED, {name: n >> 20 for name, n in one.items()}
