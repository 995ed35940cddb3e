"""A run beside wild neighbours: its numbers are those of the run alone, to the bit; its time grows with the tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.numerics.lab import assert_same_bits, assert_same_result, datum, item, spec
from tests.numerics.sampling_lab import assert_same_sample, prompt, sample
from tinsmith.bases.catalog import describe, parse
from tinsmith.config import Settings
from tinsmith.torch_engine import TorchEngine
from tinsmith.types import AdamParams, Failure, OpId, OptimItem, RunId, TrainItem

STEPS = 4
VOCAB = 256
WILD = AdamParams(learning_rate=1e3, weight_decay=10.0)
CALM = AdamParams(learning_rate=1e-2, weight_decay=0.01, grad_clip_norm=1.0)
MAX_COST = 1.6  # CPU time a token of many runs, over that of one run with as many tokens


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return TorchEngine(describe(parse("tinsmith/tiny")), Settings(threads=1, deterministic=True))


def compute(engine: TorchEngine, items: Sequence[TrainItem]) -> tuple[list[Any], list[Any]]:
    """Outcomes in the order of `items`, and the samples that ended between the packs."""
    order = sorted(range(len(items)), key=lambda i: (items[i].run_id, items[i].seq_id))
    training_pass = engine.start_pass([items[i] for i in order])
    ended: list[Any] = []
    while training_pass.advance(400) is not None:
        ended += engine.step_samples()
    outcomes = dict(zip(order, training_pass.commit(), strict=True))
    return [outcomes[i] for i in range(len(items))], ended


def own_items(step: int) -> list[TrainItem]:
    rng = np.random.default_rng(step)
    calm = item("m", [datum(rng, n, vocab=VOCAB) for n in (40, 17)], 3 * step)
    rl = item("m", [datum(rng, 33, "importance_sampling", vocab=VOCAB)], 3 * step + 1, "importance_sampling")
    return [calm, rl]


def wild_items(step: int) -> list[TrainItem]:
    """Runs on both sides of `m` in the pass: long sequences, and requests whose loss is NaN or infinite."""
    rng = np.random.default_rng(1000 + step)
    items = [item(name, [datum(rng, n, vocab=VOCAB) for n in (300, 5, 120)], 2 * step) for name in ("a", "z")]
    for name, poison in (("a", np.nan), ("z", np.inf)):
        bad = datum(rng, 60, "importance_sampling", vocab=VOCAB)
        bad.inputs["advantages"][7] = poison
        items.append(item(name, [bad], 2 * step + 1, "importance_sampling"))
    return items


def live(engine: TorchEngine, *, beside: bool) -> tuple[list[Any], list[Any], list[Any], Any]:
    """Results of passes, optimizer steps and samples of the run `m`, and its state at the end."""
    names = ("a", "m", "z") if beside else ("m",)
    for index, name in enumerate(names):
        engine.create_run(spec(name, rank=(16, 8, 32)[index] if beside else 8, seed=5))
    results, steps, samples = [], [], []
    for step in range(STEPS):
        engine.add_adapter(f"m{step}-{beside}", engine.export_run(RunId("m"), ("param",)))
        if beside:
            engine.add_adapter(f"z{step}", engine.export_run(RunId("z"), ("param",)))
            for n in range(6):
                engine.submit_sample(
                    sample(f"wild{n}", prompt(n, 20 + 30 * n, VOCAB), f"z{step}", 3, seed=n, max_tokens=40)
                )
        own = replace(
            sample("own", prompt(step, 30, VOCAB), seed=step, num_samples=2, max_tokens=12), adapter=f"m{step}-{beside}"
        )
        engine.submit_sample(own)
        items = own_items(step)
        together, ended = compute(engine, items + (wild_items(step) if beside else []))
        results += together[: len(items)]
        if beside:
            assert all(isinstance(failed, Failure) for failed in together[-2:])
        optim = [OptimItem(OpId("o-m"), RunId("m"), CALM)]
        if beside:
            optim = [OptimItem(OpId("o-a"), RunId("a"), WILD), *optim, OptimItem(OpId("o-z"), RunId("z"), WILD)]
        outcomes = engine.optim_step(optim)
        steps.append(outcomes[1 if beside else 0])
        while engine.num_samples:
            ended += engine.step_samples()
        samples += [result for op_id, result in ended if op_id == "own"]
    state = engine.export_run(RunId("m"))
    if beside:
        wild = engine.export_run(RunId("z"), ("param",)).tensors.values()
        assert max(np.abs(tensor).max() for tensor in wild) > 100  # it did go wild
    for name in names:
        engine.drop_run(RunId(name))
    return results, steps, samples, state


def test_a_run_beside_wild_neighbours_has_the_bits_of_the_run_alone(engine):
    alone, beside = live(engine, beside=False), live(engine, beside=True)
    for one, other in zip(alone[0], beside[0], strict=True):
        assert_same_result(one, other)
    assert [s.metrics for s in alone[1]] == [s.metrics for s in beside[1]]
    assert len(alone[2]) == STEPS
    for one, other in zip(alone[2], beside[2], strict=True):
        assert_same_sample(one, other)
    assert alone[3].step == beside[3].step == STEPS
    assert_same_bits(alone[3].tensors, beside[3].tensors)


def cpu_s(engine: TorchEngine, items: Sequence[TrainItem]) -> float:
    started = time.process_time()
    training_pass = engine.start_pass(items)
    while training_pass.advance(10**6) is not None:
        pass
    training_pass.commit()
    return time.process_time() - started


@pytest.mark.alone
def test_twenty_neighbours_cost_time_in_proportion_to_their_tokens(engine):
    """The best of several interleaved measurements of CPU time; one run with as many tokens is the measure."""
    rng = np.random.default_rng(0)
    data = [datum(rng, 32 + n, vocab=VOCAB) for n in range(21)]
    names = [f"r{n:02}" for n in range(21)]
    for name in names:
        engine.create_run(spec(name, rank=16))
    many = [item(name, [d]) for name, d in zip(names, data, strict=True)]
    one = [item("r00", data)]
    first = [item("r00", data[:1])]
    costs: dict[str, list[float]] = {"many": [], "one": [], "first": []}
    for _ in range(4):
        for key, items in (("many", many), ("one", one), ("first", first)):
            costs[key].append(cpu_s(engine, items))
    for name in names:
        engine.drop_run(RunId(name))
    best = {key: min(values) for key, values in costs.items()}
    share = sum(d.num_tokens for d in data) / data[0].num_tokens
    assert best["many"] < MAX_COST * best["one"]
    assert best["many"] < share * best["first"]
