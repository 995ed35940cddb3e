"""Does a row of a matrix product have the same bits, however many other rows there are?

The promise that no neighbour changes a result rests on it. It depends on the processor, the math library, the shape and
the number of threads, so it is measured where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.model.context import MIN_ROWS

MOST_ROWS = 272
ROWS = (MIN_ROWS, 32, 64, 128)


def uneven_products(weights: Iterable[Tensor]) -> list[tuple[int, int]]:
    """The shapes (O, I) of those among `weights` whose products x Wᵀ [T, O] or dy W [T, I] round a row differently in
    a crowd; each shape is tried once."""
    by_shape = {(w.shape[0], w.shape[1]): w for w in weights}
    return [shape for shape, weight_OI in by_shape.items() if not _is_even(weight_OI)]


@torch.no_grad()
def _is_even(weight_OI: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    for width, is_forward in ((weight_OI.shape[1], True), (weight_OI.shape[0], False)):
        rows = torch.randn(MOST_ROWS, width, generator=generator).to(weight_OI)
        crowd = F.linear(rows, weight_OI) if is_forward else rows @ weight_OI
        for count in ROWS:
            few = F.linear(rows[:count], weight_OI) if is_forward else rows[:count] @ weight_OI
            if not torch.equal(few, crowd[:count]):
                return False
    return True
