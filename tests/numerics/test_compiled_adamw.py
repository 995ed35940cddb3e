"""The compiled program for optimizer steps: bits, pieces, what isn't finite, and where it can't be had.

`test_slots.py` compares it with torch.optim.AdamW.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterator

import pytest
import torch
from structlog.testing import capture_logs

from tests.numerics.compiled_lab import assert_is_found_out
from tests.numerics.lab import CPU
from tinsmith.machine import compiled
from tinsmith.model import LinearInfo, RowLayout
from tinsmith.training import compiled_adamw
from tinsmith.training.compiled_adamw import PROGRAM, WHOLE_PARAMS, Kernel, compiled_steps
from tinsmith.training.full_model import FullLayout
from tinsmith.training.optimizer import optim_steps
from tinsmith.training.runs import RunSlot
from tinsmith.training.steps import full_steps_for, optim_steps_for
from tinsmith.types import AdamParams, Failure, OptimResult, RunId, RunSpec, Targets

SIZES = ((7, 1), (33, 17), (300, 500), (64, 9), (2000, 3000))  # inputs and outputs; the last has several blocks
PARAMS = tuple(
    AdamParams(0.01 * (1 + n), beta1=0.9 - 0.1 * n, beta2=0.95, weight_decay=0.1 * n, grad_clip_norm=2.0 * (n % 2))
    for n in range(len(SIZES))
)


@pytest.fixture
def threads() -> Iterator[None]:
    usual = torch.get_num_threads()
    yield
    torch.set_num_threads(usual)


def make_slot(number: int) -> RunSlot:
    layout = RowLayout([LinearInfo("l", "attn", *SIZES[number], "l")], Targets(), 5)
    return with_gradients(
        RunSlot.fresh(RunSpec(RunId(f"r{number}"), "base", 5, number, Targets()), layout, CPU), number
    )


def with_gradients(slot: RunSlot, seed: int) -> RunSlot:
    slot.rows["grad"] = torch.randn(slot.layout.num_params, generator=torch.Generator().manual_seed(seed))
    return slot


def rows_of(slot: RunSlot) -> list[torch.Tensor]:
    return [slot.rows[part].clone() for part in ("param", "m", "v")]


def test_bits_depend_on_nothing_beside_a_run(kernel: Kernel, monkeypatch: pytest.MonkeyPatch, threads: None) -> None:
    """Alone and among others, in any order, by any number of threads, each run whole or shared among them."""
    found: list[list[torch.Tensor]] = []
    for num_threads, order, whole in ((1, (0, 1, 2, 3, 4), 0), (2, (4, 2, 0, 3, 1), 2**22), (3, (3, 1, 4, 0), 1000)):
        torch.set_num_threads(num_threads)
        monkeypatch.setattr(compiled_adamw, "WHOLE_PARAMS", whole)
        slots = {number: make_slot(number) for number in order}
        for step in range(2):
            for number, slot in slots.items():
                with_gradients(slot, 10 * step + number)
            compiled_steps(kernel, list(slots.values()), [PARAMS[number] for number in order])
        found.append([row for number in (0, 1, 3, 4) for row in rows_of(slots[number])])
        for number, slot in slots.items():
            alone = make_slot(number)
            for step in range(2):
                compiled_steps(kernel, [with_gradients(alone, 10 * step + number)], [PARAMS[number]])
            for one, other in zip(rows_of(slot), rows_of(alone), strict=True):
                assert torch.equal(one, other)
    for again in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], again, strict=True))


def test_what_no_step_goes_over_stays(kernel: Kernel) -> None:
    """The weights of a full run's tower, which count in the norm as they do without the program."""
    layout = FullLayout({"model.a": (5, 7), "model.visual.b": (40,), "model.c": (20_000,)})
    spec = RunSpec(RunId("full"), "base", 0)
    ours, theirs = (
        with_gradients(RunSlot(spec, layout, {"param": torch.linspace(-1, 1, layout.num_params)}, 0), 1)
        for _ in range(2)
    )
    own = AdamParams(0.01, weight_decay=0.1, grad_clip_norm=1.0)
    before = ours.rows["param"].clone()
    (found,), (expected,) = compiled_steps(kernel, [ours], [own]), optim_steps([theirs], [own])
    assert isinstance(found, OptimResult)
    assert isinstance(expected, OptimResult)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-6)
    tower = slice(35, 75)
    assert torch.equal(ours.rows["param"][tower], before[tower])
    assert not ours.rows["m"][tower].any()
    for one, other in zip(rows_of(ours), rows_of(theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_run_whose_gradients_are_not_finite_is_left_alone(kernel: Kernel, bad: float) -> None:
    """Neither are those whose squares aren't: moments of them would stay infinite for ever."""
    slots = [make_slot(number) for number in range(3)]
    slots[1].rows["grad"][-1] = bad
    before = slots[1].rows["param"].clone()
    outcomes = compiled_steps(kernel, slots, PARAMS[:3])
    assert [type(outcome) for outcome in outcomes] == [OptimResult, Failure, OptimResult]
    assert [slot.step for slot in slots] == [1, 0, 1]
    assert ["grad" in slot.rows for slot in slots] == [False, True, False]
    assert torch.equal(slots[1].rows["param"], before)
    assert slots[1].rows.keys() == {"param", "grad"}
    assert isinstance(optim_steps([slots[1]], PARAMS[1:2])[0], Failure)


def test_passes_in_another_dtype_see_the_new_parameters(kernel: Kernel) -> None:
    layout = RowLayout([LinearInfo("l", "attn", 33, 17, "l")], Targets(), 5, torch.bfloat16)
    slot = with_gradients(RunSlot.fresh(RunSpec(RunId("r"), "base", 5), layout, CPU), 0)
    before = slot.compute_P.clone()
    compiled_steps(kernel, [slot], [AdamParams(0.1)])
    assert not torch.equal(slot.compute_P, before)
    assert torch.equal(slot.compute_P, slot.rows["param"].bfloat16())


def test_no_runs(kernel: Kernel) -> None:
    assert compiled_steps(kernel, [], []) == []


def test_a_long_norm_is_exact(kernel: Kernel) -> None:
    layout = FullLayout({"a": (WHOLE_PARAMS + 3,)})
    slot = with_gradients(
        RunSlot(RunSpec(RunId("r"), "base", 0), layout, {"param": torch.zeros(layout.num_params)}, 0), 0
    )
    norm = float(slot.rows["grad"].double().norm())
    (outcome,) = compiled_steps(kernel, [slot], [AdamParams()])
    assert isinstance(outcome, OptimResult)
    assert outcome.metrics["grad_norm"] == pytest.approx(norm, rel=1e-12)


def test_where_the_program_cannot_be_had_torch_steps_and_the_log_says_why_once(
    not_asked_for, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with capture_logs() as logs:
        found = [optim_steps_for(CPU), full_steps_for(CPU)]
    assert found == [optim_steps, optim_steps]
    (said,) = [line["because"] for line in logs if line["event"] == PROGRAM.slower]
    assert "install one" in said


def test_the_setting_turns_it_off_without_a_word(not_asked_for: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("nothing is to be compiled")

    monkeypatch.setattr(compiled, "load", never)
    with capture_logs() as logs:
        assert optim_steps_for(CPU, may_compile=False) is optim_steps
    assert not logs


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("n->clip / (norm + CLIP_EPS)", "1.0"),
        ("_mm256_fmadd_ps(f.beta2, *v,", "_mm256_fmadd_ps(f.beta1, *v,"),
        ("for (; i < num; i += LANES)", "for (; i < num; i += num)"),
        ("_mm256_maskstore_ps(r.m + i, rest, m);", ""),
        ("if (!isfinite(norm)) return norm;", ""),
    ],
)
def test_a_program_that_computes_something_else_is_found_out(kernel, monkeypatch, tmp_path, right, wrong) -> None:
    assert_is_found_out(PROGRAM, monkeypatch, tmp_path, right, wrong)


def test_the_source_is_part_of_the_package() -> None:
    assert importlib.resources.files("tinsmith.training").joinpath("adamw.c").is_file()
