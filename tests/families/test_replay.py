"""Routes that the sampler took, recorded and replayed in training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.families.configs import CONFIGS, VOCAB
from tests.families.twin import MergedTwin
from tests.numerics.lab import (
    assert_same_bits,
    assert_same_result,
    datum,
    grads,
    item,
    make_trainer,
    relative,
    run_pass,
    spec,
)
from tests.numerics.sampling_lab import make_sampler, prompt, run_all, sample, state_of, with_blocks
from tinsmith.model import BaseModel
from tinsmith.model.families import FAMILIES, family_of
from tinsmith.route_tape import OWN_CHOICE, RouteArray
from tinsmith.types import Datum, Failure, TrainResult

REPLAYED = [kind for kind, (_, config) in CONFIGS.items() if family_of(config).routers]
BOUND = 1e-5


def other_routes(base: BaseModel, num_tokens: int, seed: int) -> RouteArray:
    """Distinct experts of each token, at random."""
    rng = np.random.default_rng(seed)
    scores = rng.random((num_tokens, base.num_routers, base.num_experts))
    return scores.argsort(-1)[..., : base.num_chosen].astype(np.int16)


def pin_routes(model: torch.nn.Module, base: BaseModel, routes: RouteArray) -> list[torch.utils.hooks.RemovableHandle]:
    """Have the plain model's routers choose these; -1 is its own choice."""
    names, weigh = base.family.routers, base.family.expert_weights
    routers = [module for module in model.modules() if type(module).__name__ in names]

    def pinned(number: int):
        def hook(module, given, found):
            wanted = torch.from_numpy(routes[:, number].astype(np.int64))
            if weigh is None:  # Llama 4: sigmoids of the chosen, zero for all others
                _, logits = found
                chosen = torch.where(wanted >= 0, wanted, logits.topk(wanted.shape[1]).indices)
                return torch.zeros_like(logits).scatter(1, chosen, logits.gather(1, chosen).sigmoid()), logits
            logits, weights, own = found
            chosen = torch.where(wanted >= 0, wanted, own)
            return logits, weigh(module, logits, chosen).to(weights.dtype), chosen

        return hook

    return [router.register_forward_hook(pinned(number)) for number, router in enumerate(routers)]


def test_every_mixture_can_be_replayed() -> None:
    assert [f.title for f in FAMILIES if f.experts and f.routers_choose and f.expert_weights is None] == []
    assert len(REPLAYED) >= 6


@pytest.mark.parametrize("kind", REPLAYED)
def test_what_was_sampled_is_trained_on_the_same_routes(kind, make_base) -> None:
    """Ragged requests, groups and chunks; the tapes are those of the request alone, and the trainer's own."""
    base = make_base(kind)
    state = state_of(base, spec("a", 4))
    items = [
        replace(
            sample(f"r{i}", prompt(i, (3, 20, 70)[i % 3], VOCAB), "a", 1 + i % 2, seed=i, max_tokens=9 + i),
            records_routes=i != 1,
        )
        for i in range(5)
    ]
    results = run_all(make_sampler(base, {"a": state}, prefill_chunk_tokens=32), items)
    trainer = make_trainer(base, deterministic=False)
    trainer.import_run(state.spec, state)
    assert results["r1"].routes is None
    for one in items:
        result = results[one.op_id]
        if result.routes is None:
            continue
        for index, sequence in enumerate(result.sequences):
            routes = np.concatenate([result.routes.prompt, result.routes.sequences[index]])
            tokens = np.concatenate([one.prompt, sequence.tokens])
            assert routes.shape == (len(tokens) - 1, base.num_routers, base.num_chosen)
            assert routes.min() >= 0
            whole = Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:].astype(np.int64)})
            own, replayed = (
                run_pass(trainer, [item("a", [each], backward=False)])[0]
                for each in (whole, replace(whole, routes=routes))
            )
            assert "routes_replayed:sum" not in own.metrics
            assert replayed.metrics["routes_replayed:sum"] == len(routes)
            np.testing.assert_allclose(
                replayed.logprobs[0][-len(sequence.tokens) :], sequence.logprobs, rtol=0, atol=BOUND
            )
            np.testing.assert_allclose(replayed.logprobs[0], own.logprobs[0], rtol=0, atol=BOUND)


@pytest.mark.parametrize("kind", REPLAYED)
def test_replayed_numbers_are_those_of_a_model_that_is_made_to_choose_so(kind, make_base) -> None:
    """Log-probabilities and gradients of adapters, by autograd; half of the tokens choose by themselves."""
    base = make_base(kind)
    run = spec("a", 4)
    state = state_of(base, run)
    rng = np.random.default_rng(3)
    data = []
    for length in (7, 40):
        routes = other_routes(base, length, length)
        routes[::2] = OWN_CHOICE
        data.append(replace(datum(rng, length), routes=routes))
    trainer = make_trainer(base, deterministic=False)
    trainer.import_run(run, state)
    (result,) = run_pass(trainer, [item("a", data)])
    assert isinstance(result, TrainResult)
    twin = MergedTwin(base, state)
    losses = []
    for one, ours in zip(data, result.logprobs, strict=True):
        assert one.routes is not None
        hooks = pin_routes(twin.model, base, one.routes)
        theirs = twin.logprobs(one)
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-4)
        losses.append(-(torch.from_numpy(one.inputs["weights"]) * theirs).sum())
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            assert float((twin.logprobs(one) - theirs).abs().max()) > 1e-3, "the routes make a difference"
    torch.stack(losses).sum().backward()
    found = grads(trainer, "a")
    for name, parameter in twin.params.items():
        assert relative(found[f"grad/{name}"], parameter.grad) < BOUND * 10, name


def test_neighbours_of_a_replay_keep_their_bits_and_layers_may_be_computed_twice(make_base) -> None:
    base = make_base(REPLAYED[0], deterministic=True)
    rng = np.random.default_rng(1)
    plain = [datum(rng, 20), datum(rng, 33)]
    replayed = [replace(each, routes=other_routes(base, each.num_tokens, 5)) for each in plain]
    alone = make_trainer(base, spec("b"))
    (calm,) = run_pass(alone, [item("b", plain)])
    both = make_trainer(base, spec("a", seed=2), spec("b"))
    _, beside = run_pass(both, [item("a", replayed), item("b", plain)])
    assert_same_result(calm, beside)
    assert_same_bits(grads(alone, "b"), grads(both, "b"))
    twice = make_trainer(base, spec("a", seed=2))
    training_pass = twice.start_pass([item("a", replayed)])
    training_pass._recomputed.update(training_pass._data)
    while training_pass.advance(1) is not None:
        pass
    training_pass.commit()
    assert_same_bits(grads(both, "a"), grads(twice, "a"))


def test_routes_of_another_model_fail_their_request_alone(make_base) -> None:
    base = make_base(REPLAYED[0])
    trainer = make_trainer(base, spec("a"), spec("b"))
    one = datum(np.random.default_rng(2), 12)
    routes = other_routes(base, 12, 1)
    beyond, short = routes.copy(), routes[:, 1:]
    beyond[3, 0, 0] = base.num_experts
    for wrong in (beyond, short, routes[:5]):
        bad, good = run_pass(trainer, [item("a", [replace(one, routes=wrong)]), item("b", [one])])
        assert isinstance(bad, Failure)
        assert bad.code == "bad_routes"
        assert isinstance(good, TrainResult)
        assert not any(grad.any() for grad in grads(trainer, "a").values())


def test_tapes_are_whole_after_preemption_and_where_prompts_are_known(make_base) -> None:
    """In little memory sequences lose what they hold and come back; a prompt that is in the cache is computed anew."""
    base = make_base(REPLAYED[0])
    items = [
        replace(sample(f"r{i}", prompt(7, 40, VOCAB), None, 2, seed=i, max_tokens=40), records_routes=True)
        for i in range(4)
    ]
    sampler = with_blocks(base, 9)
    narrow = run_all(sampler, items)
    assert sampler.preemptions.num_preempted > 0
    wide = make_sampler(base)
    for one in items:
        calm = run_all(wide, [one])[one.op_id].routes
        found = narrow[one.op_id].routes
        assert calm is not None
        assert found is not None
        assert calm.prompt.min() >= 0
        np.testing.assert_array_equal(calm.prompt, found.prompt)
        for ours, theirs in zip(calm.sequences, found.sequences, strict=True):
            np.testing.assert_array_equal(ours, theirs)
