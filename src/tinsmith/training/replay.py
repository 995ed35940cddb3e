"""Routes that were recorded while sampling, in place of the routers' own choice in a training pass.

Shape letters: T rows of the pack, N tokens of a datum, L routers, K experts of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tinsmith.model import BaseModel
from tinsmith.model.lora.tables import to_device
from tinsmith.route_tape import OWN_CHOICE
from tinsmith.training.lanes import Lane
from tinsmith.types import Failure, TrainItem


class Replay:
    """Of one pack."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._parts = [(lane.start, lane.end, lane.datum.routes) for lane in lanes if lane.datum.routes is not None]

    def choose(self, router: int, experts_TK: Tensor) -> Tensor:
        """See `model.PassContext`. Rows without a recorded choice keep the router's."""
        if not self._parts:
            return experts_TK
        rows = np.full(experts_TK.shape, OWN_CHOICE, np.int64)
        for start, end, routes in self._parts:
            rows[start:end] = routes[:, router]
        rows_TK = to_device(rows, experts_TK.device)
        return torch.where(rows_TK >= 0, rows_TK, experts_TK)


def misfit(base: BaseModel, item: TrainItem) -> Failure | None:
    """Why an item's routes can't be replayed on this base, if they can't."""
    for index, datum in enumerate(item.data):
        routes = datum.routes
        if routes is None:
            continue
        shape = (datum.num_tokens, base.num_routers, base.num_chosen)
        unknown = (routes == OWN_CHOICE).all(axis=(1, 2))
        known = routes[~unknown]
        if routes.shape != shape or bool(((known < 0) | (known >= base.num_experts)).any()):
            message = (
                f"datum {index}: its recorded routes are of another model than {base.info.name} (shape "
                f"{list(routes.shape)}, not {list(shape)}): leave out the provenance, or sample again"
            )
            return Failure("bad_routes", "user", message)
    return None
