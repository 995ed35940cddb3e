"""The kernel of paged decode attention, in Triton's interpreter, against its plain reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.lab import DEVICE
from tinsmith.model.attention import AttentionKind
from tinsmith.sampling.paged_attention import gathered_attention
from tinsmith.sampling.paged_kernel import paged_attention_kernel


@pytest.mark.parametrize("size", [16, 48, 64, 128])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 3), (8, 1)])
def test_it_is_its_reference(size: int, heads: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(size + heads)
    k, v = torch.randn(2, 12, 64, groups, size, generator=generator).to(DEVICE)
    q = torch.randn(5, heads, size, generator=generator).to(DEVICE)
    tables = torch.stack([torch.randperm(11, generator=generator)[:3] for _ in range(5)]).to(DEVICE)
    lengths = torch.tensor([1, 64, 65, 130, 192], device=DEVICE)
    expected = gathered_attention(q, k, v, tables, lengths, AttentionKind(size**-0.5))
    found = paged_attention_kernel(q, k, v, tables, lengths, AttentionKind(size**-0.5))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 64, 100, 500])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_windows_caps_and_sinks(window: int | None, softcap: float | None, has_sinks: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, 12, 64, 2, 32, generator=generator).to(DEVICE)
    q = torch.randn(5, 6, 32, generator=generator).to(DEVICE)
    tables = torch.stack([torch.randperm(11, generator=generator)[:3] for _ in range(5)]).to(DEVICE)
    lengths = torch.tensor([1, 64, 65, 130, 192], device=DEVICE)
    sinks = torch.randn(6, generator=generator).to(DEVICE) if has_sinks else None
    kind = AttentionKind(0.3, window, softcap, sinks)
    found = paged_attention_kernel(q, k, v, tables, lengths, kind)
    torch.testing.assert_close(found, gathered_attention(q, k, v, tables, lengths, kind), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 50, 64, 500])
def test_chunks(chunk: int) -> None:
    k, v = torch.randn(2, 12, 64, 2, 32, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    q = torch.ones(5, 6, 32, device=DEVICE)
    tables = torch.arange(10, device=DEVICE).view(5, 2)
    lengths = torch.tensor([1, 50, 64, 101, 128], device=DEVICE)
    kind = AttentionKind(0.3, chunk=chunk)
    found = paged_attention_kernel(q, k, v, tables, lengths, kind)
    torch.testing.assert_close(found, gathered_attention(q, k, v, tables, lengths, kind), atol=2e-6, rtol=1e-5)


def test_bfloat16_is_summed_in_float32() -> None:
    generator = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 8, 64, 2, 64, generator=generator).to(DEVICE, torch.bfloat16)
    q = torch.randn(3, 8, 64, generator=generator).to(DEVICE, torch.bfloat16)
    tables = torch.tensor([[0, 1], [2, 3], [4, 7]], device=DEVICE)
    lengths = torch.tensor([128, 70, 3], device=DEVICE)
    expected = gathered_attention(q.float(), k.float(), v.float(), tables, lengths, AttentionKind(0.125))
    found = paged_attention_kernel(q, k, v, tables, lengths, AttentionKind(0.125))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


def test_what_lies_past_the_end_is_never_looked_at() -> None:
    k, v = torch.full((2, 4, 64, 1, 16), float("nan"), device=DEVICE)
    k[1, :10], v[1, :10] = 0.5, 2.0
    tables, lengths = torch.tensor([[1, 3]], device=DEVICE), torch.tensor([10], device=DEVICE)
    found = paged_attention_kernel(torch.ones(1, 2, 16, device=DEVICE), k, v, tables, lengths, AttentionKind(0.25))
    torch.testing.assert_close(found, torch.full((1, 2, 16), 2.0, device=DEVICE))
