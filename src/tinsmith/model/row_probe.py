"""Does a row of a matrix product have the same bits, however many other rows there are?

The promise that no neighbour changes a result rests on it. It depends on the processor, the math library, the shape and
the number of threads, so it is measured where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.model.frozen import EVEN_ROWS, FrozenMatrix
from tinsmith.model.rows import MIN_ROWS

MOST_ROWS = 272
ROWS = (MIN_ROWS, 16, 32, 64, 128)


def uneven_products(matrices: Iterable[FrozenMatrix]) -> list[tuple[int, int]]:
    """The shapes (O, I) of those whose products x Wᵀ [T, O] or dy W [T, I] round a row differently in a crowd; each
    shape is tried once."""
    by_shape = {(matrix.out_features, matrix.in_features): matrix for matrix in matrices}
    return [shape for shape, matrix in by_shape.items() if not _is_even(matrix)]


@torch.no_grad()
def uneven_routers(weights: Iterable[Tensor]) -> list[tuple[int, int]]:
    """The same for routers [E, D], whose products are torch's own, of `EVEN_ROWS` or more rows."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for (outputs, inputs), weight in {tuple(weight.shape): weight for weight in weights}.items():
        x, dy = (torch.randn(MOST_ROWS, n, generator=generator).to(weight) for n in (inputs, outputs))
        y, dx = F.linear(x, weight), dy @ weight
        counts = [count for count in ROWS if count >= EVEN_ROWS]
        same = (torch.equal(F.linear(x[:n], weight), y[:n]) and torch.equal(dy[:n] @ weight, dx[:n]) for n in counts)
        if not all(same):
            found.append((outputs, inputs))
    return found


@torch.no_grad()
def _is_even(matrix: FrozenMatrix) -> bool:
    generator = torch.Generator().manual_seed(0)
    for width, product in ((matrix.in_features, matrix.times), (matrix.out_features, matrix.times_transpose)):
        rows = torch.randn(MOST_ROWS, width, generator=generator).to(matrix.device, matrix.dtype)
        crowd = product(rows)
        if not all(torch.equal(product(rows[:count]), crowd[:count]) for count in ROWS):
            return False
    return True
