"""Attention of one token of each sequence over its pages: a plain reference, and a kernel where there is a GPU.

Shape letters: N sequences, H query heads, G key/value heads, Q query heads of one key/value head, D head size, P
blocks of the pool, K tokens of a block, B blocks of a table, W = B · K.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PagedAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


def paged_attention(
    q_NHD: Tensor, k_PKGD: Tensor, v_PKGD: Tensor, tables_NB: Tensor, lengths_N: Tensor, scale: float
) -> Tensor:
    """softmax(q kᵀ · scale) v over the first `lengths_N` (int64, at least 1) positions of each table, [N, H, D]."""
    if q_NHD.device.type == "cuda":
        kernel: PagedAttention = importlib.import_module("tinsmith.sampling.paged_kernel").paged_attention_kernel
        return kernel(q_NHD, k_PKGD, v_PKGD, tables_NB, lengths_N, scale)
    return gathered_attention(q_NHD, k_PKGD, v_PKGD, tables_NB, lengths_N, scale)


def gathered_attention(
    q_NHD: Tensor, k_PKGD: Tensor, v_PKGD: Tensor, tables_NB: Tensor, lengths_N: Tensor, scale: float
) -> Tensor:
    """The reference: pages are gathered, and what lies past a sequence's end is masked."""
    num, heads, size = q_NHD.shape
    groups = k_PKGD.shape[2]
    k_NGWD, v_NGWD = (pool[tables_NB].flatten(1, 2).transpose(1, 2) for pool in (k_PKGD, v_PKGD))
    seen_NW = torch.arange(k_NGWD.shape[2], device=q_NHD.device) < lengths_N[:, None]
    q_NGQD = q_NHD.reshape(num, groups, heads // groups, size)
    mask = seen_NW[:, None, None].expand(num, 1, heads // groups, -1)
    out_NGQD = F.scaled_dot_product_attention(q_NGQD, k_NGWD, v_NGWD, attn_mask=mask, scale=scale)
    return out_NGQD.reshape(num, heads, size)
