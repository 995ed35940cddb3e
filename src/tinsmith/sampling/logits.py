"""From logits to logprobs and tokens. Every operation works on each row by itself, whatever the other rows are.

Logprobs are those of the full distribution at the row's temperature; top-k, top-p, min-p and penalties only decide what
can be drawn, and how often. A token is drawn by inverting the cumulative distribution in the order of the vocabulary at
a given uniform number.
Shape letters: B rows, V vocabulary, P pieces of it, W tokens of a piece, T positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.types import SamplingParams

PIECE = 1024  # tokens summed at once
BLOCK_NUMBERS = 2**17  # of rows that are drawn for together on a CPU: what is made of them stays in a core's cache
LEAST_BLOCK = 16  # rows
MIN_TEMPERATURE = 1e-6  # smaller ones would overflow; they are computed at this one


@dataclass(frozen=True, slots=True)
class Warp:
    """The sampling parameters of B rows as tensors; `truncated` and `greedy` list the rows they concern."""

    temperatures_B1: Tensor
    has_temperature: bool
    greedy: Tensor
    truncated: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @classmethod
    def of(cls, params: Sequence[SamplingParams], vocab_size: int, device: torch.device) -> Warp:
        temperatures = [max(p.temperature, MIN_TEMPERATURE) if p.temperature else 1.0 for p in params]
        greedy = [row for row, p in enumerate(params) if p.temperature == 0]
        truncated = [
            row for row, p in enumerate(params) if p.temperature and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0)
        ]
        top_k = [min(params[row].top_k, vocab_size) if params[row].top_k > 0 else vocab_size for row in truncated]
        return cls(
            temperatures_B1=torch.tensor(temperatures, dtype=torch.float32, device=device)[:, None],
            has_temperature=any(t != 1.0 for t in temperatures),
            greedy=torch.tensor(greedy, dtype=torch.int64, device=device),
            truncated=torch.tensor(truncated, dtype=torch.int64, device=device),
            top_k=torch.tensor(top_k, dtype=torch.int64, device=device)[:, None],
            top_p=torch.tensor([params[row].top_p for row in truncated], dtype=torch.float64, device=device)[:, None],
            min_p=torch.tensor([params[row].min_p for row in truncated], dtype=torch.float32, device=device)[:, None],
        )

    def rows(self, first: int, last: int) -> Warp:
        """Of rows first..last-1."""
        inside = (self.truncated >= first) & (self.truncated < last)
        return Warp(
            temperatures_B1=self.temperatures_B1[first:last],
            has_temperature=self.has_temperature,
            greedy=self.greedy[(self.greedy >= first) & (self.greedy < last)] - first,
            truncated=self.truncated[inside] - first,
            top_k=self.top_k[inside],
            top_p=self.top_p[inside],
            min_p=self.min_p[inside],
        )

    def scaled(self, logits_BV: Tensor) -> Tensor:
        return logits_BV / self.temperatures_B1 if self.has_temperature else logits_BV


def draw(
    logits_BV: Tensor, warp: Warp, uniforms_B: Tensor, penalised_BV: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One token for each row.

    Args:
        logits_BV: float32.
        penalised_BV: the logits to draw by, if they aren't these.
        uniforms_B: float64 in [0, 1).

    Returns:
        tokens int64 [B], their logprobs float32 [B], and what is to be taken off the scaled logits of each row to get
        all logprobs, float32 [B, 1]; NaN where the logits are not finite.
    """
    num, vocab = logits_BV.shape
    block = max(LEAST_BLOCK, BLOCK_NUMBERS // vocab)
    if logits_BV.device.type != "cpu" or num < 2 * block:
        return _draw(logits_BV, warp, uniforms_B, penalised_BV)
    parts = []
    for first in range(0, num, block):
        own = slice(first, first + block)
        penalised = None if penalised_BV is None else penalised_BV[own]
        parts.append(_draw(logits_BV[own], warp.rows(first, first + block), uniforms_B[own], penalised))
    tokens, logprobs, norms = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logprobs), torch.cat(norms)


def _draw(
    logits_BV: Tensor, warp: Warp, uniforms_B: Tensor, penalised_BV: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    scaled_BV = warp.scaled(logits_BV)
    largest_B1 = scaled_BV.amax(-1, keepdim=True)
    weights_BV = (scaled_BV - largest_B1).exp_()
    sums_BP = _piece_sums(weights_BV)
    norms_B1 = largest_B1 + sums_BP.sum(-1, keepdim=True).log_().float()
    if penalised_BV is not None:
        other_BV = warp.scaled(penalised_BV)
        weights_BV = other_BV.sub(other_BV.amax(-1, keepdim=True)).exp_()
    if len(warp.truncated):
        weights_BV[warp.truncated] = truncate(weights_BV[warp.truncated], warp.top_k, warp.top_p, warp.min_p)
    if penalised_BV is not None or len(warp.truncated):
        sums_BP = _piece_sums(weights_BV)
    tokens_B = _invert(weights_BV, sums_BP, uniforms_B[:, None])
    if len(warp.greedy):
        drawn_by_BV = logits_BV if penalised_BV is None else penalised_BV
        tokens_B[warp.greedy] = drawn_by_BV[warp.greedy].argmax(dim=-1)
    return tokens_B, (scaled_BV.gather(1, tokens_B[:, None]) - norms_B1)[:, 0], norms_B1


def _invert(weights_BV: Tensor, sums_BP: Tensor, uniforms_B1: Tensor) -> Tensor:
    """int64 [B]: the token at which the running sum of a row first exceeds its share of the whole.

    Only the piece into which the share falls is run through token by token.
    """
    vocab = weights_BV.shape[1]
    shares_B1 = uniforms_B1 * sums_BP.sum(-1, keepdim=True)
    running_BP, piece_B1 = _find(sums_BP, shares_B1)
    before_B1 = F.pad(running_BP, (1, 0)).gather(1, piece_B1)
    at_BW = piece_B1 * PIECE + torch.arange(min(PIECE, vocab), device=weights_BV.device)
    piece_BW = weights_BV.gather(1, at_BW.clamp(max=vocab - 1)).masked_fill_(at_BW >= vocab, 0.0)
    _, place_B1 = _find(piece_BW.double(), shares_B1 - before_B1)
    return (piece_B1 * PIECE + place_B1)[:, 0].clamp_(max=vocab - 1)


def _find(weights_BN: Tensor, shares_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The running sums [B, N], and the first that exceeds the share; never one that adds nothing."""
    running_BN = weights_BN.cumsum(-1)
    whole_B1 = running_BN[:, -1:]
    below_B1 = torch.minimum(shares_B1, torch.nextafter(whole_B1, torch.zeros_like(whole_B1)))
    return running_BN, torch.searchsorted(running_BN, below_B1, right=True).clamp_(max=weights_BN.shape[1] - 1)


def _piece_sums(weights_BV: Tensor) -> Tensor:
    """float64 [B, P]. A piece is too short to be split over threads, which would depend on the number of rows."""
    return torch.stack([piece.sum(-1) for piece in torch.split(weights_BV, PIECE, -1)], -1).double()


def draw_many(logits_NV: Tensor, temperature: float, uniforms_NK: Tensor) -> Tensor:
    """K independent draws for each row, with replacement, int64 [N, K]. temperature 0: the likeliest token, K times.

    Args:
        logits_NV: float32.
        uniforms_NK: float64 in [0, 1).
    """
    if temperature == 0:
        return logits_NV.argmax(dim=-1, keepdim=True).expand(uniforms_NK.shape)
    probs_NV = torch.softmax(logits_NV / max(temperature, MIN_TEMPERATURE), dim=-1)
    cumulative_NV = torch.cumsum(probs_NV, dim=-1, dtype=torch.float64)
    targets_NK = uniforms_NK * cumulative_NV[:, -1:]
    return torch.searchsorted(cumulative_NV, targets_NK, right=True).clamp_(max=logits_NV.shape[1] - 1)


def penalise(logits_BV: Tensor, params: Sequence[SamplingParams], tokens: Sequence[Sequence[int]]) -> Tensor | None:
    """The logits of each row less its penalties for the tokens that it has sampled already; None without penalties."""
    rows = [row for row, p in enumerate(params) if p.presence_penalty or p.frequency_penalty]
    if not rows:
        return None
    penalised_BV = logits_BV.clone()
    for row in rows:
        counts = Counter(tokens[row])
        seen = torch.tensor(list(counts), dtype=torch.int64, device=logits_BV.device)
        times = torch.tensor(list(counts.values()), dtype=torch.float32, device=logits_BV.device)
        penalised_BV[row, seen] -= params[row].presence_penalty + params[row].frequency_penalty * times
    return penalised_BV


def restrict(logits_BV: Tensor, allowed: Mapping[int, npt.NDArray[np.bool_]]) -> Tensor:
    """The logits, -inf where a token isn't allowed. allowed: by row, [V]; the other rows stay as they are."""
    restricted_BV = logits_BV.clone()
    for row, allowed_V in allowed.items():
        forbidden_V = torch.from_numpy(~allowed_V).to(logits_BV.device)
        restricted_BV[row] = restricted_BV[row].masked_fill(forbidden_V, float("-inf"))
    return restricted_BV


def truncate(probs_BV: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Zero what top-k, then top-p, and min-p leave out; the rest is not renormalised.

    Min-p (Nguyen et al. 2024) keeps tokens at least that share as likely as the most likely one.

    Top-p (Holtzman et al. 2020) keeps the smallest set of most likely tokens whose share of what top-k left reaches p;
    the most likely token is always kept. Of equal probabilities the lower token id counts as the more likely.
    """
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    ranks_V = torch.arange(probs_BV.shape[1], device=probs_BV.device)
    sorted_BV = sorted_BV.masked_fill(ranks_V >= top_k, 0.0)
    cumulative_BV = sorted_BV.cumsum(dim=-1, dtype=torch.float64)
    before_BV = cumulative_BV - sorted_BV
    sorted_BV = sorted_BV.masked_fill(sorted_BV < min_p * sorted_BV[:, :1], 0.0)
    kept_BV = sorted_BV.masked_fill((before_BV >= top_p * cumulative_BV[:, -1:]) & (ranks_V > 0), 0.0)
    return torch.zeros_like(probs_BV).scatter_(1, order_BV, kept_BV)
