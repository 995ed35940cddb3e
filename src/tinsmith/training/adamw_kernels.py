"""AdamW for many runs in two launches on an NVIDIA GPU: norms of their gradients, then a step of each.

Loshchilov & Hutter 2019, algorithm 2, as torch.optim.AdamW computes it. Each run has its own hyperparameters, step
count and clipping; a run whose gradients aren't finite is left as it was. Rows are found by address, so runs of any
size may lie anywhere on the device. The copy of the parameters in the dtype that passes compute in is written on the
way. The plain reference is torch.optim.AdamW. Importing this module needs triton.
Shape letters: P numbers of a row, S runs, B blocks of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from tinsmith.model.lora.tables import UNIT, Table, addresses, to_device
from tinsmith.types import AdamParams

CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_
NORM_BLOCK = 4096
BLOCKS_A_PROGRAM = 16
STEP_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class StepRows:
    """One run's float32 rows [P]. copy: its parameters for passes in another dtype. step: taken so far."""

    param: Tensor
    grad: Tensor
    m: Tensor
    v: Tensor
    copy: Tensor | None
    step: int


@triton.jit
def _square_sums(
    anchor, at, sizes, sums, num_programs,
    UNIT: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    part, run = tl.program_id(0), tl.program_id(1)
    size = tl.load(sizes + run)
    if EVEN:
        size = tl.multiple_of(size, 16)
    row = anchor + tl.load(at + run) * UNIT
    first = part.to(tl.int64) * (BLOCK * BLOCKS)
    acc = tl.zeros((BLOCK,), tl.float32)
    for block in range(BLOCKS):
        places = first + block * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(row + places, mask=places < size, other=0.0)
        acc += g * g
    tl.store(sums + run * num_programs + part, tl.sum(acc))


@triton.jit
def _adamw(
    anchor, at, copies, copy_at, sizes, numbers, factors, takes_step, num_runs,
    UNIT: tl.constexpr, COPY_UNIT: tl.constexpr, EVEN: tl.constexpr, HAS_COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(1)
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(factors + run)
    size = tl.load(sizes + run)
    if EVEN:
        size = tl.multiple_of(size, 16)
    is_there = (places < size) & (tl.load(takes_step + run) != 0)
    param_at = anchor + tl.load(at + run) * UNIT + places
    m_at = anchor + tl.load(at + 2 * num_runs + run) * UNIT + places
    v_at = anchor + tl.load(at + 3 * num_runs + run) * UNIT + places
    decay, step_size = tl.load(numbers + run), tl.load(numbers + num_runs + run)
    beta1, beta2 = tl.load(numbers + 2 * num_runs + run), tl.load(numbers + 3 * num_runs + run)
    rest1, rest2 = tl.load(numbers + 4 * num_runs + run), tl.load(numbers + 5 * num_runs + run)
    root_bias, eps = tl.load(numbers + 6 * num_runs + run), tl.load(numbers + 7 * num_runs + run)
    g = tl.load(anchor + tl.load(at + num_runs + run) * UNIT + places, mask=is_there, other=0.0) * factor
    m = beta1 * tl.load(m_at, mask=is_there, other=0.0) + rest1 * g
    v = beta2 * tl.load(v_at, mask=is_there, other=0.0) + rest2 * g * g
    param = tl.load(param_at, mask=is_there, other=0.0) * decay
    param = param - step_size * m / (tl.sqrt(v) / root_bias + eps)
    tl.store(param_at, param, mask=is_there)
    tl.store(m_at, m, mask=is_there)
    tl.store(v_at, v, mask=is_there)
    if HAS_COPY:
        copy_to = copies + tl.load(copy_at + run) * COPY_UNIT + places
        tl.store(copy_to, param.to(copies.dtype.element_ty), mask=is_there)


@torch.no_grad()
def global_norms(rows: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each float32 row, float64 [S] on their device. Blocks add in float32, their sums in float64."""
    device = rows[0].device
    at, unit = addresses([[row] for row in rows], rows[0])
    sizes = np.array([row.numel() for row in rows], np.int64)
    num_programs = -(-int(sizes.max()) // (NORM_BLOCK * BLOCKS_A_PROGRAM))
    sums_SB = torch.empty(len(rows), num_programs, device=device)
    _square_sums[(num_programs, len(rows))](
        rows[0], to_device(at, device), to_device(sizes, device), sums_SB, num_programs,
        UNIT=unit, EVEN=not (sizes % UNIT).any(), BLOCK=NORM_BLOCK, BLOCKS=BLOCKS_A_PROGRAM, num_warps=8,
    )  # fmt: skip
    return sums_SB.double().sum(1).sqrt()


@torch.no_grad()
def step_runs(runs: Sequence[StepRows], params: Sequence[AdamParams]) -> list[float]:
    """Step every run whose gradients are finite; the gradients stay as they are.

    Returns:
        The norm of each run's gradients before clipping, in one transfer.
    """
    device = runs[0].param.device
    norms_S = global_norms([run.grad for run in runs])
    clips_S = to_device(np.array([own.grad_clip_norm for own in params]), device)
    is_clipped_S = (clips_S > 0) & (norms_S + CLIP_EPS > clips_S)
    factors_S = torch.where(is_clipped_S, clips_S / (norms_S + CLIP_EPS), 1.0).float()
    takes_step_S = torch.isfinite(norms_S).int()

    at, unit = addresses([[run.param, run.grad, run.m, run.v] for run in runs], runs[0].param)
    copies = [run.param if run.copy is None else run.copy for run in runs]
    copy_at, copy_unit = addresses([[copy] for copy in copies], copies[0])
    sizes = np.array([run.param.numel() for run in runs], np.int64)
    _adamw[(-(-int(sizes.max()) // STEP_BLOCK), len(runs))](
        runs[0].param, to_device(np.ascontiguousarray(at.T), device), copies[0], to_device(copy_at, device),
        to_device(sizes, device), to_device(_numbers(runs, params), device), factors_S,
        takes_step_S, len(runs),
        UNIT=unit, COPY_UNIT=copy_unit, EVEN=not (sizes % UNIT).any(), HAS_COPY=runs[0].copy is not None,
        BLOCK=STEP_BLOCK, num_warps=4,
    )  # fmt: skip
    norms: list[float] = norms_S.tolist()
    return norms


def _numbers(runs: Sequence[StepRows], params: Sequence[AdamParams]) -> Table:
    """What the kernel wants of each run, [8, S], worked out in double precision."""
    rows = [
        (
            1 - own.learning_rate * own.weight_decay,
            own.learning_rate / (1 - own.beta1 ** (run.step + 1)),
            own.beta1,
            own.beta2,
            1 - own.beta1,
            1 - own.beta2,
            (1 - own.beta2 ** (run.step + 1)) ** 0.5,
            own.eps,
        )
        for run, own in zip(runs, params, strict=True)
    ]
    return np.ascontiguousarray(np.array(rows, np.float32).T)
