"""What torch's math libraries need in the environment on this processor, before torch is loaded.

OpenMP: threads that wait actively are 11 to 17 times slower where processes share few cores, and threads that sleep at
once pay for every wake-up; a few microseconds of waiting are nearly free where cores are shared and save a quarter of
a small pass where they aren't.

Pages: with few rows a product is the reading of its weights, and looking up pages of 4 KiB is a sixth of that. torch
asks for huge pages for tensors of 2 MiB and more, where the system leaves it the choice.

MKL: a matrix product's rows must round alike, however many rows there are, or a neighbour in the pass would change the
last bits of a result. On Intel processors MKL splits long sums over threads by the number of rows unless its strict
mode is on; on others it doesn't, and it is the strict mode that uses other kernels for narrow shares of a thread.
`model.row_probe` measures whether the choice holds.
"""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
OPENMP = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "300"}
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
MKL_STRICT = {"MKL_CBWR": "AUTO,STRICT"}


def math_env(cpuinfo: Path = CPUINFO) -> dict[str, str]:
    """Variables of the environment; what a user has set goes first."""
    return OPENMP | HUGE_PAGES | (MKL_STRICT if _is_intel(cpuinfo) else {})


def _is_intel(cpuinfo: Path) -> bool:
    try:
        with cpuinfo.open(encoding="ascii", errors="replace") as lines:
            return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in lines)
    except OSError:
        return False
