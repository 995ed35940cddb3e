"""The benchmark of one GPU: its script works, and without a GPU its page claims nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "bench_gpu.py"
PAGE = ROOT / "docs" / "benchmarks-gpu.md"


def run(*args: str) -> str:
    done = subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_rows_work_on_tiny_shapes():
    wanted = ["train-8b-sdk", "peft-0.6b-sdk", "decode-8b", "optimizer"]
    assert [line.partition(":")[0] for line in run("--smoke", "--only", *wanted).splitlines()] == wanted


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the script measures")
def test_without_a_gpu_the_page_is_made_of_the_rows_that_were_measured(tmp_path: Path):
    run("--out", str(tmp_path / "page.md"))
    assert (tmp_path / "page.md").read_text() == PAGE.read_text(), "run `make bench-gpu`"
    table = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(table) == 19
    if not (ROOT / "benchmarks" / "gpu_rows.jsonl").exists():
        assert all("| not measured |" in line for line in table)
