"""A late chunk of a prompt, masked by rows, sees what causal attention over the whole lets it see."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tinsmith.model.attention import AttentionKind
from tinsmith.model.lora import SegmentsLora
from tinsmith.sampling.contexts import PrefillContext, Segment, _late_mask
from tinsmith.sampling.kv import KVShape, PromptKV

CPU = torch.device("cpu")


@pytest.mark.parametrize(("start", "rows"), [(0, 70), (64, 64), (5, 200), (130, 1), (512, 129)])
def test_it_is_causal_attention_over_the_whole(start: int, rows: int) -> None:
    torch.manual_seed(rows)
    end = start + rows
    q, k, v = torch.randn(4, end, 16), *torch.randn(2, 2, end, 16)
    kv = PromptKV(KVShape(((2, 16),), torch.float32, CPU), end)
    kv.put(0, 0, k[:, :start], v[:, :start])
    context = PrefillContext([Segment(0, rows, start, None, kv)], CPU, torch.float32, SegmentsLora)
    found = context.attend(0, q[:, start:], k[:, start:], v[:, start:], AttentionKind(0.25))
    whole = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=0.25, enable_gqa=True)[0]
    torch.testing.assert_close(found, whole[:, start:].transpose(0, 1), atol=2e-6, rtol=1e-5)


def test_its_mask_is_small() -> None:
    kv = PromptKV(KVShape(((2, 16),), torch.float32, CPU), 1)
    mask = _late_mask(Segment(0, 512, 100_000, None, kv), CPU, torch.float32)
    assert mask is not None
    assert mask.nbytes <= 260 * 100_512
