"""torch's packed flash attention against its plain reference, forward and backward, in bfloat16."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.lab import DEVICE, error
from tinsmith.model.attention import AttentionKind
from tinsmith.training.attention import PackedAttention
from tinsmith.training.varlen import VarlenAttention, attention_for, plain_varlen

LENGTHS = [1, 7, 130, 64, 1000, 3]


@pytest.mark.parametrize(("heads", "groups"), [(8, 2), (4, 4)])
def test_like_its_reference(heads: int, groups: int):
    torch.manual_seed(1)
    exact = [torch.randn(sum(LENGTHS), n, 64, device=DEVICE).transpose(0, 1) for n in (heads, groups, groups)]
    narrow = [x.to(torch.bfloat16).requires_grad_() for x in exact]
    wide = [x.detach().float().requires_grad_() for x in narrow]
    dout_THD = torch.randn(sum(LENGTHS), heads, 64, device=DEVICE)
    made = attention_for(DEVICE, torch.bfloat16)(LENGTHS, DEVICE)
    assert not isinstance(made, PackedAttention), "this GPU has no flash attention for packed sequences"
    ours = made.attend(*narrow, AttentionKind(0.125))
    theirs = VarlenAttention(LENGTHS, DEVICE, plain_varlen).attend(*wide, AttentionKind(0.125))
    assert error(ours, theirs) < 1e-2
    got = torch.autograd.grad(ours, narrow, dout_THD.to(torch.bfloat16))
    for one, other in zip(got, torch.autograd.grad(theirs, wide, dout_THD), strict=True):
        assert error(one, other) < 2e-2
