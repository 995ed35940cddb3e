"""What the losses need of a chunk's logits, in plain torch: their logsumexp, and their gradient.

`logit_kernels` computes the same in one reading each; this is its reference, and what other devices use.
Shape letters: C rows of a chunk, M rows with a gradient, V vocabulary, F pairs of a row and a target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs ordered by row. first_C: int32 [C + 1], where each row's pairs begin; row_F, target_F: int64."""

    first_C: Tensor
    row_F: Tensor
    target_F: Tensor


class LogitOps(Protocol):
    """Both take float32 logits [C, V] and leave them alone."""

    def logsumexp(self, logits_CV: Tensor) -> Tensor:
        """float32 [C]; not finite where a row isn't."""
        ...

    def gradient(
        self, logits_CV: Tensor, lse_C: Tensor, pairs: Pairs, coef_F: Tensor, rows_M: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Σ_f coef_f · (onehot_f - p) over the pairs of each of the rows, [M, V]; rounded to `dtype` at the end."""
        ...


class PlainLogits:
    """See `LogitOps`."""

    def logsumexp(self, logits_CV: Tensor) -> Tensor:
        return torch.logsumexp(logits_CV, -1)

    def gradient(
        self, logits_CV: Tensor, lse_C: Tensor, pairs: Pairs, coef_F: Tensor, rows_M: Tensor, dtype: torch.dtype
    ) -> Tensor:
        sums_C = coef_sums(pairs, coef_F)
        grad_MV = torch.exp(logits_CV[rows_M] - lse_C[rows_M, None]).mul_(-sums_C[rows_M, None])
        place_C = torch.full_like(sums_C, -1, dtype=torch.int64)
        place_C[rows_M] = torch.arange(len(rows_M), device=rows_M.device)
        place_F = place_C[pairs.row_F]
        is_wanted_F = place_F >= 0
        grad_MV.index_put_((place_F[is_wanted_F], pairs.target_F[is_wanted_F]), coef_F[is_wanted_F], accumulate=True)
        return grad_MV.to(dtype)


def coef_sums(pairs: Pairs, coef_F: Tensor) -> Tensor:
    """Of each row, float32 [C]."""
    return coef_F.new_zeros(len(pairs.first_C) - 1).index_add_(0, pairs.row_F, coef_F)
