"""The experts that a mixture's routers chose, position by position: recorded while sampling, replayed while training.

Shape letters: N positions, P of the prompt, S sampled tokens, L layers with experts, K experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RouteArray = npt.NDArray[np.int16]
OWN_CHOICE = -1  # in all cells of a position whose routes aren't known: the model's routers choose


def num_known(routes: RouteArray | None) -> int:
    """Positions, of [N, L, K], whose routes are known."""
    return 0 if routes is None else int((routes[:, :1, :1] >= 0).sum())


@dataclass(frozen=True, slots=True)
class RouteTape:
    """Of one sample request. prompt: int16 [P, L, K]; sequences: int16 [S - 1, L, K] each, since the last token that is
    sampled never enters the model."""

    prompt: RouteArray
    sequences: tuple[RouteArray, ...]

    @property
    def num_bytes(self) -> int:
        return self.prompt.nbytes + sum(sequence.nbytes for sequence in self.sequences)
