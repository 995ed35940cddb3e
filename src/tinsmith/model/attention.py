"""Which keys an attention sees and what becomes of its scores, and the attention that can do all of it.

Plain causal attention goes to the kernels of torch. What they can't do, windows that slide, capped scores and
sinks, is computed here block by block of queries: memory is linear in the length, and scores are made again for
backward (Dao 2022, arXiv 2205.14135, algorithms 1 and 4, with blocks of queries only).

* chunk: Llama 4: a position sees what lies before it in its own chunk, and itself; chunks begin at multiples.
* window: Beltagy 2020, arXiv 2004.05150, section 3.1: a position sees itself and window - 1 before it.
* softcap: Gemma 2, arXiv 2408.00118, section 2: scores become cap · tanh(scores / cap).
* sinks: gpt-oss, arXiv 2508.10925, section 2.2: one more score a head, of a key whose value is zero.

Shape letters: B sequences, H query heads, G key/value heads, Q query heads of one key/value head, D head size of
queries and keys, E that of values, N queries, M queries of a block, S keys, K keys that a block may see, W keys of a
slot.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.types import IntArray

BLOCK_QUERIES = 128
MAX_SCORES = 2**25  # of a sequence in a block: 128 MiB


@dataclass(frozen=True, slots=True, eq=False)
class AttentionKind:
    """How one layer attends. scale: factor of the scores. sinks_H: a score for each query head."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None
    chunk: int | None = None

    @property
    def is_masked_only(self) -> bool:
        """Scores are used as they are; only which keys are seen may differ from plain causal attention."""
        return self.softcap is None and self.sinks_H is None

    def is_plain(self, num_positions: int) -> bool:
        """Plain causal attention, for sequences of at most so many positions."""
        return self.is_masked_only and all(reach is None or reach >= num_positions for reach in self.reaches)

    @property
    def reaches(self) -> tuple[int | None, int | None]:
        """Window and chunk: together with a position they say from where on it sees keys."""
        return self.window, self.chunk

    def first_seen(self, position: int) -> int:
        """The first key that a query at this position sees."""
        first = 0 if self.window is None else max(0, position - self.window + 1)
        return first if self.chunk is None else max(first, position // self.chunk * self.chunk)

    def unseen(self, at: Tensor, of: Tensor) -> Tensor | None:
        """Where keys at positions `of` are hidden from queries at positions `at`, for lying too far back, whatever
        comes after; None if none is. The two broadcast."""
        found = None if self.window is None else of <= at - self.window
        if self.chunk is None:
            return found
        before = of < at - at % self.chunk
        return before if found is None else found | before


@dataclass(frozen=True, slots=True, eq=False)
class Reach:
    """The last position that each of N queries sees, where that isn't its own: int64 [N], here and on the device."""

    last: IntArray
    last_N: Tensor


def reach_of(last: IntArray | None, device: torch.device) -> Reach | None:
    return None if last is None else Reach(last, torch.from_numpy(last).to(device))


def block_attention(
    q_BHND: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, start: int, kind: AttentionKind, reach: Reach | None = None
) -> Tensor:
    """[B, H, N, E]: queries at positions start.. of sequences of which S positions are there. Differentiable by q, k
    and v; the sinks are frozen. Scores and sums are float32, whatever the dtype of the rest. reach: of queries that
    see positions after their own, which windows don't hide."""
    if torch.is_grad_enabled():
        out: Tensor = _BlockAttention.apply(q_BHND, k_BGSD, v_BGSE, start, kind, reach)  # type: ignore[no-untyped-call]
        return out
    return _forward(q_BHND, k_BGSD, v_BGSE, start, kind, reach)[0]


def masked_attention(q_NGQD: Tensor, k_NGWD: Tensor, v_NGWE: Tensor, mask: Tensor, kind: AttentionKind) -> Tensor:
    """[N, G, Q, E]: one query for each sequence and head, which sees the keys where the mask is zero.

    mask: 0 or -inf in the dtype of q, of a shape that broadcasts to [N, G, Q, W]; windows are the mask's affair.
    """
    if kind.is_masked_only:
        return F.scaled_dot_product_attention(q_NGQD, k_NGWD, v_NGWE, attn_mask=mask, scale=kind.scale)
    scores = capped((q_NGQD.float() @ k_NGWD.float().transpose(-1, -2)).mul_(kind.scale), kind.softcap).add_(mask)
    sinks = None if kind.sinks_H is None else kind.sinks_H.float().view(1, *q_NGQD.shape[1:3], 1)
    return (weights_of(scores, sinks) @ v_NGWE.float()).to(q_NGQD.dtype)


def weights_of(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the last dimension of masked scores, with a sink that takes its share and gives nothing.

    sinks: broadcasts against the scores, with 1 as its last dimension.
    """
    if sinks is None:
        return scores.softmax(-1)
    return (scores - _logsumexp(scores, sinks)).exp_()


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """In place."""
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, start: int, kind: AttentionKind, reach: Reach | None
    ) -> Tensor:
        out, lse = _forward(q, k, v, start, kind, reach)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.start, ctx.kind, ctx.reach = start, kind, reach
        return out

    @staticmethod
    def backward(ctx: Any, dout_BHNE: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        """With p the weights and t the scores after the cap: dv = pᵀ dout, dt = p · (dout vᵀ - Σ dout · out),
        ds = dt · (1 - (t / cap)²), dq = ds k · scale, dk = dsᵀ q · scale."""
        q, k, v, out, lse = ctx.saved_tensors
        kind: AttentionKind = ctx.kind
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        groups = k.shape[1]
        share = (dout_BHNE.float() * out.float()).sum(-1, keepdim=True)
        for rows, keys in _blocks(q, k, ctx.start, kind, ctx.reach):
            q_BGXD, dout_BGXE, share_BGX1, lse_BGX1 = (
                _by_group(x[:, :, rows].float(), groups) for x in (q, dout_BHNE, share, lse)
            )
            k_BGKD, v_BGKE = k[:, :, keys].float(), v[:, :, keys].float()
            t = _scores(q_BGXD, k_BGKD, rows, keys, ctx.start, kind, ctx.reach)
            p = (t - lse_BGX1).exp_()
            dv[:, :, keys] += p.transpose(-1, -2) @ dout_BGXE
            ds = p.mul_((dout_BGXE @ v_BGKE.transpose(-1, -2)).sub_(share_BGX1))
            if kind.softcap is not None:
                slope = t.div_(kind.softcap).square_().neg_().add_(1.0)
                ds.mul_(slope.nan_to_num_(nan=0.0, neginf=0.0))
            ds.mul_(kind.scale)
            dq[:, :, rows] = (ds @ k_BGKD).view(*q.shape[:2], -1, q.shape[3]).to(q.dtype)
            dk[:, :, keys] += ds.transpose(-1, -2) @ q_BGXD
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _forward(
    q_BHND: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, start: int, kind: AttentionKind, reach: Reach | None
) -> tuple[Tensor, Tensor]:
    """The attention, and log of the sum of exponentials of each row's scores, float32 [B, H, N, 1]."""
    num, heads, num_queries = q_BHND.shape[:3]
    groups = k_BGSD.shape[1]
    out = q_BHND.new_empty(num, heads, num_queries, v_BGSE.shape[3])
    lse = q_BHND.new_empty(num, heads, num_queries, 1, dtype=torch.float32)
    for rows, keys in _blocks(q_BHND, k_BGSD, start, kind, reach):
        q_BGXD = _by_group(q_BHND[:, :, rows].float(), groups)
        scores = _scores(q_BGXD, k_BGSD[:, :, keys].float(), rows, keys, start, kind, reach)
        sinks = None
        if kind.sinks_H is not None:
            sinks = kind.sinks_H.float().view(1, groups, -1, 1).repeat_interleave(rows.stop - rows.start, 2)
        lse_BGX1 = _logsumexp(scores, sinks)
        weighed = (scores.sub_(lse_BGX1)).exp_() @ v_BGSE[:, :, keys].float()
        out[:, :, rows] = weighed.view(num, heads, -1, v_BGSE.shape[3]).to(out.dtype)
        lse[:, :, rows] = lse_BGX1.view(num, heads, -1, 1)
    return out, lse


def _blocks(
    q_BHND: Tensor, k_BGSD: Tensor, start: int, kind: AttentionKind, reach: Reach | None = None
) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, and the keys that some query of the block sees. They don't depend on B."""
    heads, num_queries = q_BHND.shape[1:3]
    reaches = [seen + BLOCK_QUERIES for seen in kind.reaches if seen is not None] if reach is None else []
    num_seen = min(k_BGSD.shape[2], *reaches) if reaches else k_BGSD.shape[2]
    size = max(1, min(BLOCK_QUERIES, MAX_SCORES // (heads * num_seen)))
    for first in range(0, num_queries, size):
        last = min(first + size, num_queries)
        end = start + last if reach is None else int(reach.last[first:last].max()) + 1
        yield slice(first, last), slice(kind.first_seen(start + first), end)


def _scores(
    q_BGXD: Tensor, k_BGKD: Tensor, rows: slice, keys: slice, start: int, kind: AttentionKind, reach: Reach | None
) -> Tensor:
    """Of a block, capped and masked: [B, G, Q · M, K]."""
    num, groups, _, _ = q_BGXD.shape
    scores = capped((q_BGXD @ k_BGKD.transpose(-1, -2)).mul_(kind.scale), kind.softcap)
    at_M = torch.arange(start + rows.start, start + rows.stop, device=scores.device)[:, None]
    of_K = torch.arange(keys.start, keys.stop, device=scores.device)
    hidden_MK = of_K > (at_M if reach is None else reach.last_N[rows, None])
    unseen_MK = kind.unseen(at_M, of_K)
    if unseen_MK is not None:
        hidden_MK |= unseen_MK
    scores.view(num, groups, -1, *hidden_MK.shape).masked_fill_(hidden_MK, float("-inf"))
    return scores


def _by_group(x_BHMX: Tensor, groups: int) -> Tensor:
    """[B, H, M, ...] -> [B, G, Q · M, ...]: the rows of all query heads of a key/value head."""
    num, _, _, last = x_BHMX.shape
    return x_BHMX.reshape(num, groups, -1, last)


def _logsumexp(scores: Tensor, sinks: Tensor | None) -> Tensor:
    lse = scores.logsumexp(-1, keepdim=True)
    return lse if sinks is None else torch.logaddexp(lse, sinks)
