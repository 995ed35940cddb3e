"""The GPU's LoRA backends against the plain loop in float32: ragged spans, ranks 1 to 64, odd widths, both dtypes."""

import pytest
import torch

from tests.kernels.lab import DEVICE, error, gradients, make_segments, to_float32
from tinsmith.model.lora import LoopLora, LoraBackend, Segment
from tinsmith.model.lora.grouped import GroupedLora
from tinsmith.model.lora.triton_lora import TritonLora

BACKENDS = {"grouped": GroupedLora, "triton": TritonLora}
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 1.5e-2}  # triton's interpreter cuts bfloat16 off, where a GPU rounds
SHAPES = {
    "one row each": ([(0, 1, 1), (1, 2, 1), (2, 3, 64)], 24, (40,)),
    "qkv, empty spans": ([(0, 30, 16), (30, 30, 16), (35, 103, 16), (110, 110, 8)], 64, (32, 16, 16)),
    "blocks to the row": ([(0, 64, 32), (64, 128, 32)], 128, (128,)),
    "odd widths": ([(1, 66, 3), (70, 77, 7)], 37, (41, 5)),
    "wide, two ranks": ([(0, 65, 64), (65, 130, 8)], 72, (264, 136)),
}


def cases():
    for name, (spans, inputs, widths) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            yield pytest.param(spans, inputs, widths, dtype, id=f"{name}, {str(dtype)[6:]}")


def walk(lora, x_TI, y_TO, dy_TO, dx_TI):
    kept = lora.add("g", x_TI, y_TO)
    lora.add_grads("g", x_TI, kept, dy_TO, dx_TI)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize(("spans", "inputs", "widths", "dtype"), list(cases()))
def test_against_the_loop(backend: LoraBackend, spans, inputs: int, widths, dtype: torch.dtype):
    if backend is GroupedLora and (inputs % 8 or any(width % 8 for width in widths)):
        pytest.skip("the grouped product wants strides of 16 bytes; models have them")
    torch.manual_seed(5)
    rows = spans[-1][1] + 9
    segments = make_segments(spans, inputs, widths, dtype)
    exact = to_float32(segments)
    x_TI, y_TO = (torch.randn(rows, n).to(DEVICE, dtype) for n in (inputs, sum(widths)))
    dy_TO, dx_TI = torch.randn_like(y_TO), torch.randn_like(x_TI)
    want_y, want_dx = y_TO.float(), dx_TI.float()
    walk(LoopLora(exact), x_TI.float(), want_y, dy_TO.float(), want_dx)
    untouched = [row for row in range(rows) if not any(start <= row < end for start, end, _ in spans)]
    y_before, dx_before = y_TO[untouched].clone(), dx_TI[untouched].clone()
    walk(backend(segments), x_TI, y_TO, dy_TO, dx_TI)
    assert error(y_TO, want_y) < BOUNDS[dtype]
    assert error(dx_TI, want_dx) < BOUNDS[dtype]
    assert torch.equal(y_TO[untouched], y_before)
    assert torch.equal(dx_TI[untouched], dx_before)
    for ours, theirs in zip(segments, exact, strict=True):
        for got, want in zip(gradients(ours), gradients(theirs), strict=True):
            assert got.dtype == torch.float32
            assert error(got, want) < BOUNDS[dtype]


@pytest.mark.parametrize("is_ordered", [True, False])
def test_gradients_of_a_run_in_several_spans_add_up(is_ordered: bool):
    """Two segments of one run, the second cut into pieces where the order is free."""
    torch.manual_seed(6)
    (first,) = make_segments([(0, 40, 8)], 32, (48,), torch.float32)
    shared = [first, Segment(44, 600, first.weights, first.grads, live=[(44, 60), (61, 600)])]
    (want,) = to_float32([first])
    exact = [want, Segment(44, 600, want.weights, want.grads, live=[(44, 60), (61, 600)])]
    x_TI, y_TO, dy_TO = torch.randn(600, 32), torch.randn(600, 48), torch.randn(600, 48)
    walk(LoopLora(exact), x_TI, y_TO.clone(), dy_TO, torch.zeros(600, 32))
    lora = TritonLora(shared, is_ordered=is_ordered)
    walk(lora, x_TI.to(DEVICE), y_TO.to(DEVICE), dy_TO.to(DEVICE), torch.zeros(600, 32, device=DEVICE))
    for got, expected in zip(gradients(first), gradients(want), strict=True):
        assert error(got, expected.to(DEVICE)) < 1e-6


def test_ordered_gradients_have_the_same_bits_however_a_pass_is_cut_and_whoever_is_beside():
    """Three data of one run in one pass behind a neighbour; then the first two in a pass, and the third in another."""
    torch.manual_seed(7)
    data = [(10, 81), (81, 150), (150, 170)]
    (neighbour, run) = make_segments([(0, 10, 8), (10, 170, 8)], 48, (32, 16), torch.float32)
    (alone,) = to_float32([run])
    run.live = data
    x_TI, y_TO, dy_TO = (torch.randn(170, n, device=DEVICE) for n in (48, 48, 48))
    dx_TI = torch.zeros_like(x_TI)
    walk(TritonLora([neighbour, run], is_ordered=True), x_TI, y_TO.clone(), dy_TO, dx_TI)

    for part in (data[:2], data[2:]):
        first, last = part[0][0], part[-1][1]
        live = [(start - first, end - first) for start, end in part]
        segment = Segment(0, last - first, alone.weights, alone.grads, live=live)
        rows = slice(first, last)
        own_dx_TI = torch.zeros_like(x_TI[rows])
        walk(TritonLora([segment], is_ordered=True), x_TI[rows], y_TO[rows].clone(), dy_TO[rows], own_dx_TI)
        assert torch.equal(own_dx_TI, dx_TI[rows])
    for got, want in zip(gradients(alone), gradients(run), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_the_same_segments_have_other_ranks_in_another_group(backend: LoraBackend):
    torch.manual_seed(8)
    segments = make_segments([(0, 20, 8), (20, 50, 8)], 32, (16, 16), torch.float32)
    for segment, other in zip(
        segments, make_segments([(0, 20, 16), (20, 50, 24)], 32, (16, 16), torch.float32), strict=True
    ):
        assert other.grads is not None
        segment.weights = {**segment.weights, "h": other.weights["g"]}
        segment.grads = {**(segment.grads or {}), "h": other.grads["g"]}
    exact = to_float32(segments)
    lora, loop = backend(segments), LoopLora(exact)
    for group in ("g", "h"):
        x_TI, y_TO, dy_TO, dx_TI = (torch.randn(50, 32, device=DEVICE) for _ in range(4))
        want_y, want_dx = y_TO.clone(), dx_TI.clone()
        loop.add_grads(group, x_TI, loop.add(group, x_TI, want_y), dy_TO, want_dx)
        lora.add_grads(group, x_TI, lora.add(group, x_TI, y_TO), dy_TO, dx_TI)
        assert error(y_TO, want_y) < 1e-6
        assert error(dx_TI, want_dx) < 1e-6
        for ours, theirs in zip(segments, exact, strict=True):
            assert ours.grads is not None
            assert theirs.grads is not None
            for got, want in zip(ours.grads[group].tensors, theirs.grads[group].tensors, strict=True):
                assert error(got, want) < 1e-6
