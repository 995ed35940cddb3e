"""Running out of memory anywhere in a pass: smaller packs, the same bits, and only what can't fit fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.numerics.custom_losses import ppo_with_kl
from tests.numerics.lab import assert_same_bits, assert_same_result, datum, grads, item, make_trainer, run_pass, spec
from tests.numerics.test_custom_losses import custom, random_data
from tinsmith.config import Settings
from tinsmith.errors import NoMemoryError
from tinsmith.model import BaseModel, RowLayout
from tinsmith.model.peak import PeakMeter
from tinsmith.training import Trainer, graph, runs, training_pass
from tinsmith.training.budget import Budget
from tinsmith.training.context import TrainingContext
from tinsmith.training.head import Head
from tinsmith.training.runs import RunSlot
from tinsmith.training.shortage import is_out_of_memory
from tinsmith.types import AdamParams, Failure, OpId, OptimItem, RunId, RunState, Targets, TrainItem

RUNS = (spec("a", 8, seed=1), spec("b", 32, Targets(mlp=False), seed=2), spec("c", 4, seed=3))
LENGTHS = {"a": (30, 7, 21, 55), "b": (40, 12), "c": (64, 33, 9)}
ERRORS: tuple[Callable[[], BaseException], ...] = (
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError,
)
PLACES = {
    "inputs": (training_pass, "load_inputs"),
    "forward": (BaseModel, "hidden"),
    "head": (Head, "run"),
    "backward": (TrainingContext, "add_lora_grad"),
}


def mixed_items(seed: int = 5) -> list[TrainItem]:
    """Two requests of each run, of which one is a forward alone."""
    rng = np.random.default_rng(seed)
    items = [item(run, [datum(rng, n) for n in lengths], seq=1) for run, lengths in LENGTHS.items()]
    items.append(item("b", [datum(rng, 25, "gspo")], seq=2, loss="gspo"))
    items.append(item("c", [datum(rng, 19)], seq=2, backward=False))
    return sorted(items, key=lambda one: (one.run_id, one.seq_id))


def begun(base: BaseModel) -> Trainer:
    """Runs that have gradients already."""
    trainer = make_trainer(base, *RUNS)
    run_pass(trainer, mixed_items(seed=4))
    return trainer


@pytest.fixture
def shortage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Lets the calls number `at` of a place fail, after they did their work."""

    def arm(place: str, at: Sequence[int], error: Callable[[], BaseException]) -> list[int]:
        owner, name = PLACES[place]
        original = getattr(owner, name)
        failed: list[int] = []
        calls = iter(range(10**6))

        def short(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            number = next(calls)
            if number in at:
                failed.append(number)
                raise error()
            return result

        monkeypatch.setattr(owner, name, short)
        return failed

    return arm


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A memory that holds so many tokens, and with activation checkpointing so many, at some place of the pass."""

    def limit(kept: int, recomputed: int, place: str = "forward") -> None:
        owner, name = PLACES[place]
        original = getattr(owner, name)

        def bounded(*args: Any, **given: Any) -> Any:
            rows = next(len(one) for one in args if isinstance(one, torch.Tensor))
            if (place != "forward" or torch.is_grad_enabled()) and rows > (
                recomputed if given.get("recompute") else kept
            ):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return original(*args, **given)

        monkeypatch.setattr(owner, name, bounded)

    return limit


def assert_undisturbed(base: BaseModel, trainer: Trainer, results: Sequence[Any]) -> None:
    """What was computed is, to the bit, what a trainer with memory in plenty computes."""
    reference = begun(base)
    for one, other in zip(results, run_pass(reference, mixed_items()), strict=True):
        assert_same_result(one, other)
    for run in RUNS:
        assert_same_bits(grads(trainer, run.run_id), grads(reference, run.run_id))


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
@pytest.mark.parametrize("place", PLACES)
def test_the_first_pack(base: BaseModel, shortage: Any, place: str, error: Any) -> None:
    trainer = begun(base)
    failed = shortage(place, [0], error)
    results = run_pass(trainer, mixed_items())
    assert failed == [0]
    assert_undisturbed(base, trainer, results)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("at", [[3], [2, 3]], ids=str)
def test_later_packs(base: BaseModel, shortage: Any, place: str, at: list[int]) -> None:
    """Data of a pack that was cut, of requests that began in an earlier one, and of a backward that was half done."""
    trainer = begun(base)
    failed = shortage(place, at, ERRORS[0])
    results = run_pass(trainer, mixed_items(), 80)
    assert failed == at
    assert_undisturbed(base, trainer, results)


def test_between_the_packs_of_another_pass(base: BaseModel, shortage: Any) -> None:
    """Two passes take turns; memory runs out in both, and neither notices that of the other."""
    trainer = begun(base)
    failed = shortage("backward", [20, 60], ERRORS[0])
    items = mixed_items()
    passes = [trainer.start_pass([one for one in items if (one.run_id == "a") is is_a]) for is_a in (True, False)]
    while not all(one.is_computed for one in passes):
        for one in passes:
            one.advance(50)
    assert len(failed) == 2
    results = [result for one in passes for result in one.commit()]
    assert_undisturbed(base, trainer, results)


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_request_beyond_the_memory_runs_over_several_packs(base: BaseModel, small_memory: Any, place: str) -> None:
    """The bound falls until packs fit, and all bits are as in one pack."""
    trainer = begun_small(base)
    small_memory(70, 70, place)
    begun_pass = trainer.start_pass(mixed_items())
    packs = []
    while (stats := begun_pass.advance(10**6)) is not None:
        packs.append(stats.num_tokens)
    assert 5 <= len(packs) < 20
    assert max(packs) <= 70
    assert_undisturbed(base, trainer, begun_pass.commit())


def test_a_sequence_alone_is_recomputed(base: BaseModel, small_memory: Any) -> None:
    trainer = begun_small(base)
    small_memory(40, 70)
    assert_undisturbed(base, trainer, run_pass(trainer, mixed_items()))


def begun_small(base: BaseModel) -> Trainer:
    trainer = make_trainer(base, *RUNS)
    run_pass(trainer, mixed_items(seed=4), 1)
    return trainer


def test_only_what_does_not_fit_alone_fails(base: BaseModel, small_memory: Any) -> None:
    """By name, with its cure; its request adds nothing, whatever of it was computed, and the others don't notice."""
    rng = np.random.default_rng(9)
    long = item("b", [datum(rng, 20), datum(rng, 120), datum(rng, 20)], seq=0)
    trainer = begun_small(base)
    small_memory(60, 100)
    items = sorted([*mixed_items(), long], key=lambda one: (one.run_id, one.seq_id))
    results = run_pass(trainer, items)
    failure = results.pop(items.index(long))
    assert isinstance(failure, Failure)
    assert (failure.code, failure.category) == ("out_of_memory", "user")
    assert "datum 1" in failure.message
    assert "120 tokens" in failure.message
    assert_undisturbed(base, trainer, results)


def test_without_checkpointing_such_a_sequence_fails(base: BaseModel, small_memory: Any) -> None:
    trainer = make_trainer(base, RUNS[0])
    trainer.budget = Budget(Settings(activation_checkpointing="never"), torch.device("cpu"))
    small_memory(60, 10**6)
    outcomes = run_pass(trainer, [item("a", [datum(np.random.default_rng(0), n)], seq=n) for n in (50, 70)])
    assert [isinstance(one, Failure) for one in outcomes] == [False, True]


def test_at_the_start_of_a_pass(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the copies of the accumulated gradients: what isn't needed is given back, and it is tried once more."""
    trainer = begun(base)
    clone = torch.Tensor.clone
    errors = iter([ERRORS[1]()])

    def runs_out_once(self: torch.Tensor) -> torch.Tensor:
        for one in errors:
            raise one
        return clone(self)

    monkeypatch.setattr(torch.Tensor, "clone", runs_out_once)
    assert_undisturbed(base, trainer, run_pass(trainer, mixed_items()))
    assert next(errors, None) is None


CALLS: dict[str, tuple[Any, str, Callable[[Trainer, RunState], Any]]] = {
    "start_pass": (torch.Tensor, "clone", lambda trainer, _: trainer.start_pass(mixed_items())),
    "create_run": (runs, "init_row", lambda trainer, _: trainer.create_run(spec("d"))),
    "import_run": (RowLayout, "tensors_to_row", lambda trainer, state: trainer.import_run(RUNS[0], state)),
    "optim_step": (RunSlot, "fill_rows", lambda trainer, _: trainer.optim_step([step_of("a")])),
}


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
@pytest.mark.parametrize("call", CALLS)
def test_where_nothing_can_be_cut_it_says_so(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, call: str, error: Callable[[], BaseException]
) -> None:
    """The worker is told that memory was lacking, which is nobody's fault, and tries again later."""
    trainer = begun(base)
    state = trainer.export_run(RUNS[0].run_id)
    owner, name, act = CALLS[call]

    def runs_out(*_: Any, **__: Any) -> Any:
        raise error()

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, runs_out)
        with pytest.raises(NoMemoryError, match="again later"):
            act(trainer, state)
    assert_undisturbed(base, trainer, run_pass(trainer, mixed_items()))


def step_of(run: str) -> OptimItem:
    return OptimItem(OpId(f"{run}-step"), RunId(run), AdamParams(learning_rate=0.1))


@pytest.mark.parametrize("place", ["forward", "head", "backward"])
def test_what_the_failed_pack_held_is_free_before_the_next_try(
    deep_base: BaseModel, shortage: Any, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """torch keeps the graph of a backward that failed until the next one."""
    trainer = make_trainer(deep_base, RUNS[0])
    items = [item("a", [datum(np.random.default_rng(0), 256) for _ in range(4)])]
    run_pass(trainer, items)
    held: list[int] = []
    reclaim = training_pass.reclaim
    shortage(place, [20 if place == "backward" else 0], ERRORS[0])
    with PeakMeter() as meter:
        monkeypatch.setattr(training_pass, "reclaim", lambda: (reclaim(), held.append(meter.now)))
        run_pass(trainer, items)
    deep_base.num_forwards = 0
    assert len(held) == 1
    assert held[0] < 0.05 * meter.peak


def test_another_error_is_no_lack_of_memory(base: BaseModel, shortage: Any) -> None:
    trainer = begun(base)
    before = grads(trainer, "a")
    failed = shortage("backward", [3], lambda: RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        run_pass(trainer, mixed_items())
    assert failed == [3]
    assert_same_bits(before, grads(trainer, "a"))


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "python"])
def test_a_custom_loss_that_runs_out_is_not_to_blame(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]
) -> None:
    """Its values are bounded, so others have taken the memory: the pass begins again, with the same result."""
    data = random_data(np.random.default_rng(1), ppo_with_kl)
    calm, short = make_trainer(base, RUNS[0]), make_trainer(base, RUNS[0])
    (reference,) = run_pass(calm, [custom("a", data, ppo_with_kl)])
    checked = graph._checked
    errors = iter([error()])

    def runs_out_once(value: Any) -> Any:
        for one in errors:
            raise one
        return checked(value)

    monkeypatch.setattr(graph, "_checked", runs_out_once)
    (result,) = run_pass(short, [custom("a", data, ppo_with_kl)])
    assert_same_result(result, reference)
    assert_same_bits(grads(short, "a"), grads(calm, "a"))


def test_the_bound_grows_back_slowly(base: BaseModel, small_memory: Any) -> None:
    """A shortage that has gone leaves no trace after some packs; meanwhile each is a little larger than the last."""
    trainer = make_trainer(base, RUNS[0])
    trainer.budget = Budget(Settings(pass_max_tokens=200), torch.device("cpu"))
    budget = trainer.budget
    rng = np.random.default_rng(0)
    items = [item("a", [datum(rng, 10) for _ in range(20)])]
    with pytest.MonkeyPatch.context() as patch:
        hidden = BaseModel.hidden
        small_memory(80, 200)
        run_pass(trainer, items, budget.tokens)
        patch.setattr(BaseModel, "hidden", hidden)
        bounds = [budget.tokens]
        assert bounds[0] < 100
        while budget.tokens < 200:
            begun_pass = trainer.start_pass(items)
            while begun_pass.advance(budget.tokens) is not None:
                assert budget.tokens <= 1.2 * bounds[-1] + 1
                bounds.append(budget.tokens)
            begun_pass.commit()
    assert 5 < len(bounds) < 200
    assert bounds == sorted(bounds)


def test_which_errors_are_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
