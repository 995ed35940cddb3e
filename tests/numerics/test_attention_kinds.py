"""Attention in blocks of queries, with windows, caps and sinks, against the formulas written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tinsmith.model import attention
from tinsmith.model.attention import AttentionKind, block_attention

SINKS = torch.tensor([0.7, -2.0, 3.0, 0.0])
CASES = {
    "plain": (AttentionKind(0.3), 0),
    "window": (AttentionKind(0.3, window=7), 0),
    "window of one": (AttentionKind(0.3, window=1), 0),
    "cap": (AttentionKind(0.3, softcap=1.5), 0),
    "chunk": (AttentionKind(0.3, chunk=24), 0),
    "chunk, later rows": (AttentionKind(0.3, chunk=150), 130),
    "sinks": (AttentionKind(0.3, sinks_H=SINKS), 0),
    "all of it, later rows": (AttentionKind(0.3, window=150, softcap=3.0, sinks_H=SINKS), 130),
}


def written_out(q: Tensor, k: Tensor, v: Tensor, start: int, kind: AttentionKind) -> Tensor:
    heads, groups, size = q.shape[1], k.shape[1], k.shape[2]
    k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * kind.scale
    if kind.softcap is not None:
        scores = kind.softcap * torch.tanh(scores / kind.softcap)
    at, of = torch.arange(start, size)[:, None], torch.arange(size)
    hidden = of > at
    if kind.window is not None:
        hidden = hidden | (at - of >= kind.window)
    if kind.chunk is not None:
        hidden = hidden | (at // kind.chunk != of // kind.chunk)
    scores = scores.masked_fill(hidden, float("-inf"))
    if kind.sinks_H is not None:
        sinks = kind.sinks_H.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    return scores.softmax(-1)[..., :size] @ v


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("most", [2**25, 4 * 40 * 430])
def test_value_and_gradient(case: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where blocks are made smaller, so that scores stay within their bound."""
    monkeypatch.setattr(attention, "MAX_SCORES", most)
    kind, start = CASES[case]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 300, 16, generator=generator, requires_grad=True)
    k = torch.randn(2, 2, 300 + start, 16, generator=generator, requires_grad=True)
    v = torch.randn(2, 2, 300 + start, 24, generator=generator, requires_grad=True)
    dout = torch.randn(2, 4, 300, 24, generator=generator)
    ours = block_attention(q, k, v, start, kind)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    theirs = written_out(*exact, start, kind)
    torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=3e-6)
    for one, other in zip(
        torch.autograd.grad(ours, (q, k, v), dout), torch.autograd.grad(theirs, exact, dout.double()), strict=True
    ):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_memory_is_linear_in_the_length() -> None:
    """A window's scores are those of what it sees, and no number of positions makes a block larger."""
    kind = AttentionKind(0.3, window=64)
    q = torch.randn(1, 2, 20_000, 8)
    blocks = list(attention._blocks(q, q, 0, kind))
    assert max(keys.stop - keys.start for _, keys in blocks) < 64 + attention.BLOCK_QUERIES
    assert [rows.stop for rows, _ in blocks][-1] == 20_000
