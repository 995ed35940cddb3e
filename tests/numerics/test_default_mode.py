"""Without `deterministic`: data of a run are computed together, and what shares a pass moves rounding alone."""

import numpy as np
import pytest
import torch

from tests.numerics.lab import CPU, datum, grads, item, make_base, make_trainer, relative, run_pass, spec
from tests.numerics.test_bits import RUNS, requests
from tests.numerics.test_training import RL, spoiled
from tinsmith.model import BaseModel
from tinsmith.training import Trainer, losses
from tinsmith.training.attention import PackedAttention
from tinsmith.training.context import TrainingContext
from tinsmith.types import AdamParams, Datum, Failure, OpId, OptimItem, RunSpec

BOUND = 1e-5


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def free(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """A base that is not deterministic."""
    return make_base(request.param, tmp_path_factory.mktemp(request.param), deterministic=False)


def trainer_of(base: BaseModel, *specs) -> Trainer:
    return make_trainer(base, *specs, deterministic=False)


def assert_near(one: Trainer, other: Trainer, run: str) -> None:
    expected = grads(other, run)
    for name, gradient in grads(one, run).items():
        assert relative(gradient, torch.from_numpy(expected[name])) < BOUND, name


def test_a_run_among_others_is_within_rounding_of_the_run_alone(free):
    items = requests()
    together = trainer_of(free, *RUNS)
    results = run_pass(together, items)
    for run in RUNS:
        alone = trainer_of(free, run)
        own = [i for i in items if i.run_id == run.run_id]
        mine = [result for i, result in zip(items, results, strict=True) if i in own]
        for result, expected in zip(mine, run_pass(alone, own), strict=True):
            for logprobs, others in zip(result.logprobs, expected.logprobs, strict=True):
                np.testing.assert_allclose(logprobs, others, rtol=0, atol=BOUND)
        assert_near(together, alone, run.run_id)


@pytest.mark.parametrize("cuts", [1, 40, (40, 1, 90)])
def test_where_a_pass_is_cut_moves_rounding_alone(free, cuts):
    items = requests()
    whole, cut = trainer_of(free, *RUNS), trainer_of(free, *RUNS)
    for one, other in zip(run_pass(whole, items), run_pass(cut, items, cuts), strict=True):
        assert one.metrics["loss:sum"] == pytest.approx(other.metrics["loss:sum"], rel=BOUND, abs=1e-3)
    for run in RUNS:
        assert_near(whole, cut, run.run_id)


def test_weights_that_are_computed_again_in_other_company_are_within_rounding(free):
    """As after a crash: from the state after the first of four steps, alone, and with passes that are cut elsewhere."""
    run = RUNS[0]
    first, again = trainer_of(free, *RUNS), trainer_of(free, run)
    for step in range(4):
        items = [item(one.run_id, datums(one, step), step) for one in RUNS]
        run_pass(first, items)
        if step:
            run_pass(again, [i for i in items if i.run_id == run.run_id], (30, 1))
        params = AdamParams(learning_rate=1e-3)
        first.optim_step([OptimItem(OpId(f"{one.run_id}-o{step}"), one.run_id, params) for one in RUNS])
        if step:
            again.optim_step([OptimItem(OpId("o"), run.run_id, params)])
        else:
            again.import_run(run, first.export_run(run.run_id))
    expected = first.export_run(run.run_id, ("param",)).tensors
    for name, weights in again.export_run(run.run_id, ("param",)).tensors.items():
        np.testing.assert_allclose(weights, expected[name], rtol=0, atol=BOUND, err_msg=name)


def datums(run: RunSpec, step: int) -> list[Datum]:
    rng = np.random.default_rng([run.seed, step, ord(run.run_id[0])])
    return [datum(rng, length) for length in (40, 9, 27)]


@pytest.mark.parametrize("cuts", [10**6, 1, (45, 70, 1)])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_failing_request_leaves_nothing_and_names_its_datum(free, cuts, place):
    rng = np.random.default_rng(0)
    before, after = item("a", [datum(rng, 40)], 1), item("a", [datum(rng, 9)], 3)
    data = [datum(rng, n, RL) for n in (11, 44, 18)]
    data[place] = spoiled(rng, data[place].num_tokens)
    trainer, expected = trainer_of(free, RUNS[0]), trainer_of(free, RUNS[0])
    _, failure, _ = run_pass(trainer, [before, item("a", data, 2, RL), after], cuts)
    assert isinstance(failure, Failure)
    assert f"datum {place}" in failure.message
    run_pass(expected, [before, after], cuts)
    assert_near(trainer, expected, "a")


def test_short_data_of_a_request_are_one_call_of_their_loss(free, monkeypatch):
    """And one segment of the adapter: 300 data of three tokens, 32 rows of logits at a time."""
    calls: list[int] = []
    evaluate = losses.NativeLoss.evaluate

    def counted(self, lp, inputs):
        calls.append(len(lp))
        return evaluate(self, lp, inputs)

    monkeypatch.setattr(losses.NativeLoss, "evaluate", counted)
    contexts: list[TrainingContext] = []
    made = TrainingContext.__init__

    def seen(self, *args, **kwargs):
        made(self, *args, **kwargs)
        contexts.append(self)

    monkeypatch.setattr(TrainingContext, "__init__", seen)
    rng = np.random.default_rng(0)
    (result,) = run_pass(trainer_of(free, RUNS[0]), [item("a", [datum(rng, 3) for _ in range(300)])])
    assert calls == [30] * 30
    assert [len(context._segments) for context in contexts] == [1]
    assert [logprobs.shape for logprobs in result.logprobs] == [(3,)] * 300


def test_deterministic_mode_has_a_segment_for_each_datum(base):
    trainer = make_trainer(base, spec("a"))
    training_pass = trainer.start_pass([item("a", [datum(np.random.default_rng(0), 3) for _ in range(5)])])
    lanes = training_pass._take(training_pass._data)
    attention = PackedAttention([lane.ref.num_tokens for lane in lanes], CPU)
    for deterministic, count in ((True, 5), (False, 1)):
        context = TrainingContext(lanes, attention, base.lora, deterministic=deterministic)
        assert len(context._segments) == count
