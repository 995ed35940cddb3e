"""Causal attention over packed sequences on an NVIDIA GPU: one flash kernel for sequences of any lengths, unpadded.

The interface is that of `attention.PackedAttention`, which takes its place where there is no such kernel.
Shape letters: T rows of the pass, S sequences, H and G heads, D head size.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import structlog
import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.model.attention import AttentionKind
from tinsmith.model.lora.tables import to_device
from tinsmith.training.attention import LastSeen, PackedAttention
from tinsmith.training.packing import pieces

log = structlog.get_logger("tinsmith.worker")

MIN_CAPABILITY = (8, 0)  # of torch's flash kernels
VarlenKernel = Callable[..., Any]


class Attention(Protocol):
    """Attention of one pass."""

    def attend(self, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, kind: AttentionKind) -> Tensor: ...


class AttentionMaker(Protocol):
    def __call__(self, lengths: Sequence[int], device: torch.device, *, last_seen: LastSeen = None) -> Attention: ...


class VarlenAttention:
    """The layout of one pass: where its sequences begin.

    Args:
        lengths: of the sequences, in the order of their rows; they cover all T rows.
        kernel: torch's varlen_attn, or `plain_varlen`.
        last_seen: as of `PackedAttention`, which computes all of a pass that has some.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device,
        kernel: VarlenKernel,
        *,
        last_seen: LastSeen = None,
    ) -> None:
        starts = np.cumsum([0, *lengths], dtype=np.int32)
        self._starts = to_device(starts, device)
        self._longest = max(lengths)
        self._kernel = kernel
        self._lengths, self._device, self._last_seen = lengths, device, last_seen
        self._is_causal = not any(last is not None for last in last_seen or ())
        self._padded: PackedAttention | None = None  # for what the kernel can't do
        self._by_chunk: dict[int, VarlenAttention] = {}
        self._accepted = frozenset(inspect.signature(kernel).parameters)

    def attend(self, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, kind: AttentionKind) -> Tensor:
        """[T, H, D]: each sequence attends to itself; differentiable."""
        if kind.chunk is not None and kind.chunk < self._longest:
            return self._of_chunks(kind.chunk).attend(q_HTD, k_GTD, v_GTD, replace(kind, chunk=None))
        is_within = kind.window is None or kind.window >= self._longest
        can = self._is_causal and kind.is_masked_only and (is_within or "window_size" in self._accepted)
        if not can:
            self._padded = self._padded or PackedAttention(self._lengths, self._device, last_seen=self._last_seen)
            return self._padded.attend(q_HTD, k_GTD, v_GTD, kind)
        q_THD, k_TGD, v_TGD = (x.transpose(0, 1) for x in (q_HTD, k_GTD, v_GTD))
        options: dict[str, Any] = {}
        if "window_size" in self._accepted:  # torch 2.12 and later spell causality so
            options["window_size"] = (-1 if kind.window is None or is_within else kind.window - 1, 0)
        else:
            options["is_causal"] = True
        if "enable_gqa" in self._accepted:
            options["enable_gqa"] = q_HTD.shape[0] != k_GTD.shape[0]
        if "scale" in self._accepted:
            options["scale"] = kind.scale
        else:
            q_THD = q_THD * (kind.scale * q_THD.shape[-1] ** 0.5)
        starts, longest = self._starts, self._longest
        out_THD: Tensor = self._kernel(q_THD, k_TGD, v_TGD, starts, starts, longest, longest, **options)
        return out_THD

    def _of_chunks(self, size: int) -> VarlenAttention:
        """Chunks see nothing of one another: each is a sequence of its own."""
        if size not in self._by_chunk:
            parts = [end - start for length in self._lengths for start, end in pieces(length, size)]
            self._by_chunk[size] = VarlenAttention(parts, self._device, self._kernel)
        return self._by_chunk[size]


def plain_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What varlen_attn computes, sequence by sequence: its reference."""
    starts = cu_seq_q.tolist()
    outs = []
    for start, end in pairwise(starts):
        q_HND, k_GND, v_GND = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        seen_NN = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device)
        if window_size[1] == 0:
            seen_NN = seen_NN.tril_()
        if window_size[0] >= 0:
            seen_NN = seen_NN.triu_(-window_size[0])
        out_HND = F.scaled_dot_product_attention(
            q_HND, k_GND, v_GND, attn_mask=seen_NN, scale=scale, enable_gqa=enable_gqa
        )[0]
        outs.append(out_HND.transpose(0, 1))
    return torch.cat(outs)


@lru_cache
def attention_for(device: torch.device, dtype: torch.dtype) -> AttentionMaker:
    """The attention of passes on a device. Where a GPU has no flash kernel for this dtype the log says so, once."""
    if device.type != "cuda":
        return PackedAttention
    kernel = _find_kernel()
    lacks = [
        *(["torch has no varlen_attn"] if kernel is None else []),
        *([f"it has no {dtype} kernel"] if dtype not in (torch.bfloat16, torch.float16) else []),
        *(["the GPU is older than Ampere"] if torch.cuda.get_device_capability(device) < MIN_CAPABILITY else []),
    ]
    if kernel is None or lacks:
        log.warning("attention is padded by length class, not packed", device=str(device), because=", ".join(lacks))
        return PackedAttention
    return partial(VarlenAttention, kernel=kernel)


def _find_kernel() -> VarlenKernel | None:
    try:
        found: VarlenKernel = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        return None
    return found
