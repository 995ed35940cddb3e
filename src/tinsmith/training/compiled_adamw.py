"""Optimizer steps of many runs on the CPU, by a small C program: one call, each number read and written once.

`adamw.c` has the arithmetic. Here are the tables by which it finds rows and hyperparameters. The plain reference is
`optimizer.optim_steps`, which also serves where the program can't be had; the log says so then.
What stays true: a run's bits depend on its own rows and hyperparameters alone, not on what shares the call, its order
or the number of threads. Memory is taken before any run is stepped.
Shape letters: P numbers of a row, S runs, C pieces of rows.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tinsmith.crashpoints import crash_point
from tinsmith.model import LinearInfo, RowLayout
from tinsmith.model.compiled import Program
from tinsmith.training.optimizer import optim_steps, outcomes_of
from tinsmith.training.runs import PARTS, RunSlot
from tinsmith.types import AdamParams, Failure, OptimResult, RunId, RunSpec, Targets

BLOCK = 2**14  # as the program's
WHOLE_PARAMS = 2**22  # a run of more is shared among threads: 16 MiB of each row take milliseconds
MAX_ERROR = 1e-5

Kernel = Callable[..., None]
Table = NDArray[Any]


def compiled_steps(
    kernel: Kernel, slots: Sequence[RunSlot], params: Sequence[AdamParams]
) -> list[OptimResult | Failure]:
    """As `optimizer.optim_steps`."""
    if not slots:
        return []
    held = [(*slot.rows,) for slot in slots]
    for slot in slots:
        slot.fill_rows()
    order = sorted(range(len(slots)), key=lambda number: slots[number].layout.num_params)
    norms_S = np.empty(len(slots))
    norms_S[order] = _run(kernel, [slots[number] for number in order], [params[number] for number in order])
    crash_point("optim.half_done")
    norms: list[float] = norms_S.tolist()
    for slot, norm, parts in zip(slots, norms, held, strict=True):
        if math.isfinite(norm):
            slot.step += 1
            slot.refresh()
            del slot.rows["grad"]
        else:
            slot.rows = {part: slot.rows[part] for part in parts}
    return outcomes_of(slots, params, norms)


def _run(kernel: Kernel, slots: Sequence[RunSlot], params: Sequence[AdamParams]) -> Table:
    """The norms, float64 [S]. slots: by their size. A thread takes a small run whole; what is left over is shared."""
    num_threads = torch.get_num_threads()
    num_small = sum(slot.layout.num_params <= WHOLE_PARAMS for slot in slots)
    rows, pieces_C2 = _places(slots)
    numbers = np.array([_numbers(own, slot.step + 1) for slot, own in zip(slots, params, strict=True)])
    norms_S, sums_SB = np.empty(len(slots)), np.empty((len(slots), -(-slots[-1].layout.num_params // BLOCK)))
    addresses = (table.ctypes.data for table in (rows, numbers, pieces_C2, norms_S, sums_SB))
    kernel(len(slots), num_small - num_small % num_threads, *addresses, sums_SB.shape[1], num_threads)
    return norms_S


def _places(slots: Sequence[RunSlot]) -> tuple[Table, Table]:
    """Of each run the addresses of its rows, their length, its first piece of all and the one after its last, int64
    [S, 7]; where each piece begins and ends in its row, int64 [C, 2]."""
    rows: list[tuple[int, ...]] = []
    pieces: list[tuple[int, int]] = []
    for slot in slots:
        own = [slot.rows[part] for part in PARTS]
        assert all(row.dtype == torch.float32 and row.is_contiguous() for row in own), "rows are float32 in one piece"
        first, begin = len(pieces), own[0].data_ptr()
        for piece in slot.layout.learned(own[0]):
            start = (piece.data_ptr() - begin) // piece.element_size()
            pieces.append((start, start + len(piece)))
        rows.append((*(row.data_ptr() for row in own), len(own[0]), first, len(pieces)))
    return np.array(rows, np.int64), np.array(pieces, np.int64)


def _numbers(own: AdamParams, step: int) -> tuple[float, ...]:
    """What the program multiplies with in the step of this number, which counts from 1."""
    return (
        1 - own.learning_rate * own.weight_decay,
        own.learning_rate / (1 - own.beta1**step),
        own.beta1,
        own.beta2,
        1 - own.beta1,
        1 - own.beta2,
        (1 - own.beta2**step) ** -0.5,
        own.eps,
        own.grad_clip_norm,
    )


def _declared(library: ctypes.CDLL) -> Kernel:
    kernel: Kernel = library.step_runs
    number, address = ctypes.c_int64, ctypes.c_void_p
    kernel.restype = None  # type: ignore[attr-defined]
    kernel.argtypes = [number, number, *[address] * 5, number, ctypes.c_int]  # type: ignore[attr-defined]
    return kernel


def agrees(kernel: Kernel) -> bool:
    """Whether two steps of three runs are those of `optim_steps`, and each has the bits that it gets alone."""
    params = [
        AdamParams(0.01, weight_decay=0.1, grad_clip_norm=1.0),
        AdamParams(0.02, beta1=0.8, grad_clip_norm=2.0),
        AdamParams(),
    ]
    together, alone, right = ([_drawn(seed) for seed in range(3)] for _ in range(3))
    for step in range(2):
        for slots in (together, alone, right):
            for seed, slot in enumerate(slots):
                grad_P = torch.randn(slot.layout.num_params, generator=torch.Generator().manual_seed(3 * step + seed))
                slot.rows["grad"] = grad_P * (math.nan if seed == 2 else 1.0)
        compiled_steps(kernel, together, params)
        for slot, own in zip(alone, params, strict=True):
            compiled_steps(kernel, [slot], [own])
        optim_steps(right, params)
    return all(map(_is_right, together, alone, right))


def _is_right(one: RunSlot, other: RunSlot, wanted: RunSlot) -> bool:
    """Equal bits in the first two, and the third's numbers; what takes no step has no moments."""
    if not one.rows.keys() == other.rows.keys() == wanted.rows.keys():
        return False
    changed = wanted.rows.keys() - {"grad"}
    return all(
        torch.equal(one.rows[part], other.rows[part])
        and torch.allclose(one.rows[part], wanted.rows[part], rtol=MAX_ERROR, atol=MAX_ERROR)
        for part in changed
    )


def _drawn(seed: int) -> RunSlot:
    linear, targets = LinearInfo("l", "attn", 33, 17, "l"), Targets()
    layout = RowLayout([linear], targets, 4 + seed)
    return RunSlot.fresh(RunSpec(RunId(f"{seed}"), "", 4 + seed, seed, targets), layout, torch.device("cpu"))


PROGRAM = Program(
    Path(__file__).with_name("adamw.c"),
    _declared,
    agrees,
    "optimizer steps go through torch's kernel, which takes 1.6 times as long",
)
