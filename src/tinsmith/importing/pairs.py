"""One layer's two factors as they come, read when they are asked for, and as the served base lays them out.

Shape letters: E experts or 1, R rank, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tinsmith.bases.layer_table import Layer
from tinsmith.errors import UnsupportedError
from tinsmith.types import FloatArray


@dataclass(frozen=True, slots=True)
class Pair:
    """A [R, I] and B [O, R]; of experts A [E, R, I] and B [E, O, R]. scale: B A times this is added to the layer.
    alpha: what the file says it is made of."""

    rank: int
    scale: float
    alpha: float
    a: Callable[[], FloatArray]
    b: Callable[[], FloatArray]

    def half(self, layer: Layer, half: str, rank: int) -> FloatArray:
        """As a run of the given rank holds it: the rows and columns beyond its own rank are zero, and stay so in
        training, since each is multiplied with the other.

        Raises:
            UnsupportedError: experts share a factor here that isn't the same for all of them there.
        """
        is_a = half == "lora_A"
        found = _shared(self.a() if is_a else self.b(), layer, layer.num_a if is_a else layer.num_b)
        missing = rank - self.rank
        if not missing:
            return found
        widths = [(0, 0)] * found.ndim
        widths[-2 if is_a else -1] = (0, missing)
        return np.pad(found, widths)


def zeros(layer: Layer, half: str, rank: int) -> FloatArray:
    """Of a layer that has no adapter: both factors zero, so neither ever gets a gradient."""
    return np.zeros(layer.a_shape(rank) if half == "lora_A" else layer.b_shape(rank), np.float32)


def _shared(factor: FloatArray, layer: Layer, wanted: int) -> FloatArray:
    if not layer.is_of_experts or len(factor) == wanted:
        return factor
    if len(factor) == 1:
        return np.broadcast_to(factor, (wanted, *factor.shape[1:]))
    if wanted == 1 and all(np.array_equal(one, factor[0]) for one in factor[1:]):
        return factor[:1]
    raise UnsupportedError(
        f"{layer.name}: each expert has a factor of its own on the side of the hidden states, and adapters of "
        "this server share it: import it on one that runs with --expert-adapters own"
    )
