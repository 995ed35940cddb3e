"""Packed attention as the flash kernel is called, over its plain reference: causal, grouped heads, ragged, scaled."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.lab import DEVICE
from tinsmith.model.attention import AttentionKind
from tinsmith.training.attention import PackedAttention
from tinsmith.training.varlen import VarlenAttention, attention_for, plain_varlen

LENGTHS = [1, 7, 40, 64, 3]
SCALE = 0.3


def make_qkv(heads: int, groups: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    rows = sum(LENGTHS)
    return [
        torch.randn(rows, num, 16, device=DEVICE).transpose(0, 1).requires_grad_() for num in (heads, groups, groups)
    ]


def old_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    """The signature of torch 2.10."""
    window = (-1, 0) if is_causal else (-1, -1)
    return plain_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window, enable_gqa=True)


KINDS = {
    "plain": AttentionKind(SCALE),
    "window": AttentionKind(SCALE, window=5),
    "wide window": AttentionKind(SCALE, window=64),
    "chunk": AttentionKind(SCALE, chunk=7),
    "cap": AttentionKind(SCALE, softcap=2.0),
    "sinks": AttentionKind(SCALE, window=9, sinks_H=torch.tensor([0.5, -1.0, 2.0, 0.0], device=DEVICE)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", [plain_varlen, old_varlen])
@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (4, 4)])
def test_like_bucketed_attention(kernel, heads: int, groups: int, kind: str):
    qkv = make_qkv(heads, groups)
    dout = torch.randn(sum(LENGTHS), heads, 16, device=DEVICE)
    ours = VarlenAttention(LENGTHS, DEVICE, kernel).attend(*qkv, KINDS[kind])
    theirs = PackedAttention(LENGTHS, DEVICE).attend(*qkv, KINDS[kind])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for got, want in zip(torch.autograd.grad(ours, qkv, dout), torch.autograd.grad(theirs, qkv, dout), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_reference_is_causal_attention_of_each_sequence():
    q_HTD, k_HTD, v_HTD = make_qkv(2, 2)
    out_THD = VarlenAttention(LENGTHS, DEVICE, plain_varlen).attend(q_HTD, k_HTD, v_HTD, AttentionKind(SCALE))
    start = sum(LENGTHS[:2])
    rows = slice(start, start + LENGTHS[2])
    scores = SCALE * (q_HTD[:, rows] @ k_HTD[:, rows].transpose(1, 2))
    mask = torch.ones_like(scores, dtype=torch.bool).tril()
    want_HND = F.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ v_HTD[:, rows]
    torch.testing.assert_close(out_THD[rows], want_HND.transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_torch_has_the_kernel_under_the_names_that_are_used():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    names = list(inspect.signature(varlen.varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"window_size", "is_causal"} & set(names)


def test_a_cpu_has_bucketed_attention():
    assert attention_for(torch.device("cpu"), torch.float32) is PackedAttention
