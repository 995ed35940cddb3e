"""Causal attention over packed sequences, where it's plain on torch's own kernels; padded only here, by length class.

Padding is on the right, so causality alone keeps real tokens from seeing it and no mask exists; a sequence in which
tokens see later ones, those of a picture, has a call of its own. All others of a length class go through one call;
torch's CPU kernel treats each of the batch alone, so the bits of a sequence depend on its class and not on who else is
in it.
Shape letters: T rows of the pass, P padded rows, B sequences of a class, L its length, H and G heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.model.attention import AttentionKind, Reach, block_attention, reach_of
from tinsmith.training.packing import Bucket, bucketed
from tinsmith.types import IntArray

LastSeen = Sequence[IntArray | None] | None


class PackedAttention:
    """The layout of one pass: where each of its rows goes in the padded order.

    Args:
        lengths: of the sequences, in the order of their rows; they cover all T rows.
        last_seen: of those sequences in which some tokens see later ones, see `Scene.last_seen`.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device, *, last_seen: LastSeen = None) -> None:
        places: list[Tensor] = [torch.empty(0)] * len(lengths)
        self._shapes: list[tuple[int, int]] = []
        self._reaches: list[Reach | None] = []
        ahead = last_seen or [None] * len(lengths)
        plain = [index for index, last in enumerate(ahead) if last is None]
        buckets = [
            Bucket(bucket.length, tuple(plain[member] for member in bucket.members))
            for bucket in bucketed([lengths[index] for index in plain])
        ]
        buckets += [Bucket(lengths[index], (index,)) for index, last in enumerate(ahead) if last is not None]
        base = 0
        for bucket in buckets:
            for index in bucket.members:
                places[index] = torch.arange(base, base + lengths[index])
                base += bucket.length
            self._shapes.append((len(bucket.members), bucket.length))
            self._reaches.append(reach_of(ahead[bucket.members[0]], device))
        self._num_padded = base
        self._place_T = torch.cat(places).to(device)

    def attend(self, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, kind: AttentionKind) -> Tensor:
        """[T, H, D]: each sequence attends to itself; differentiable."""
        q_s, k_s, v_s = (self._split(x.transpose(0, 1)) for x in (q_HTD, k_GTD, v_GTD))
        outs = []
        for q_BHLD, k_BGLD, v_BGLD, reach in zip(q_s, k_s, v_s, self._reaches, strict=True):
            if reach is None and kind.is_plain(q_BHLD.shape[2]):
                out_BHLD = F.scaled_dot_product_attention(
                    q_BHLD, k_BGLD, v_BGLD, is_causal=True, scale=kind.scale,
                    enable_gqa=q_BHLD.shape[1] != k_BGLD.shape[1],
                )  # fmt: skip
            else:
                out_BHLD = block_attention(q_BHLD, k_BGLD, v_BGLD, 0, kind, reach)
            outs.append(out_BHLD.transpose(1, 2).flatten(0, 1))
        out_PHD = outs[0] if len(outs) == 1 else torch.cat(outs)
        out_THD: Tensor = _Gather.apply(out_PHD, self._place_T)  # type: ignore[no-untyped-call]
        return out_THD

    def _split(self, x_THD: Tensor) -> list[Tensor]:
        """[T, H, D] -> one [B, H, L, D] a length class."""
        x_PHD: Tensor = _Scatter.apply(x_THD, self._place_T, self._num_padded)  # type: ignore[no-untyped-call]
        parts = torch.split(x_PHD, [num * length for num, length in self._shapes])
        return [
            part.view(*shape, *part.shape[1:]).transpose(1, 2) for part, shape in zip(parts, self._shapes, strict=True)
        ]


class _Scatter(torch.autograd.Function):
    """out[place[i]] = x[i], zero elsewhere. Its own node: index_copy would make a gradient for the zeros too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place_T: Tensor, num_padded: int) -> Tensor:
        ctx.place_T = place_T
        return x.new_zeros(num_padded, *x.shape[1:]).index_copy_(0, place_T, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.place_T), None, None


class _Gather(torch.autograd.Function):
    """out[i] = x[place[i]]. Its own node since no place comes twice: a copy, where index_select would add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place_T: Tensor) -> Tensor:
        ctx.place_T, ctx.num_padded = place_T, x.shape[0]
        return x.index_select(0, place_T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.new_zeros(ctx.num_padded, *grad.shape[1:]).index_copy_(0, ctx.place_T, grad), None
