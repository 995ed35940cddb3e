"""Pictures among the tokens of a sequence: what one is, without knowing any model that looks at it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture among tokens: positions start..start+num_tokens-1 hold the model's placeholder tokens.

    data: the file as it was sent, PNG or JPEG, of width x height pixels.
    """

    start: int
    num_tokens: int
    data: bytes
    width: int
    height: int
