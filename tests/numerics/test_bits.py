"""What a neighbour sends doesn't change a run's numbers by one bit, and neither does where a pass is cut."""

import numpy as np
import pytest

from tests.numerics.lab import assert_same_bits, assert_same_result, datum, grads, item, make_trainer, run_pass, spec
from tinsmith.types import Targets

RUNS = (
    spec("a", 8),
    spec("b", 3, Targets(attn=True, mlp=False, unembed=False), seed=2),
    spec("c", 16, Targets(attn=False, mlp=True, unembed=True), seed=3),
    spec("d", 1, Targets(attn=False, mlp=False, unembed=True), seed=4),
)


def requests(vocab: int = 211):
    rng = np.random.default_rng(0)
    return [
        item("a", [datum(rng, n, vocab=vocab) for n in (5, 33, 70)]),
        item("a", [datum(rng, n, "importance_sampling", vocab=vocab) for n in (1, 18)], 2, "importance_sampling"),
        item("b", [datum(rng, n, num_targets=3, vocab=vocab) for n in (41, 12)]),
        item("b", [datum(rng, 27, vocab=vocab)], 2, backward=False),
        item("c", [datum(rng, n, vocab=vocab) for n in (100, 2, 2)]),
        item("d", [datum(rng, 47, "importance_sampling", vocab=vocab)], 1, "importance_sampling"),
    ]


def check_alone_and_together(base, vocab):
    items = requests(vocab)
    together = make_trainer(base, *RUNS)
    before = base.num_forwards
    results = run_pass(together, items)
    assert base.num_forwards == before + 1
    for run in RUNS:
        alone = make_trainer(base, run)
        own = [i for i in items if i.run_id == run.run_id]
        for result, expected in zip(
            [r for i, r in zip(items, results, strict=True) if i in own], run_pass(alone, own), strict=True
        ):
            assert_same_result(result, expected)
        assert_same_bits(grads(together, run.run_id), grads(alone, run.run_id))
        assert any(np.any(g) for g in grads(alone, run.run_id).values())


def test_a_run_among_others_has_the_bits_of_a_run_alone(base):
    check_alone_and_together(base, 211)


def test_so_it_is_when_products_are_split_over_threads(wide_base, threads):
    check_alone_and_together(wide_base, 4001)


@pytest.mark.parametrize("cuts", [1, 40, 130, (40, 1, 90)])
def test_where_a_pass_is_cut_changes_nothing(base, cuts):
    items = requests()
    whole, cut = make_trainer(base, *RUNS), make_trainer(base, *RUNS)
    for one, other in zip(run_pass(whole, items), run_pass(cut, items, cuts), strict=True):
        assert_same_result(one, other)
    for run in RUNS:
        assert_same_bits(grads(whole, run.run_id), grads(cut, run.run_id))


def test_two_requests_in_one_pass_or_in_two(base):
    items = [i for i in requests() if i.run_id == "a"]
    one, two = make_trainer(base, RUNS[0]), make_trainer(base, RUNS[0])
    run_pass(one, items)
    for i in items:
        run_pass(two, [i])
    assert_same_bits(grads(one, "a"), grads(two, "a"))


def test_forward_gives_the_logprobs_of_forward_backward_and_leaves_no_gradient(base):
    rng = np.random.default_rng(1)
    data = [datum(rng, n) for n in (9, 50)]
    trainer = make_trainer(base, RUNS[0])
    (forward,) = run_pass(trainer, [item("a", data, backward=False)])
    assert not any(np.any(g) for g in grads(trainer, "a").values())
    (backward,) = run_pass(trainer, [item("a", data)])
    assert_same_result(forward, backward)


def test_sixteen_runs_of_one_datum_are_one_forward(base):
    rng = np.random.default_rng(2)
    runs = [spec(f"r{i:02}", 4, seed=i) for i in range(16)]
    trainer = make_trainer(base, *runs)
    before = base.num_forwards
    results = run_pass(trainer, [item(run.run_id, [datum(rng, 12)]) for run in runs])
    assert base.num_forwards == before + 1
    assert {r.metrics["pass_runs:max"] for r in results} == {16.0}
    assert {r.metrics["pass_tokens:max"] for r in results} == {192.0}
