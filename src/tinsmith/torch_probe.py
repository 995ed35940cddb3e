"""What torch finds on this machine, as one line of JSON: `python -m tinsmith.torch_probe`.

A program of its own, so that whoever asks need not load torch, and sees it as a worker would.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
import transformers

from tinsmith.errors import UnsupportedError
from tinsmith.model.compiled import Program
from tinsmith.model.frozen import FrozenMatrix
from tinsmith.model.lora import compiled_segments
from tinsmith.model.lora.choice import has_triton
from tinsmith.model.row_probe import uneven_products
from tinsmith.sampling import compiled_lora
from tinsmith.training import compiled_adamw

GEMM_SIZE = 512
REPEATS = 8
PROGRAMS: tuple[Program[Any], ...] = (compiled_lora.PROGRAM, compiled_adamw.PROGRAM, compiled_segments.PROGRAM)
SHAPES = ((32, 128), (64, 64), (576, 192), (512, 1536), (1024, 192))


def probe() -> dict[str, object]:
    """Versions, threads, speed of a float32 matrix product (GFLOP/s), accelerators with their memory in bytes, the
    shapes of products whose rows depend on their neighbours, and why kernels aren't to be had (empty: they are)."""
    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            gpus.append({"name": torch.cuda.get_device_name(index), "free_bytes": free, "total_bytes": total})
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "gflops": round(_gemm_gflops(), 1),
        "gpus": gpus,
        "triton": "" if has_triton() else "triton is not installed",
        "compiled": _why_not_compiled(),
        "uneven": uneven_products(FrozenMatrix(torch.randn(shape)) for shape in SHAPES),
    }


def _why_not_compiled() -> str:
    try:
        for program in PROGRAMS:
            program.load()
    except UnsupportedError as error:
        return error.message
    return ""


def _gemm_gflops() -> float:
    a = torch.ones(GEMM_SIZE, GEMM_SIZE)
    a @ a
    started = time.perf_counter()
    for _ in range(REPEATS):
        a @ a
    return 2 * GEMM_SIZE**3 * REPEATS / (time.perf_counter() - started) / 1e9


if __name__ == "__main__":
    sys.stdout.write(json.dumps(probe()) + "\n")
