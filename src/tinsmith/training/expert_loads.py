"""How evenly a request's tokens use the experts of a mixture: counted in the pass, told in the request's result.

Only the request's own tokens count, whatever shares its pass; see `load_metrics`.
Shape letters: T rows of the pack, K experts of a row, E experts, N ops, L layers with experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tinsmith.model import Routes
from tinsmith.training.lanes import Lane, OpProgress


class ExpertLoads:
    """Of one pack."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = lanes
        self._counts: dict[str, Tensor] = {}
        self._ops: list[OpProgress] = []
        self._op_T1: Tensor | None = None

    def see(self, name: str, routes: Routes) -> None:
        """The routes of a layer; told twice, they count once."""
        if name in self._counts:
            return
        experts_TK, num = routes.experts_TK, routes.num_experts
        if self._op_T1 is None:
            self._op_T1 = self._number_ops(len(experts_TK)).to(experts_TK.device)
        keys = (self._op_T1 * num + experts_TK).reshape(-1)
        counts = torch.zeros((len(self._ops) + 1) * num, dtype=torch.int64, device=keys.device)
        self._counts[name] = counts.scatter_add_(0, keys, torch.ones_like(keys)).view(-1, num)

    def book(self) -> None:
        if not self._counts:
            return
        layers = [counts.cpu().numpy() for counts in self._counts.values()]
        for number, op in enumerate(self._ops):
            own = [counts[number] for counts in layers]
            op.expert_loads = own if not op.expert_loads else [a + b for a, b in zip(op.expert_loads, own, strict=True)]

    def _number_ops(self, num_rows: int) -> Tensor:
        """The index of each row's op, [T, 1]; one past the last for filler."""
        index: dict[int, int] = {}
        op_T = np.full(num_rows, -1, np.int64)
        for lane in self._lanes:
            if id(lane.op) not in index:
                index[id(lane.op)] = len(self._ops)
                self._ops.append(lane.op)
            op_T[lane.start : lane.end] = index[id(lane.op)]
        op_T[op_T < 0] = len(self._ops)
        return torch.from_numpy(op_T)[:, None]
