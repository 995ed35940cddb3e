"""AdamW on the flat rows of many runs at once, each run with its own hyperparameters.

Loshchilov & Hutter 2019, algorithm 2, as torch.optim.AdamW computes it: decoupled decay scaled by the learning rate,
bias-corrected moments, eps outside the root. Runs are taken one after another where a run's rows fill the caches, and
small ones with the same hyperparameters share a call. No pass over memory is made that isn't needed: clipping is
folded into the step, and a gradient that has been applied is let go of, not zeroed.
Shape letters: P numbers of a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tinsmith.crashpoints import crash_point
from tinsmith.training.runs import PARTS, RunSlot
from tinsmith.types import AdamParams, Failure, OptimResult

CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_
NORM_BLOCK = 4096
GROUP_PARAMS = 2**18  # rows of so many numbers in all are stepped together: 1 MiB of gradients stays in a core's cache


def optim_steps(slots: Sequence[RunSlot], params: Sequence[AdamParams]) -> list[OptimResult | Failure]:
    """Apply each run's accumulated gradients and let go of them; none accumulated counts as zero gradients.

    Returns:
        In the slots' order: `grad_norm` (global, before clipping), `clip_factor` (what clipping multiplied the
        gradients by, 1 if it left them alone), `optimizer_step` (taken so far) and `learning_rate`; or a Failure that
        left its run as it was, if the gradients aren't finite. No metric is called `step`: loops merge these into rows
        of their own, whose `step` they look for when they resume. Norms of the parameters aren't among them: a pass
        over memory for each, a sixth of the whole step (dev/LOG.md).
    """
    outcomes: list[OptimResult | Failure] = []
    start = 0
    while start < len(slots):
        end, size = start + 1, slots[start].layout.num_params
        while end < len(slots) and size + slots[end].layout.num_params <= GROUP_PARAMS:
            size += slots[end].layout.num_params
            end += 1
        outcomes += _step_group(slots[start:end], params[start:end])
        start = end
    return outcomes


def _step_group(slots: Sequence[RunSlot], params: Sequence[AdamParams]) -> list[OptimResult | Failure]:
    norms = [global_norm(slot.rows["grad"]) if "grad" in slot.rows else 0.0 for slot in slots]
    alike: dict[tuple[AdamParams, float], list[RunSlot]] = {}
    for slot, own, norm in zip(slots, params, norms, strict=True):
        if math.isfinite(norm):
            alike.setdefault((own, _clip_divisor(own, norm)), []).append(slot)
    for (own, divisor), group in alike.items():
        _adamw(group, own, divisor)
        crash_point("optim.half_done")
    return outcomes_of(slots, params, norms)


def outcomes_of(
    slots: Sequence[RunSlot], params: Sequence[AdamParams], norms: Sequence[float]
) -> list[OptimResult | Failure]:
    """After the steps: what each came to; a run whose norm isn't finite took none."""
    return [
        OptimResult(
            {
                "grad_norm": norm,
                "clip_factor": 1 / _clip_divisor(own, norm),
                "optimizer_step": float(slot.step),
                "learning_rate": own.learning_rate,
            }
        )
        if math.isfinite(norm)
        else Failure(
            code="non_finite_gradient",
            category="user",
            message="the accumulated gradients are not finite, and the step was not taken: load an earlier checkpoint "
            "and lower the learning rate",
        )
        for slot, own, norm in zip(slots, params, norms, strict=True)
    ]


def _clip_divisor(params: AdamParams, norm: float) -> float:
    """What gradients of this norm are divided by, as torch.nn.utils.clip_grad_norm_ does."""
    is_clipped = params.grad_clip_norm > 0 and norm + CLIP_EPS > params.grad_clip_norm
    return (norm + CLIP_EPS) / params.grad_clip_norm if is_clipped else 1.0


def _adamw(slots: Sequence[RunSlot], params: AdamParams, divisor: float) -> None:
    """One call for runs with the same hyperparameters, whose gradients are divided by the same number."""
    for slot in slots:
        slot.fill_rows()
    device = slots[0].rows["param"].device
    param, grad, m, v = ([piece for slot in slots for piece in slot.layout.learned(slot.rows[part])] for part in PARTS)
    taken = [slot.step for slot in slots for _ in slot.layout.learned(slot.rows["param"])]
    torch._fused_adamw_(
        param,
        grad,
        m,
        v,
        [],
        [torch.tensor(float(step + 1), device=device) for step in taken],
        lr=params.learning_rate,
        beta1=params.beta1,
        beta2=params.beta2,
        weight_decay=params.weight_decay,
        eps=params.eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None if divisor == 1.0 else torch.tensor(divisor, device=device),
        found_inf=None,
    )
    for slot in slots:
        slot.step += 1
        slot.refresh()
        del slot.rows["grad"]


def global_norm(row_P: Tensor) -> float:
    """The 2-norm of a row, in blocks whose norms are combined in double precision.

    torch's norm of one long float32 vector adds in float32: 6e-4 off at ten million numbers, against 4e-7 in blocks.
    """
    middle = len(row_P) // NORM_BLOCK * NORM_BLOCK
    blocks = torch.linalg.vector_norm(row_P[:middle].view(-1, NORM_BLOCK), dim=1)
    rest = torch.linalg.vector_norm(row_P[middle:])
    return float(torch.cat([blocks, rest[None]]).double().square().sum().sqrt())
