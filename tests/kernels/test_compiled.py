"""The kernels as an H200 would get them: compiled for compute capability 9.0, which needs no GPU.

What Triton's interpreter can't show: that they compile, load vectors instead of single numbers, copy ahead of the
products and multiply on tensor cores. A subprocess, since triton is either the interpreter or the compiler.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """By kernel and case: how often each kind of instruction stands in its PTX."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for_hopper"], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


def test_every_case_compiles(counts: dict[str, dict[str, int]]):
    assert len(counts) == 3 * 2 * 3 + 2 + 2 + 6 + 5 + 2, list(counts)


def test_lora_kernels_use_tensor_cores_and_vectors(counts: dict[str, dict[str, int]]):
    lora = {name: found for name, found in counts.items() if " rank " in name}
    for name, found in lora.items():
        assert found["wgmma"] + found["mma.sync"] > 0, name
        assert found["single bf16 loads"] == found["single bf16 stores"] == 0, name
        if not name.startswith("_expand"):
            assert found["cp.async"] > 0, name


def test_logits_are_read_and_written_in_vectors(counts: dict[str, dict[str, int]]):
    assert counts["_logsumexp"]["vector loads"] > 0
    assert counts["_gradient"]["vector loads"] > 0
    assert counts["_gradient"]["vector stores"] > 0


def test_adamw_loads_vectors(counts: dict[str, dict[str, int]]):
    for name in ("_square_sums", "_adamw"):
        assert counts[name]["vector loads"] > 0, name
    assert counts["_adamw"]["vector stores"] > 0
    assert counts["_adamw"]["single bf16 stores"] == 0


def test_adapters_in_experts_are_read_in_vectors(counts: dict[str, dict[str, int]]):
    for side in ("shared", "own"):
        for name in (f"_shrink_slots {side}", f"_expand_slots {side}"):
            assert counts[name]["vector loads"] + counts[name]["cp.async"] > 0, name


def test_decode_kernels_use_tensor_cores_and_copy_vectors_ahead(counts: dict[str, dict[str, int]]):
    for name in ("_shrink_tiles", "_expand_tiles 16", "_expand_tiles 32", "_expand_tiles 64", "_attend"):
        found = counts[name]
        assert found["mma.sync"] > 0, name
        assert found["cp.async"] > 0, name
        assert found["single bf16 loads"] == 0, name
