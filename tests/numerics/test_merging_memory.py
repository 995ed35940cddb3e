"""A merge takes the memory of a tensor, its merged copy and a product: the peak of a process of its own.

Models of some 290 MB in float32 (see loading_memory.py), sharded by layer. The largest tensor counts as it is in
float32: a quantised one is dequantised so, all experts of a layer at once where the files have them in one tensor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.numerics.merging_memory import CASES

RATIO, BESIDE = 3, 30 * 2**20
FEW = ("dense bfloat16", "fused mxfp4")
ASKED = [" ".join(case) for case in CASES] if os.environ.get("TINSMITH_TEST_ALL_FORMS") else FEW


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    home = tmp_path_factory.mktemp("merging")
    command = [sys.executable, "-m", "tests.numerics.merging_memory", str(home), *ASKED]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    read: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return read


@pytest.mark.parametrize("case", ASKED)
def test_a_merge_takes_little_more_than_its_largest_tensor(found: dict[str, dict[str, int]], case: str) -> None:
    one = found[case]
    assert one["changed"] >= 30
    allowed = RATIO * one["largest"] + BESIDE
    assert one["peak"] <= allowed < one["all"] / 2, {name: n >> 20 for name, n in one.items()}
