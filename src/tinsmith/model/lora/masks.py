"""Dropout of an adapter's inputs: which numbers of x are left out, as a pure function of where they are.

The generator is splitmix64 (Steele, Lea, Flood 2014, figure 16), read at any position. With `mix` its finalizer and
golden = 0x9E3779B97F4A7C15, modulo 2^64,

    next(key, n) = mix(key + (n + 1) · golden)
    row          = next(next(next(mix(seed + golden), seq), datum), position)      of a token
    bits         = next(mix(row + hash(group)), column // 2)

of which the lower 32 bits are those of the even column and the upper ones those of the odd one; a number is left out if
its bits are less than p · 2^32, else it is divided by 1 - p. In a layer's expert, next(row, expert) takes the
row's place. So a mask depends neither on what else is in a pass nor on where it is cut, and is the same when a
layer is computed again, or a request after a crash. The formula is part of the contract. Layers with one input are one
group and see one mask.

Shape letters: N rows that have a mask, I inputs, P pairs of columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

GOLDEN, MIX_1, MIX_2 = (
    n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)  # as the int64 they are computed in


@dataclass(frozen=True, slots=True)
class RowMask:
    """The masks of some rows, one after another. row_N: int64. least_N: int32, bits from it on are kept, counted from
    -2^31. scale_N: float32, 1 / (1 - p)."""

    row_N: Tensor
    least_N: Tensor
    scale_N: Tensor

    @classmethod
    def of_datum(cls, seed: int, seq: int, datum: int, num_tokens: int, dropout: float, device: torch.device) -> Self:
        key = _mix(torch.tensor(_wrapped(seed + GOLDEN)))
        for number in (seq, datum):
            key = _next(key, number)
        row_N = _next(key, torch.arange(num_tokens)).to(device, non_blocking=True)
        least_N = torch.full((num_tokens,), int(dropout * 2**32) - 2**31, dtype=torch.int32, device=device)
        return cls(row_N, least_N, torch.full((num_tokens,), 1 / (1 - dropout), device=device))

    @classmethod
    def joined(cls, masks: Sequence[RowMask]) -> RowMask:
        if len(masks) == 1:
            return masks[0]
        return cls(*(torch.cat([getattr(mask, name) for mask in masks]) for name in ("row_N", "least_N", "scale_N")))

    def at(self, index: Tensor | slice) -> RowMask:
        return RowMask(self.row_N[index], self.least_N[index], self.scale_N[index])

    def of_expert(self, expert: int) -> RowMask:
        """What its slots have in the place of these rows."""
        return RowMask(_next(self.row_N, expert), self.least_N, self.scale_N)

    def times(self, group: str, x_NI: Tensor) -> Tensor:
        """The numbers of these rows that are left, scaled; of x, and just so of the gradient that comes back."""
        return self.apply(self.left_out(group, x_NI.shape[1]), x_NI)

    def left_out(self, group: str, num_columns: int) -> Tensor:
        """bool [N, I]."""
        key_N1 = _mix(self.row_N + _hash(group))[:, None]
        bits_NP = _next(key_N1, torch.arange((num_columns + 1) // 2, device=key_N1.device))
        return bits_NP.view(torch.int32)[:, :num_columns] ^ -(2**31) < self.least_N[:, None]

    def apply(self, left_out_NI: Tensor, x_NI: Tensor) -> Tensor:
        """`times`, with what `left_out` returned."""
        return (x_NI * self.scale_N[:, None]).masked_fill_(left_out_NI, 0).to(x_NI.dtype)


def _next(key: Tensor, number: Tensor | int) -> Tensor:
    step = (number + 1) * GOLDEN
    return _mix(key + (_wrapped(step) if isinstance(step, int) else step))


def _mix(z: Tensor) -> Tensor:
    """In place."""
    for shift, factor in ((30, MIX_1), (27, MIX_2)):
        z.bitwise_xor_(_shifted(z, shift)).mul_(factor)
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left: int64 would bring its sign."""
    return (z >> by).bitwise_and_((1 << (64 - by)) - 1)


@lru_cache(maxsize=65_536)
def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little", signed=True)


def _wrapped(number: int) -> int:
    """Modulo 2^64, as an int64."""
    return (number + 2**63) % 2**64 - 2**63
