"""Attention of one token of each sequence over its pages: a plain reference, and a kernel where there is a GPU.

Shape letters: N sequences, H query heads, G key/value heads, Q query heads of one key/value head, D head size, P
blocks of the pool, K tokens of a block, B blocks of a table, W = B · K.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from tinsmith.model.attention import AttentionKind, masked_attention

PagedAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, AttentionKind], Tensor]


def paged_attention(
    q_NHD: Tensor, k_PKGD: Tensor, v_PKGD: Tensor, tables_NB: Tensor, lengths_N: Tensor, kind: AttentionKind
) -> Tensor:
    """[N, H, D]: attention as `kind` says over the first `lengths_N` (int64, at least 1) positions of each table."""
    if q_NHD.device.type == "cuda":
        kernel: PagedAttention = importlib.import_module("tinsmith.sampling.paged_kernel").paged_attention_kernel
        return kernel(q_NHD, k_PKGD, v_PKGD, tables_NB, lengths_N, kind)
    return gathered_attention(q_NHD, k_PKGD, v_PKGD, tables_NB, lengths_N, kind)


def gathered_attention(
    q_NHD: Tensor, k_PKGD: Tensor, v_PKGD: Tensor, tables_NB: Tensor, lengths_N: Tensor, kind: AttentionKind
) -> Tensor:
    """The reference: pages are gathered, and what lies past a sequence's end is masked."""
    num, heads, size = q_NHD.shape
    groups = k_PKGD.shape[2]
    k_NGWD, v_NGWD = (pool[tables_NB].flatten(1, 2).transpose(1, 2) for pool in (k_PKGD, v_PKGD))
    columns_W = torch.arange(k_NGWD.shape[2], device=q_NHD.device)
    seen_NW = columns_W < lengths_N[:, None]
    unseen_NW = kind.unseen(lengths_N[:, None] - 1, columns_W)
    if unseen_NW is not None:
        seen_NW &= ~unseen_NW
    q_NGQD = q_NHD.reshape(num, groups, heads // groups, size)
    hidden_NW = torch.zeros(seen_NW.shape, dtype=q_NHD.dtype, device=q_NHD.device)
    mask = hidden_NW.masked_fill_(~seen_NW, float("-inf"))[:, None, None].expand(num, 1, heads // groups, -1)
    out_NGQD = masked_attention(q_NGQD, k_NGWD, v_NGWD, mask, kind)
    return out_NGQD.reshape(num, heads, size)
