"""Which rows go to which experts, and where each of them lies once rows are sorted by expert.

Sorting is done once for a layer: by expert, then by row, so that the rows of one sequence lie together within an
expert, and a run's rows too. On the CPU each expert's rows are filled up as `padded_rows` says, so that the bits of a
row's products don't depend on how many others chose the same expert; on a GPU, and where all experts are one product,
there is no filler, and nothing waits for the device.
Shape letters: T rows of the pass, K experts of a row, E experts, P = T · K assignments, N slots (assignments and
filler), S spans of rows, D width of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinsmith.model.rows import padded_rows

Ranges = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """experts_TK: int64, the experts of each row. rows_N: int64, the row of each slot; 0 for filler. places_TK: int64,
    the slot of each assignment. ends_E: int32, where each expert's slots end."""

    experts_TK: Tensor
    num_experts: int
    rows_N: Tensor
    places_TK: Tensor
    ends_E: Tensor
    keys_P: Tensor
    shifts_E: Tensor

    @classmethod
    def of(cls, experts_TK: Tensor, num_experts: int, *, may_fill: bool = True) -> Routes:
        num_rows, num_each = experts_TK.shape
        device = experts_TK.device
        experts_P, order_P = experts_TK.reshape(-1).sort(stable=True)
        of_P = order_P // num_each
        counts_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        counts_E.scatter_add_(0, experts_P, torch.ones_like(experts_P))
        sizes_E, num_slots = counts_E, num_rows * num_each
        if may_fill and device.type == "cpu":
            sizes_E = torch.tensor([padded_rows(count) if count else 0 for count in counts_E.tolist()])
            num_slots = int(sizes_E.sum())
        ends_E = sizes_E.cumsum(0)
        shifts_E = (ends_E - sizes_E) - (counts_E.cumsum(0) - counts_E)
        slots_P = torch.arange(len(order_P), device=device) + shifts_E[experts_P]
        places_P = torch.empty_like(slots_P)
        places_P[order_P] = slots_P
        rows_N = torch.zeros(num_slots, dtype=torch.int64, device=device)
        rows_N[slots_P] = of_P
        keys_P = experts_P * num_rows + of_P
        places_TK = places_P.view(num_rows, num_each)
        return cls(experts_TK, num_experts, rows_N, places_TK, ends_E.int(), keys_P, shifts_E)

    def sizes(self) -> list[int]:
        """Slots of each expert. Waits for the device."""
        return cast(list[int], self.ends_E.diff(prepend=self.ends_E.new_zeros(1)).tolist())

    def ranges(self, spans: Sequence[tuple[int, int]]) -> Ranges:
        """Where the rows of each span (start, end) lie: int64 [., 4], of index of the span, expert, first slot and end,
        in this order; experts that none of the span's rows chose are left out. Waits for the device."""
        if not spans:
            return np.zeros((0, 4), np.int64)
        bounds_S2 = torch.tensor(spans, device=self.keys_P.device)
        firsts_E11 = torch.arange(self.num_experts, device=self.keys_P.device)[:, None, None] * len(self.experts_TK)
        found_ES2 = torch.searchsorted(self.keys_P, firsts_E11 + bounds_S2) + self.shifts_E[:, None, None]
        found_SE2 = found_ES2.transpose(0, 1).cpu().numpy()
        hits = np.nonzero(found_SE2[..., 1] > found_SE2[..., 0])
        return np.concatenate([np.stack(hits, 1), found_SE2[hits]], 1)


def spread(x_TD: Tensor, routes: Routes) -> Tensor:
    """The row of each slot, [N, D]."""
    if torch.is_grad_enabled():
        return cast(Tensor, _Spread.apply(x_TD, routes))  # type: ignore[no-untyped-call]
    return x_TD.index_select(0, routes.rows_N)


def to_slots(weights_TK: Tensor, routes: Routes) -> Tensor:
    """The weight of each slot, [N]; zero for filler."""
    empty_N = weights_TK.new_zeros(len(routes.rows_N))
    return empty_N.scatter(0, routes.places_TK.reshape(-1), weights_TK.reshape(-1))


def gather(y_ND: Tensor, weights_TK: Tensor, routes: Routes) -> Tensor:
    """Σ over a row's experts of weight · output, added up in float32: [T, D] in the dtype of y."""
    if torch.is_grad_enabled():
        return cast(Tensor, _Gather.apply(y_ND, weights_TK, routes))  # type: ignore[no-untyped-call]
    return _sum(y_ND, weights_TK, routes)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, routes: Routes) -> Tensor:
        ctx.routes = routes
        return x_TD.index_select(0, routes.rows_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        return _sum(grad_ND, None, ctx.routes), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weights_TK: Tensor, routes: Routes) -> Tensor:
        ctx.save_for_backward(y_ND, weights_TK)
        ctx.routes = routes
        return _sum(y_ND, weights_TK, routes)

    @staticmethod
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        """dy = w · dout, dw = Σ dout · y."""
        y_ND, weights_TK = ctx.saved_tensors
        routes: Routes = ctx.routes
        weights_N = weights_TK.new_zeros(len(y_ND), dtype=torch.float32)
        weights_N[routes.places_TK.reshape(-1)] = weights_TK.reshape(-1).float()
        dout_ND = dout_TD.float().index_select(0, routes.rows_N)
        dw_N = torch.mul(dout_ND, y_ND).sum(-1)
        dy_ND = dout_ND.mul_(weights_N[:, None]).to(y_ND.dtype)
        return dy_ND, dw_N[routes.places_TK].to(weights_TK.dtype), None


def _sum(y_ND: Tensor, weights_TK: Tensor | None, routes: Routes) -> Tensor:
    """One expert after another, so that the order of a row's sum depends on nothing else."""
    out_TD: Tensor | None = None
    for number in range(routes.places_TK.shape[1]):
        part_TD = y_ND.index_select(0, routes.places_TK[:, number]).float()
        if weights_TK is not None:
            part_TD.mul_(weights_TK[:, number, None])
        out_TD = part_TD if out_TD is None else out_TD.add_(part_TD)
    assert out_TD is not None, "a router chooses at least one expert"
    return out_TD.to(y_ND.dtype)
