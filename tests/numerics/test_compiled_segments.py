"""The compiled program for adapters of training passes, against torch's products and against itself."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Sequence
from itertools import chain

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from tests.numerics.compiled_lab import assert_is_found_out
from tinsmith.model.lora import LoopLora, LoraBackend, LoraWeights, Segment, SegmentsLora
from tinsmith.model.lora import compiled_segments as subject
from tinsmith.model.lora.choice import compiled as compiled_for
from tinsmith.model.lora.compiled_segments import PROGRAM

SHAPES = {"one": (64, (24,)), "three": (136, (32, 16, 8)), "wide": (520, (1032, 8)), "ragged": (13, (9,))}
RANKS = (8, 16, 16, 24, 8, 40)
SPANS = ((1, 2), (2, 9), (9, 9), (10, 90), (90, 285), (285, 300))
LIVE = (((1, 2),), ((3, 4), (4, 4), (6, 9)), (), ((10, 90),), ((91, 170), (171, 285)), ())
ROWS = 303


@pytest.fixture
def backend(kernel) -> LoraBackend:
    return functools.partial(subject.CompiledSegments, kernel)


def weights_of(rank: int, generator: torch.Generator | None) -> dict[str, LoraWeights]:
    """Each matrix begins at another place of its cache line."""

    def made(*shape: int) -> Tensor:
        count = shape[0] * shape[1]
        flat = torch.zeros(count + 3) if generator is None else torch.randn(count + 3, generator=generator)
        return flat[3:].view(shape)

    return {
        group: LoraWeights(
            made(rank * len(widths), inputs),
            tuple(made(width, rank) for width in widths),
            tuple(2.0 / rank * (1 + layer) for layer in range(len(widths))),
        )
        for group, (inputs, widths) in SHAPES.items()
    }


def segments() -> list[Segment]:
    generator = torch.Generator().manual_seed(0)
    return [
        Segment(start, end, weights_of(rank, generator), weights_of(rank, None), live)
        for rank, (start, end), live in zip(RANKS, SPANS, LIVE, strict=True)
    ]


def computed(backend: LoraBackend, group: str, chosen: Sequence[Segment]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """y and dx; the gradients of each segment."""
    inputs, widths = SHAPES[group]
    generator = torch.Generator().manual_seed(1)
    x, y, dy, dx = (torch.randn(ROWS, n, generator=generator) for n in (inputs, sum(widths), sum(widths), inputs))
    lora = backend(chosen)
    kept = lora.add(group, x, y)
    for again, before in zip(lora.keep(group, x), kept, strict=True):
        assert torch.equal(again, before)
    lora.add_grads(group, x, kept, dy, dx)
    return [y, dx], [list(own.grads[group].tensors) for own in chosen if own.grads is not None]


@pytest.mark.parametrize("group", SHAPES)
def test_numbers_are_those_of_torchs_products(backend, group):
    (found, own), (right, right_own) = (computed(each, group, segments()) for each in (backend, SegmentsLora))
    for a, b in zip([*found, *chain(*own)], [*right, *chain(*right_own)], strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_odd_shapes_go_by_torch_and_the_others_by_the_program(backend):
    lora = backend(segments())
    assert isinstance(lora, subject.CompiledSegments)
    assert not any(isinstance(crowd, subject._CompiledCrowd) for crowd in lora._of("ragged"))
    assert all(isinstance(crowd, subject._CompiledCrowd) for crowd in lora._of("wide"))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_segment_has_the_same_bits_whatever_is_beside_it(backend, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    together, own = computed(backend, "wide", segments())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for index, segment in enumerate(segments()):
        alone, (grads,) = computed(backend, "wide", [segment])
        rows = slice(segment.start, segment.end)
        for a, b in zip([*alone, *grads], [*together, *own[index]], strict=True):
            assert torch.equal(a[rows], b[rows]) if len(a) == ROWS else torch.equal(a, b)


@pytest.mark.parametrize("shared", ["all", "A", "B"])
def test_segments_that_share_gradients_add_to_them_in_their_order(backend, shared, monkeypatch):
    """As data of one run do in deterministic mode, and experts that share a factor."""

    def sharing() -> list[Segment]:
        first, *others = (own for own in segments() if own.weights["wide"].rank == 8)
        assert first.grads is not None
        for other in others:
            assert other.grads is not None
            other.grads = {
                group: LoraWeights(
                    first.grads[group].a_KI if shared != "B" else other.grads[group].a_KI,
                    first.grads[group].bs if shared != "A" else other.grads[group].bs,
                )
                for group in SHAPES
            }
        return [first, *others]

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    _, (found, *_) = computed(backend, "wide", sharing())
    one_by_one = sharing()
    for segment in one_by_one:
        _, (right,) = computed(backend, "wide", [segment])
    first_grads = one_by_one[0].grads
    assert first_grads is not None
    right = list(first_grads["wide"].tensors)
    kept = {"all": slice(None), "A": slice(1), "B": slice(1, None)}[shared]
    assert all(torch.equal(a, b) for a, b in zip(found[kept], right[kept], strict=True))


def test_rows_of_nobody_and_numbers_beyond_a_matrix_are_left_alone(backend):
    """Around each matrix lies what isn't a number."""
    room = torch.full((20_000,), torch.nan)
    at = 5

    def inner(*shape: int) -> Tensor:
        nonlocal at
        view = room[at : at + shape[0] * shape[1]].view(shape)
        view.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(at)))
        at += shape[0] * shape[1] + 7
        return view

    weights, grads = (LoraWeights(inner(32, 40), (inner(24, 16), inner(8, 16)), (1.0, 2.0)) for _ in range(2))
    x, y, dy, dx = inner(20, 40), inner(20, 32), inner(20, 32), inner(20, 40)
    before = room.clone()
    lora = backend([Segment(3, 17, {"": weights}, {"": grads}, [(4, 9), (12, 17)])])
    lora.add_grads("", x, lora.add("", x, y), dy, dx)
    assert torch.equal(room.isnan(), before.isnan())
    changed = (room != before) & ~before.isnan()
    for tensor, rows in ((y, range(3, 17)), (dx, (*range(4, 9), *range(12, 17)))):
        first = tensor.data_ptr() - room.data_ptr()
        own = changed[first // 4 : first // 4 + tensor.numel()].view(tensor.shape).any(1)
        assert set(own.nonzero().flatten().tolist()) == set(rows)


def test_without_a_compiler_torch_serves_and_the_log_says_why_once(not_asked_for, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with capture_logs() as logs:
        assert compiled_for(LoopLora) is LoopLora
        assert not logs
        assert compiled_for(SegmentsLora) is SegmentsLora
        assert compiled_for(SegmentsLora) is SegmentsLora
    (said,) = [line for line in logs if line["event"] == PROGRAM.slower]
    assert "install one" in said["because"]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("s * crowd->num_layers + l", "0"),
        ("first *= CHUNK;", "first = 0, l = 0, before = 0;"),
        ("n += DEEP", "n += 2 * DEEP"),
    ],
)
def test_a_program_that_computes_something_else_is_found_out(kernel, monkeypatch, tmp_path, right, wrong):
    assert_is_found_out(PROGRAM, monkeypatch, tmp_path, right, wrong)


def test_the_source_is_part_of_the_package():
    assert importlib.resources.files("tinsmith.model.lora").joinpath("segments_kernel.c").is_file()
