"""Where kernels are tested, and segments of random adapters in random rows."""

from __future__ import annotations

import torch
from torch import Tensor

from tinsmith.model.lora import LoraWeights, Segment

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # without a GPU: triton's interpreter
Spans = list[tuple[int, int, int]]  # start, end, rank


def weights_in_a_row(inputs: int, widths: tuple[int, ...], rank: int, dtype: torch.dtype, fill: float) -> LoraWeights:
    """A group's matrices as views of one row, as a run has them; fill: their spread, 0 for zeros."""
    num_a = rank * len(widths) * inputs
    row_P = (fill * torch.randn(num_a + rank * sum(widths))).to(DEVICE, dtype)
    bs, offset = [], num_a
    for width in widths:
        bs.append(row_P[offset : offset + rank * width].view(width, rank))
        offset += rank * width
    return LoraWeights(row_P[:num_a].view(-1, inputs), tuple(bs), tuple(2.0 + layer for layer in range(len(bs))))


def make_segments(spans: Spans, inputs: int, widths: tuple[int, ...], dtype: torch.dtype) -> list[Segment]:
    """One run a span, all rows live."""
    made = []
    for start, end, rank in spans:
        weights = {"g": weights_in_a_row(inputs, widths, rank, dtype, inputs**-0.5)}
        grads = {"g": weights_in_a_row(inputs, widths, rank, torch.float32, 0.0)}
        made.append(Segment(start, end, weights, grads, live=[(start, end)] if end > start else []))
    return made


def to_float32(segments: list[Segment]) -> list[Segment]:
    """The same adapters in float32, with gradients of their own."""
    made = []
    for segment in segments:
        weights = {
            name: LoraWeights(w.a_KI.float(), tuple(b_OR.float() for b_OR in w.bs), w.scales)
            for name, w in segment.weights.items()
        }
        grads = {
            name: LoraWeights(torch.zeros_like(w.a_KI), tuple(torch.zeros_like(b_OR) for b_OR in w.bs))
            for name, w in weights.items()
        }
        made.append(Segment(segment.start, segment.end, weights, grads, live=segment.live))
    return made


def gradients(segment: Segment) -> list[Tensor]:
    assert segment.grads is not None
    grads = segment.grads["g"]
    return [grads.a_KI, *grads.bs]


def error(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm."""
    theirs = theirs.double()
    return float((ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-12))
