"""Paged decode attention in Triton: one program for each sequence and key/value head, block after block of its table.

Softmax is computed as it goes (Milakov and Gimelshein 2018, arXiv 1805.02867): the largest score so far, the sum of
exponentials relative to it, and the weighted sum of values are rescaled when a larger score comes. Scores and sums
are float32, whatever the dtype of the pool. Importing this needs triton, and where there is no GPU TRITON_INTERPRET=1
set before; the interpreter multiplies bfloat16 as float32 (3.7.1 takes it for integers).
Shape letters: see `paged_attention`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinsmith.model.attention import AttentionKind

MIN_QUERIES = 16  # rows of a product on tensor cores


def paged_attention_kernel(
    q_NHD: Tensor, k_PKGD: Tensor, v_PKGD: Tensor, tables_NB: Tensor, lengths_N: Tensor, kind: AttentionKind
) -> Tensor:
    """See `paged_attention.paged_attention`."""
    num, heads, size = q_NHD.shape
    groups, per_group = k_PKGD.shape[2], heads // k_PKGD.shape[2]
    q_NHD = q_NHD.contiguous()
    out_NHD = torch.empty_like(q_NHD)
    sinks_H = q_NHD if kind.sinks_H is None else kind.sinks_H.contiguous()
    _attend[(num, groups)](
        q_NHD, k_PKGD, v_PKGD, tables_NB, lengths_N, out_NHD, kind.scale, sinks_H, tables_NB.stride(0),
        k_PKGD.stride(0), k_PKGD.stride(1), k_PKGD.stride(2), heads, per_group, kind.window or 0,
        kind.chunk or 0, kind.softcap or 0.0,
        SIZE=size, BLOCK_K=k_PKGD.shape[1], BLOCK_Q=max(MIN_QUERIES, triton.next_power_of_2(per_group)),
        BLOCK_D=triton.next_power_of_2(size),
        HAS_WINDOW=kind.window is not None,
        HAS_CHUNK=kind.chunk is not None, HAS_CAP=kind.softcap is not None, HAS_SINKS=kind.sinks_H is not None,
        BY_HAND=k_PKGD.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,
    )  # fmt: skip
    return out_NHD


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, out_ptr, scale, sink_ptr, table_stride, block_stride, token_stride,
    head_stride, heads, per_group, window, chunk, cap, SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CHUNK: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    sequence, group = tl.program_id(0), tl.program_id(1)
    length = tl.load(length_ptr + sequence)
    queries, columns, tokens = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    at = (sequence * heads + group * per_group + queries[:, None]) * SIZE + columns[None, :]
    is_query = (queries[:, None] < per_group) & (columns[None, :] < SIZE)
    q = tl.load(q_ptr + at, mask=is_query, other=0.0)
    if BY_HAND:
        q = q.to(tl.float32)
    if HAS_SINKS:  # a key whose value is zero, seen before all others
        head = group * per_group + queries
        largest = tl.load(sink_ptr + head, mask=queries < per_group, other=0.0).to(tl.float32)
        total = tl.full([BLOCK_Q], 1.0, tl.float32)
    else:
        largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(length - window, 0)
    if HAS_CHUNK:
        first = tl.maximum(first, (length - 1) // chunk * chunk)
    out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for index in range(first // BLOCK_K, tl.cdiv(length, BLOCK_K)):
        block = tl.load(table_ptr + sequence * table_stride + index)
        is_seen = (index * BLOCK_K + tokens < length) & (index * BLOCK_K + tokens >= first)
        inner = tokens[:, None] * token_stride + group * head_stride + columns[None, :]
        is_there = is_seen[:, None] & (columns[None, :] < SIZE)
        k = tl.load(k_ptr + block * block_stride + inner, mask=is_there, other=0.0)
        v = tl.load(v_ptr + block * block_stride + inner, mask=is_there, other=0.0)
        if BY_HAND:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee").to(tl.float32) * scale
        if HAS_CAP:
            folded = tl.exp(-2.0 * tl.abs(scores / cap))  # tanh |x| = (1 - e^-2|x|) / (1 + e^-2|x|)
            bent = cap * (1.0 - folded) / (1.0 + folded)
            scores = tl.where(scores < 0.0, -bent, bent)
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - new_largest)
        weights = tl.exp(scores - new_largest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee").to(tl.float32)
        largest = new_largest
    tl.store(out_ptr + at, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_query)
