"""Each LoRA backend against the formula under autograd, on ragged segments of mixed ranks and targets."""

import pytest
import torch
from torch import Tensor

from tinsmith.model.lora import LoopLora, LoraBackend, LoraWeights, Segment, SegmentsLora
from tinsmith.model.lora.compiled_segments import compiled_segments

BACKENDS = {"loop": LoopLora, "segments": SegmentsLora}
INPUTS = 40
WIDTHS = {"q": (24, 16, 16), "o": (40,)}
SPANS = [(0, 5, 4), (5, 6, 8), (8, 40, 8), (40, 57, 3), (57, 60, 16)]  # start, end, rank; 6..8 and 60..64 are nobody's
ROWS = 64


@pytest.fixture(params=[*BACKENDS, "compiled"])
def backend(request: pytest.FixtureRequest) -> LoraBackend:
    made = BACKENDS.get(request.param) or compiled_segments()
    if made is None:
        pytest.skip("needs a C compiler and AVX2")
    return made


def weights_of(rank: int, *, zero: bool = False) -> dict[str, LoraWeights]:
    def make(*shape: int) -> Tensor:
        return torch.zeros(shape) if zero else torch.randn(shape)

    return {
        group: LoraWeights(
            make(rank * len(widths), INPUTS),
            tuple(make(width, rank) for width in widths),
            tuple(2.0 / rank * (1 + layer) for layer in range(len(widths))),
        )
        for group, widths in WIDTHS.items()
    }


def make_segments() -> list[Segment]:
    made = []
    for index, (start, end, rank) in enumerate(SPANS):
        grads = None if index == 3 else weights_of(rank, zero=True)
        segment = Segment(start, end, weights_of(rank), grads)
        segment.live = [(10, 20), (25, 40)] if index == 2 else [(start, end)]
        made.append(segment)
    made[4].weights = {"q": made[4].weights["q"]}
    return made


def expected(segment: Segment, group: str, x_TI: Tensor, dy_TO: Tensor) -> tuple[Tensor, ...]:
    """y and dx of the segment's rows, then dA and the dBs, by autograd in float64."""
    rows = slice(segment.start, segment.end)
    weights = segment.weights[group]
    a_KI = weights.a_KI.double().requires_grad_()
    bs = [b_OR.double().requires_grad_() for b_OR in weights.bs]
    x_NI = x_TI[rows].double().requires_grad_()
    u_NK = x_NI @ a_KI.T
    layers = zip(weights.scales, u_NK.split(weights.rank, 1), bs, strict=True)
    y_NO = torch.cat([scale * (u @ b.T) for scale, u, b in layers], 1)
    live_N1 = torch.zeros(len(x_NI), 1, dtype=torch.float64)
    for start, end in segment.live:
        live_N1[start - segment.start : end - segment.start] = 1
    return (y_NO.detach(), *torch.autograd.grad(y_NO, [x_NI, a_KI, *bs], dy_TO[rows].double() * live_N1))


@pytest.mark.parametrize("group", WIDTHS)
def test_forward_and_backward(backend: LoraBackend, group: str):
    torch.manual_seed(3)
    segments = make_segments()
    x_TI, y_TO = torch.randn(ROWS, INPUTS), torch.randn(ROWS, sum(WIDTHS[group]))
    dy_TO, dx_TI = torch.randn_like(y_TO), torch.randn_like(x_TI)
    y_before, dx_before = y_TO.clone(), dx_TI.clone()
    lora = backend(segments)
    kept = lora.add(group, x_TI, y_TO)
    for again, before in zip(lora.keep(group, x_TI), kept, strict=True):
        torch.testing.assert_close(again, before)
    lora.add_grads(group, x_TI, kept, dy_TO, dx_TI)
    want_y, want_dx = y_before.double(), dx_before.double()
    for segment in segments:
        if group not in segment.weights:
            continue
        y, dx, da, *dbs = expected(segment, group, x_TI, dy_TO)
        want_y[segment.start : segment.end] += y
        if segment.grads is not None:
            want_dx[segment.start : segment.end] += dx
            torch.testing.assert_close(segment.grads[group].a_KI.double(), da, rtol=1e-5, atol=1e-4)
            for got, want in zip(segment.grads[group].bs, dbs, strict=True):
                torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(y_TO.double(), want_y, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dx_TI.double(), want_dx, rtol=1e-5, atol=1e-4)


def test_rows_that_are_not_live_may_hold_anything(backend: LoraBackend):
    """A request that failed left infinite rows: they reach no gradient of the same run."""
    torch.manual_seed(3)
    segments = make_segments()
    x_TI, y_TO = torch.randn(ROWS, INPUTS), torch.randn(ROWS, 56)
    lora = backend(segments)
    kept = lora.add("q", x_TI, y_TO)
    dead = x_TI.clone()
    dead[20:25] = float("inf")
    lora.add_grads("q", dead, kept, torch.randn_like(y_TO), dx_TI=torch.zeros_like(x_TI))
    grads = segments[2].grads
    assert grads is not None
    assert torch.isfinite(grads["q"].a_KI).all()


def test_without_gradients_nothing_is_kept(backend: LoraBackend):
    segments = make_segments()
    for segment in segments:
        segment.grads = None
    assert backend(segments).add("q", torch.randn(ROWS, INPUTS), torch.randn(ROWS, 56)) == ()


def test_a_segment_without_live_rows_gets_no_gradients_and_its_neighbours_get_theirs(backend: LoraBackend):
    torch.manual_seed(3)
    segments = make_segments()
    segments[1].live = []
    x_TI, dy_TO = torch.randn(ROWS, INPUTS), torch.randn(ROWS, 56)
    dx_TI = torch.zeros_like(x_TI)
    lora = backend(segments)
    lora.add_grads("q", x_TI, lora.add("q", x_TI, torch.randn(ROWS, 56)), dy_TO, dx_TI)
    for index in (1, 2):
        grads = segments[index].grads
        assert grads is not None
        _, dx, da, *_ = expected(segments[index], "q", x_TI, dy_TO)
        torch.testing.assert_close(grads["q"].a_KI.double(), da, rtol=1e-5, atol=1e-4)
        rows = slice(segments[index].start, segments[index].end)
        torch.testing.assert_close(dx_TI[rows].double(), dx, rtol=1e-5, atol=1e-4)
