"""The compiled program for adapters of sampled rows, against torch's products and against itself."""

from __future__ import annotations

import gc
import importlib.resources
import os
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from tests.numerics.compiled_lab import assert_is_found_out
from tests.numerics.sampling_lab import make_sampler, mixed_states, prompt, run_all, sample
from tinsmith.errors import UnsupportedError
from tinsmith.machine import compiled
from tinsmith.model.lora import LoraWeights
from tinsmith.sampling import compiled_lora
from tinsmith.sampling.compiled_lora import PROGRAM, CompiledLora
from tinsmith.sampling.lora import Adapter, DecodeLora
from tinsmith.sampling.tiled_lora import TileGroup

GROUPS = {
    "one": TileGroup(0, 64, (32,)),
    "three": TileGroup(1, 40, (32, 16, 8)),
    "ragged": TileGroup(2, 13, (9, 1, 18)),
    "lm_head": TileGroup(3, 64, (1001,)),
}
RANKS = (1, 4, 7, 8, 12, 16, 24, 32, 33)


@pytest.fixture
def make(kernel) -> Callable[..., CompiledLora]:
    def made(threads: int = 1, *, is_exact: bool = True) -> CompiledLora:
        return CompiledLora(kernel, GROUPS, threads, is_exact=is_exact)

    return made


def adapter(seed: int, rank: int, names: tuple[str, ...] = (*GROUPS,)) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter.holding(
        {
            name: LoraWeights(
                torch.randn(len(group.widths) * rank, group.inputs, generator=generator) * 0.1,
                tuple(torch.randn(outputs, rank, generator=generator) for outputs in group.widths),
                tuple((32 + layer) / rank for layer in range(len(group.widths))),
            )
            for name, group in GROUPS.items()
            if name in names
        },
        {},
    )


def crowd() -> list[Adapter]:
    """Of many ranks, each third without some groups, and one without any."""
    names = ((*GROUPS,), ("one", "lm_head"), ("three", "ragged"))
    return [*(adapter(index, rank, names[index % 3]) for index, rank in enumerate(RANKS)), adapter(99, 8, ())]


def arrays(count: int, group: TileGroup, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y, as views whose rows are further apart than they are wide."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (
        torch.randn(count, width + 3, generator=generator)[:, :width] for width in (group.inputs, sum(group.widths))
    )
    return x, y


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("is_exact", [True, False])
def test_every_row_gets_its_own_adapter_and_nobody_else_is_touched(make, threads, is_exact):
    lora, reference, adapters = make(threads, is_exact=is_exact), DecodeLora(torch.device("cpu"), is_exact), crowd()
    generator = torch.Generator().manual_seed(1)
    for count in (1, 5, 12, 40, 3, 0, 7, 150, 2):
        chosen = [int(i) for i in torch.randint(0, len(adapters) + 1, (count,), generator=generator)]
        rows = [None if index == len(adapters) else adapters[index] for index in chosen]
        for each in (lora, reference):
            each.arrange(rows)
        for name, group in GROUPS.items():
            x, y = arrays(count + 4, group, count)
            found, expected = y.clone(), y.clone()
            lora.add(name, x, found)
            reference.add(name, x, expected)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            idle = [
                row for row in range(count + 4) if row >= count or rows[row] is None or name not in rows[row].matrices
            ]
            assert torch.equal(found[idle], y[idle])
        lora.add("another layer", x, y)


def test_one_adapter_for_all_rows(make):
    lora, own = make(is_exact=False), adapter(0, 16)
    for count in (1, compiled_lora.MOST_SOLE_ROWS, compiled_lora.MOST_SOLE_ROWS + 1):
        lora.arrange([own] * count)
        assert (lora._sole is not None) == (count > compiled_lora.MOST_SOLE_ROWS)
        for name, group in GROUPS.items():
            x, y = arrays(count + 2, group, count)
            expected = y.clone()
            own.add(name, x[:count], expected[:count])
            lora.add(name, x, y)
            torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_has_the_same_bits_whatever_is_beside_it(make, threads):
    lora, adapters = make(threads), crowd()
    owners = [adapters[index % len(adapters)] for index in range(64)]
    for name, group in GROUPS.items():
        x, y = arrays(len(owners), group, 5)
        together = y.clone()
        lora.arrange(owners)
        lora.add(name, x, together)
        for row in (0, 3, 17, 40, 63):
            alone = y[row : row + 1].clone()
            lora.arrange([owners[row]])
            lora.add(name, x[row : row + 1].clone(), alone)
            assert torch.equal(alone, together[row : row + 1])


def test_no_number_beyond_a_matrix_is_read(make):
    """Matrices, inputs and outputs that end where the process's memory may end, with what isn't a number around."""
    group, rank = GROUPS["ragged"], 7
    room = torch.full((4096,), torch.nan)
    at = 8

    def inner(*shape: int) -> torch.Tensor:
        nonlocal at
        count = int(np.prod(shape))
        view = room[at : at + count].view(shape)
        view.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(at)))
        at += count + 8
        return view

    a_KI = inner(3 * rank, group.inputs)
    weights = LoraWeights(a_KI, tuple(inner(width, rank) for width in group.widths), (1.0, 2.0, 3.0))
    x, y = inner(2, group.inputs), inner(2, sum(group.widths))
    own = Adapter.holding({"ragged": weights}, {})
    expected = y.clone()
    own.add("ragged", x, expected)
    lora = make()
    lora.arrange([own, own])
    nans = room.isnan()
    lora.add("ragged", x, y)
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(room.isnan(), nans)


def test_an_adapter_that_is_not_a_number_spoils_its_own_rows_alone(make):
    lora, good, bad = make(), adapter(0, 12), adapter(1, 12)
    for weights in bad.matrices.values():
        weights.a_KI.fill_(torch.nan)
    lora.arrange([good, bad, good, None])
    for name, group in GROUPS.items():
        x, y = arrays(4, group, 2)
        lora.add(name, x, y)
        assert y[[0, 2, 3]].isfinite().all()
        assert y[1].isnan().all()


def test_an_adapter_that_left_the_batch_is_not_kept(make):
    lora = make()
    made = [adapter(index, 8) for index in range(2)]
    left = weakref.ref(made[0])
    lora.arrange(made)
    lora.arrange([])
    del made
    gc.collect()
    assert left() is None


def test_samples_are_those_of_torchs_products(base):
    states = mixed_states(base, 6)
    items = [sample(f"r{i}", prompt(i, 9 + i), f"a{i % 6}", seed=i, max_tokens=12) for i in range(9)]
    for deterministic in (False, True):
        ways = [
            make_sampler(base, states, compiled_adapters=is_compiled, deterministic=deterministic)
            for is_compiled in (True, False)
        ]
        kinds = [type(way._walker.decoder._lora) for way in ways]
        assert kinds == [CompiledLora, DecodeLora]
        found, expected = (run_all(way, items) for way in ways)
        for key, result in expected.items():
            for one, other in zip(found[key].sequences, result.sequences, strict=True):
                np.testing.assert_array_equal(one.tokens, other.tokens)
                np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cause", ["compiler", "folder", "processor", "numbers"])
def test_where_the_program_cannot_be_had_torch_serves_and_the_log_says_why_once(
    not_asked_for, base, monkeypatch, tmp_path, cause
):
    if cause == "compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif cause == "folder":
        (tmp_path / "file").write_text("", encoding="utf-8")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif cause == "processor":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    else:
        monkeypatch.setattr(PROGRAM, "_agrees", lambda kernel: False)
    with capture_logs() as logs:
        samplers = [make_sampler(base, mixed_states(base, 2)) for _ in range(2)]
    said = [line["because"] for line in logs if line["event"] == PROGRAM.slower]
    cures = {
        "compiler": "install one",
        "folder": "set XDG_CACHE_HOME",
        "processor": "AVX2",
        "numbers": "another C comp",
    }
    assert len(said) == 1
    assert cures[cause] in said[0]
    assert {type(each._walker.decoder._lora) for each in samplers} == {DecodeLora}
    assert len(run_all(samplers[0], [sample("s", prompt(1, 9), "a1", max_tokens=3)])) == 1


def test_the_setting_turns_it_off_without_a_word(not_asked_for, base, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("nothing is to be compiled")

    monkeypatch.setattr(compiled, "load", never)
    with capture_logs() as logs:
        sampler = make_sampler(base, mixed_states(base, 1), compiled_adapters=False)
    assert type(sampler._walker.decoder._lora) is DecodeLora
    assert not [line for line in logs if line["event"] == PROGRAM.slower]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("scales[s * scales_stride + l]", "scales[0]"),
        ("return _mm256_add_ps(even, odd);", "return even;"),
        ("own.rows[t] * y_stride", "own.rows[0] * y_stride"),
    ],
)
def test_a_program_that_computes_something_else_is_found_out(kernel, monkeypatch, tmp_path, right, wrong):
    assert_is_found_out(PROGRAM, monkeypatch, tmp_path, right, wrong)


def test_the_source_is_part_of_the_package():
    assert importlib.resources.files("tinsmith.sampling").joinpath("compiled_kernel.c").is_file()


def test_a_broken_compiler_costs_no_start(not_asked_for, base, monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UnsupportedError):
        PROGRAM.load()
    sampler = make_sampler(base, mixed_states(base, 1))
    assert type(sampler._walker.decoder._lora) is DecodeLora
