"""Experts beyond the battery: loads in results, requests that are taken back, and the GPU's ways on the CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.families.configs import CONFIGS, VOCAB
from tests.families.twin import MergedTwin, plain_model
from tests.numerics.lab import assert_same_bits, datum, grads, item, make_trainer, relative, run_pass, spec
from tests.numerics.sampling_lab import make_sampler, prompt, run_all, sample, state_of
from tinsmith.bases.catalog import BaseRef, describe
from tinsmith.errors import UnsupportedError
from tinsmith.lora_options import LoraOptions
from tinsmith.model import load_base, open_base
from tinsmith.model.activation import clamped_swiglu
from tinsmith.model.experts import StackedMatrices
from tinsmith.model.layout import RowLayout
from tinsmith.model.lora import ExpertLora, ExpertWeights, LoopLora, Segment
from tinsmith.model.lora.grouped import GroupedLora
from tinsmith.model.lora.masks import RowMask
from tinsmith.model.lora.triton_lora import TritonLora
from tinsmith.model.routes import Routes, gather, spread
from tinsmith.model.row_probe import uneven_routers
from tinsmith.training.load_metrics import load_metrics
from tinsmith.types import Datum, Failure, RunId, RunSpec, Targets

RL = "importance_sampling"
ROWS, NUM, EACH = 45, 5, 2


def routes_of(seed: int) -> Routes:
    """Nobody chooses expert 3."""
    scores = torch.rand(ROWS, NUM, generator=torch.Generator().manual_seed(seed))
    scores[:, 3] = -1
    return Routes.of(scores.topk(EACH).indices, NUM)


def test_slots_hold_each_experts_rows_in_order_and_lead_back() -> None:
    routes = routes_of(0)
    ends = [0, *routes.ends_E.tolist()]
    for expert in range(NUM):
        mine = (routes.experts_TK == expert).any(1).nonzero()[:, 0]
        assert routes.rows_N[ends[expert] : ends[expert] + len(mine)].tolist() == mine.tolist()
    torch.testing.assert_close(routes.rows_N[routes.places_TK], torch.arange(ROWS)[:, None].expand(-1, EACH))
    found = routes.ranges([(0, 7), (7, 7), (20, ROWS)])
    for index, expert, first, end in found.tolist():
        start, stop = [(0, 7), (7, 7), (20, ROWS)][index]
        rows = routes.rows_N[first:end].tolist()
        assert rows == [row for row in range(start, stop) if expert in routes.experts_TK[row]]
    assert len(found) == len({(i, e) for i, e, _, _ in found.tolist()})


def test_spread_and_gather_have_the_gradients_of_autograd() -> None:
    routes = routes_of(1)
    x_TD = torch.randn(ROWS, 6, requires_grad=True)
    weights_TK = torch.rand(ROWS, EACH, requires_grad=True)
    scale_E = torch.rand(NUM)
    dout_TD = torch.randn(ROWS, 6)
    slots_N = torch.arange(len(routes.rows_N), dtype=torch.int32)
    of_N = torch.searchsorted(routes.ends_E, slots_N, right=True)
    ours = gather(spread(x_TD, routes) * scale_E[of_N, None], weights_TK, routes)
    ours.backward(dout_TD)
    found = x_TD.grad, weights_TK.grad
    x_TD.grad = weights_TK.grad = None
    theirs = x_TD * (weights_TK * scale_E[routes.experts_TK]).sum(1, keepdim=True)
    theirs.backward(dout_TD)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(found, (x_TD.grad, weights_TK.grad))


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_grouped_product_is_that_of_one_expert_after_another(has_bias: bool) -> None:
    routes = routes_of(2)
    weight_EOI = torch.randn(NUM, 24, 16)
    bias_EO = torch.randn(NUM, 24) if has_bias else None
    loop, grouped = (StackedMatrices(weight_EOI, bias_EO, is_grouped=each) for each in (False, True))
    x_NI, dy_NO = (torch.randn(len(routes.rows_N), width) for width in (16, 24))
    torch.testing.assert_close(grouped.times(x_NI, routes), loop.times(x_NI, routes), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        grouped.times_transpose(dy_NO, routes), loop.times_transpose(dy_NO, routes), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("backend", [GroupedLora, TritonLora])
def test_the_backends_of_gpus_add_to_shared_factors_as_the_loop_does(backend) -> None:
    """Triton under its interpreter: two runs, of which one has rows that aren't live."""
    found = []
    routes = routes_of(3)
    for each in (backend, LoopLora):
        torch.manual_seed(4)
        segments = []
        for start, end, live in ((0, 18, [(0, 18)]), (20, 44, [(20, 30), (35, 44)])):
            weights = {
                "m.w1": ExpertWeights(
                    torch.randn(1, 16, 32), (torch.randn(NUM, 16, 8), torch.randn(NUM, 16, 8)), (2.0, 3.0)
                ),
                "m.w2": ExpertWeights(torch.randn(NUM, 8, 16), (torch.randn(1, 32, 8),), (2.0,)),
            }
            grads_of = {
                group: ExpertWeights(torch.zeros_like(w.a_EKI), tuple(map(torch.zeros_like, w.bs)))
                for group, w in weights.items()
            }
            segments.append(Segment(start, end, {}, {}, live, weights, grads_of))
        lora = ExpertLora([segments], "m", routes, each)
        numbers = []
        for group, inputs, outputs in (("m.w1", 32, 32), ("m.w2", 16, 32)):
            x, y, dy, dx = (torch.randn(len(routes.rows_N), n) for n in (inputs, outputs, outputs, inputs))
            lora.add_grads(group, x, lora.add(group, x, y), dy, dx)
            real = torch.zeros(len(x), dtype=torch.bool)
            real[routes.places_TK] = True
            numbers += [y[real], dx[real]]
        numbers += [t for s in segments for w in (s.expert_grads or {}).values() for t in w.tensors]
        found.append(numbers)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_clamped_gate_has_the_gradient_of_autograd() -> None:
    x = (3 * torch.randn(50, 24, dtype=torch.float64)).requires_grad_()
    gate, up = x.chunk(2, -1)
    gate, up = gate.clamp(max=2.0), up.clamp(-2.0, 2.0)
    theirs = (up + 1) * gate * torch.sigmoid(1.7 * gate)
    dout = torch.randn_like(theirs)
    (want,) = torch.autograd.grad(theirs, x, dout)
    ours = clamped_swiglu(x, alpha=1.7, limit=2.0)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, x, dout)[0], want)


def test_loads_are_relative_to_the_even_share() -> None:
    found = load_metrics([np.array([6, 2, 0, 0]), np.array([2, 2, 2, 2])])
    assert found == {
        "e_frac_with_tokens:mean": 0.75, "e_frac_oversubscribed:mean": 0.125, "e_max_violation:mean": 1.0,
        "e_max_violation:max": 2.0, "e_min_violation:mean": -0.5,
    }  # fmt: skip
    assert load_metrics([]) == {}


@pytest.mark.parametrize("backward", [True, False])
def test_a_result_tells_the_loads_of_its_own_tokens(make_base, backward: bool) -> None:
    """As the plain model's routers choose, whoever shares the pass and however it is cut."""
    base = make_base("qwen3_moe")
    rng = np.random.default_rng(7)
    trainer = make_trainer(base, deterministic=False)
    for run in (spec("a"), spec("b", seed=2)):
        trainer.create_run(run)  # whose adapters do nothing yet
    data = [datum(rng, length) for length in (30, 11, 25)]
    others = [datum(rng, 40)]
    items = [item("b", others, backward=backward), item("a", data, backward=backward)]
    _, result = run_pass(trainer, items, [60, 30])
    model = plain_model(base)
    counts = [np.zeros(8, np.int64) for _ in range(base.num_layers)]

    def count(layer: int, _: object, __: object, found: tuple[torch.Tensor, ...]) -> None:
        counts[layer] += np.bincount(found[2].reshape(-1), minlength=8)

    for index, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(partial(count, index))
    with torch.no_grad():
        for one in data:
            model(input_ids=torch.from_numpy(one.tokens.astype(np.int64))[None])
    assert counts[0].sum() == 3 * sum(len(one.tokens) for one in data)
    expected = load_metrics(counts)
    assert {name: value for name, value in result.metrics.items() if name.startswith("e_")} == pytest.approx(expected)


def test_bits_hold_with_products_split_over_threads(make_base) -> None:
    torch.set_num_threads(2)
    base = make_base("glm4_moe", deterministic=True)
    rng = np.random.default_rng(11)
    mine, others = [datum(rng, length) for length in (150, 64)], [datum(rng, 300)]
    crowd, alone = make_trainer(base, spec("b", seed=2), spec("a")), make_trainer(base, spec("a"))
    _, together = run_pass(crowd, [item("b", others), item("a", mine)])
    (by_itself,) = run_pass(alone, [item("a", mine)], 160)
    assert_same_bits(dict(enumerate(together.logprobs)), dict(enumerate(by_itself.logprobs)))
    assert_same_bits(grads(crowd, "a"), grads(alone, "a"))


def test_the_probe_of_routers_sees_uneven_ones(make_base, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base("qwen3_moe")
    assert uneven_routers(base.router_weights) == []
    exact = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: exact(x, w) * (1 + len(x) * 1e-6))
    assert uneven_routers(base.router_weights) == [(8, 64)]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("cuts", [10**6, [45, 10**6]], ids=["whole", "cut"])
def test_a_failing_request_leaves_nothing_in_any_experts_factor(make_base, cuts, deterministic: bool) -> None:
    base = make_base("qwen3_moe", deterministic=deterministic)
    rng = np.random.default_rng(8)
    data = [datum(rng, 30, RL), datum(rng, 25, RL)]
    data[1].inputs["logprobs"][3] = -3e38  # its ratio overflows
    before, after = item("a", [datum(rng, 14)], 1), item("a", [datum(rng, 21)], 3)
    trainer, expected = (make_trainer(base, spec("a"), deterministic=deterministic) for _ in range(2))
    _, failure, _ = run_pass(trainer, [before, item("a", data, 2, RL), after], cuts)
    assert isinstance(failure, Failure)
    run_pass(expected, [before, after])
    ours, theirs = grads(trainer, "a"), grads(expected, "a")
    assert any(".experts.w2.lora_B" in name for name in ours)
    if deterministic:
        assert_same_bits(ours, theirs)
    for name, gradient in ours.items():
        np.testing.assert_allclose(gradient, theirs[name], rtol=1e-4, atol=1e-4)


def test_runs_without_an_mlp_adapter_have_none_in_experts(make_base) -> None:
    base = make_base("mixtral")
    run = spec("a", 4, type(spec("a").targets)(attn=True, mlp=False, unembed=True))
    assert not any("experts" in name for name in state_of(base, run).tensors)


def test_bfloat16_is_near_float32(make_base) -> None:
    base = make_base("gpt_oss")
    half = load_base(base.info, device=torch.device("cpu"), dtype=torch.bfloat16)
    rng = np.random.default_rng(9)
    data = [datum(rng, 40)]
    (want,), (got,) = (
        run_pass(make_trainer(each, spec("a"), deterministic=False), [item("a", data)]) for each in (base, half)
    )
    assert np.abs(want.logprobs[0] - got.logprobs[0]).mean() < 0.1
    request = sample("r", prompt(1, 20, VOCAB), "a", max_tokens=4)
    (result,) = run_all(make_sampler(half, {"a": state_of(half, spec("a"))}), [request]).values()
    assert len(result.sequences[0].tokens) == 4


def test_experts_with_another_activation_are_refused(make_base) -> None:
    model = plain_model(make_base("qwen3_moe"))
    model.model.layers[0].mlp.experts.act_fn = torch.nn.GELU()
    with pytest.raises(UnsupportedError, match="GELU"):
        open_base(model, make_base("qwen3_moe").info)


@pytest.mark.parametrize(
    ("kind", "shares_factors"),
    [(kind, True) for kind in CONFIGS] + [(kind, False) for kind in ("qwen3_moe", "mixtral", "gpt_oss", "llama4")],
)
def test_the_api_knows_the_size_of_an_adapter(make_base, kind: str, shares_factors: bool) -> None:
    """From the names and shapes in the weights' files alone; quotas are reckoned with it."""
    base = make_base(kind, shares_factors=shares_factors)
    info = describe(BaseRef("x", Path(base.info.path)), shares_factors=shares_factors)
    for targets in (Targets(), Targets(mlp=False), Targets(attn=False, unembed=False)):
        asked = RunSpec(RunId("r"), "x", rank=3, targets=targets)
        assert info.adapter_bytes(asked) == 4 * RowLayout(base.linears, targets, 3).num_params


@pytest.mark.parametrize(("kind", "shares_factors"), [("qwen3_moe", True), ("gpt_oss", False)])
def test_experts_with_ranks_of_single_layers(make_base, kind: str, shares_factors: bool) -> None:
    """Against autograd on merged weights, and in the sampler."""
    base = make_base(kind, shares_factors=shares_factors)
    run = replace(spec("a", 4), options=LoraOptions(ranks=(("attn", 3), ("w1", 2), ("w2", 6), ("w3", 5))))
    rng = np.random.default_rng(12)
    data = [datum(rng, length) for length in (9, 33)]
    trainer = make_trainer(base, run, spec("b", 8, seed=2))
    result, _ = run_pass(trainer, [item("a", data), item("b", [datum(rng, 30)])], 40)
    state = trainer.export_run(run.run_id)
    twin = MergedTwin(base, state)
    _, logprobs = twin.backward(data)
    for ours, theirs in zip(result.logprobs, logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)
    found = grads(trainer, "a")
    assert max(relative(found[f"grad/{name}"], p.grad) for name, p in twin.params.items()) < 1e-5
    request = sample("r", data[1].tokens, "a", max_tokens=1, prompt_logprobs=True)
    (sampled,) = run_all(make_sampler(base, {"a": state}), [request]).values()
    whole = Datum(data[1].tokens[:-1], {"target_tokens": data[1].tokens[1:].astype(np.int64)})
    (forward,) = run_pass(trainer, [item("a", [whole], backward=False)])
    np.testing.assert_allclose(sampled.prompt_logprobs[1:], forward.logprobs[0], rtol=0, atol=1e-5)


def test_each_expert_has_masks_of_its_own() -> None:
    """As if inputs, and the gradients that come back to them, were multiplied with the masks by hand."""
    routes, first, last = routes_of(5), 6, 40
    mask = RowMask.of_datum(3, 2, 1, last - first, 0.4, torch.device("cpu"))
    by_hand_NI = torch.ones(len(routes.rows_N), 32)
    for expert, places in ((e, routes.places_TK[routes.experts_TK == e].tolist()) for e in range(NUM)):
        for place in places:
            row = int(routes.rows_N[place]) - first
            if 0 <= row < last - first:
                by_hand_NI[place] = mask.at(slice(row, row + 1)).of_expert(expert).times("m.w1", torch.ones(1, 32))
    torch.manual_seed(6)
    weights = {"m.w1": ExpertWeights(torch.randn(1, 8, 32), (torch.randn(NUM, 16, 8),), (2.0,))}
    x, y, dy, dx = (torch.randn(len(routes.rows_N), n) for n in (32, 16, 16, 32))
    found = []
    for own_mask, factor_NI in ((mask, torch.ones_like(by_hand_NI)), (None, by_hand_NI)):
        sums = {"m.w1": ExpertWeights(torch.zeros(1, 8, 32), (torch.zeros(NUM, 16, 8),))}
        segment = Segment(first, last, {}, {}, [(first, last)], weights, sums, mask=own_mask)
        lora = ExpertLora([[segment]], "m", routes, LoopLora)
        own_y, back = y.clone(), torch.zeros_like(dx)
        lora.add_grads("m.w1", x * factor_NI, lora.add("m.w1", x * factor_NI, own_y), dy, back)
        found.append([own_y, dx + back * factor_NI, *sums["m.w1"].tensors])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shares_factors", [True, False])
def test_dropout_in_experts_changes_no_bit_by_a_cut(make_base, shares_factors: bool) -> None:
    kind = "qwen3_moe" if shares_factors else "gpt_oss"
    base = make_base(kind, deterministic=True, shares_factors=shares_factors)
    run, other = replace(spec("a", 4), options=LoraOptions(dropout=0.3)), spec("b", 8, seed=2)
    rng = np.random.default_rng(13)
    data, others = [datum(rng, length) for length in (9, 33, 20)], [datum(rng, 30)]
    alone, among, plain = (make_trainer(base, *runs) for runs in ((run,), (other, run), (other,)))
    (want,) = run_pass(alone, [item("a", data)])
    got, neighbour = run_pass(among, [item("a", data), item("b", others)], 40)
    (want_neighbour,) = run_pass(plain, [item("b", others)])
    for one, two in ((got, want), (neighbour, want_neighbour)):
        assert_same_bits(dict(enumerate(one.logprobs)), dict(enumerate(two.logprobs)))
    assert_same_bits(grads(among, "a"), grads(alone, "a"))
    assert_same_bits(grads(among, "b"), grads(plain, "b"))
