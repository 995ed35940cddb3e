"""Dropout of an adapter's inputs: peft's arithmetic on masks that depend on nothing but where a number is."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.numerics.lab import (
    PeftTwin,
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
from tinsmith.config import Settings
from tinsmith.lora_options import LoraOptions
from tinsmith.model import BaseModel
from tinsmith.model.lora import LoopLora
from tinsmith.model.lora.grouped import GroupedLora
from tinsmith.model.lora.masks import RowMask
from tinsmith.training.budget import Budget
from tinsmith.types import Targets

CPU = torch.device("cpu")
BOUND = 1e-5
RUN = replace(spec("a"), options=LoraOptions(dropout=0.3, ranks=(("v_proj", 3),)))
OTHER = replace(spec("d", 4, seed=9), options=LoraOptions(dropout=0.6))
NEIGHBOURS = (spec("b", 8, seed=2), spec("c", 3, Targets(mlp=False, unembed=False), seed=3))


class Fixed(nn.Module):
    """In the place of peft's dropout: the mask of a group for one datum."""

    mask: RowMask

    def __init__(self, group: str) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        kept_NI = self.mask.times(self.group, torch.ones(x.shape[-2:], dtype=x.dtype))
        return x * kept_NI.view(x.shape)


class MaskedTwin(PeftTwin):
    def at(self, base: BaseModel, seq: int, number: int, num_tokens: int) -> None:
        """From now on the masks are those of this datum."""
        for info in base.linears:
            layer = self.model.get_submodule(f"base_model.model.{info.name}")
            layer.lora_dropout["default"] = fixed = Fixed(info.lead)
            fixed.mask = RowMask.of_datum(RUN.seed, seq, number, num_tokens, RUN.options.dropout, CPU)


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "merged"])
@pytest.mark.parametrize("backend", [None, LoopLora, GroupedLora], ids=["own", "loop", "grouped"])
def test_logprobs_and_gradients_are_those_of_peft_with_the_same_masks(
    base: BaseModel, deterministic: bool, backend: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among runs without dropout, and one with another; two requests, of which the second is cut."""
    if backend is not None:
        monkeypatch.setattr(base, "lora", backend)
    rng = np.random.default_rng(5)
    trainer = make_trainer(base, RUN, OTHER, *NEIGHBOURS, deterministic=deterministic)
    twin = MaskedTwin(base, trainer.export_run(RUN.run_id), rank_pattern={"v_proj": 3})
    parts = [[datum(rng, n) for n in (7, 40)], [datum(rng, n, "importance_sampling") for n in (33, 21)]]
    items = [item("a", parts[0], 4), item("a", parts[1], 5, "importance_sampling")]
    items += [item(run.run_id, [datum(rng, 20)]) for run in (*NEIGHBOURS, OTHER)]
    results = run_pass(trainer, items, max_tokens=[85, 40])
    for one, result in zip(items[:2], results[:2], strict=True):
        for number, (each, ours) in enumerate(zip(one.data, result.logprobs, strict=True)):
            twin.at(base, one.seq_id, number, each.num_tokens)
            _, (theirs,) = twin.backward([each], one.loss.name)
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=BOUND)
    own = grads(trainer, "a")
    errors = {name: relative(own[f"grad/{name}"], p.grad) for name, p in twin.params.items() if p.grad is not None}
    assert len(errors) == len(twin.params)
    assert max(errors.values()) < BOUND, errors


@pytest.mark.parametrize("mode", ["never", "always"])
@pytest.mark.parametrize("max_tokens", [10**6, 60, 1])
def test_cuts_neighbours_and_recomputation_change_no_bit(base: BaseModel, max_tokens: int, mode: str) -> None:
    rng = np.random.default_rng(6)
    data, others = [datum(rng, n) for n in (9, 44, 21)], [datum(rng, n) for n in (30, 12)]
    alone, among = make_trainer(base, RUN), make_trainer(base, OTHER, RUN, *NEIGHBOURS)
    among.budget = Budget(Settings(activation_checkpointing=mode), CPU)
    (want,) = run_pass(alone, [item("a", data, 7)])
    items = [item("a", data, 7), item("b", others), item("c", others), item("d", others)]
    got, neighbour, *_ = run_pass(among, items, max_tokens)
    assert_same_result(got, want)
    assert_same_bits(grads(among, "a"), grads(alone, "a"))
    plain = make_trainer(base, *NEIGHBOURS)
    (want_neighbour,) = run_pass(plain, [item("b", others)])
    assert_same_result(neighbour, want_neighbour)
    assert_same_bits(grads(among, "b"), grads(plain, "b"))


def test_requests_differ_and_a_request_is_the_same_again(base: BaseModel) -> None:
    """As after a crash: the same run, number and data."""
    rng = np.random.default_rng(7)
    data = [datum(rng, 30)]
    seen = []
    for seed, seq in ((1, 4), (1, 4), (1, 5), (2, 4)):
        (result,) = run_pass(make_trainer(base, replace(RUN, seed=seed)), [item("a", data, seq)])
        seen.append(result.logprobs[0].tolist())
    assert seen[0] == seen[1]
    assert seen[2] != seen[0]


@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "merged"])
def test_forward_knows_no_dropout(base: BaseModel, deterministic: bool) -> None:
    rng = np.random.default_rng(8)
    data = [datum(rng, n) for n in (30, 12)]
    with_dropout = make_trainer(base, RUN, deterministic=deterministic)
    without = make_trainer(base, replace(RUN, options=replace(RUN.options, dropout=0.0)), deterministic=deterministic)
    forwards = [item("a", data, 3, backward=False)]
    (got,), (want,) = (run_pass(trainer, forwards) for trainer in (with_dropout, without))
    assert_same_result(got, want)
    both = run_pass(with_dropout, [item("a", data, 3, backward=False), item("a", data, 4)])
    assert_same_result(both[0], want)
    assert not np.array_equal(both[1].logprobs[0], want.logprobs[0])


def test_the_masks_are_fair_and_keep_the_expectation() -> None:
    for dropout in (0.1, 0.5, 0.9):
        mask = RowMask.joined([RowMask.of_datum(11, 3, number, 400, dropout, CPU) for number in range(4)])
        kept_NI = mask.times("m", torch.ones(1600, 333))
        is_kept = kept_NI != 0
        spread = (dropout * (1 - dropout)) ** 0.5
        assert abs(float(is_kept.double().mean()) - (1 - dropout)) < 5 * spread / kept_NI.numel() ** 0.5
        for side in (0, 1):  # no row and no column is favoured
            means = is_kept.double().mean(side)
            assert float((means - (1 - dropout)).abs().max()) < 6 * spread / is_kept.shape[side] ** 0.5
        torch.testing.assert_close(kept_NI[is_kept], torch.full_like(kept_NI[is_kept], 1 / (1 - dropout)))
        for other in (is_kept.roll(1, 0), is_kept.roll(1, 1), mask.times("other", torch.ones(1600, 333)) != 0):
            together = float((is_kept & other).double().mean())
            assert abs(together - (1 - dropout) ** 2) < 5 / kept_NI.numel() ** 0.5


def test_the_formula_is_the_one_that_is_written_down() -> None:
    """In Python's integers; part of the contract, since requests are computed again after a crash."""

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    def after(key: int, n: int) -> int:
        return mix((key + (n + 1) * 0x9E3779B97F4A7C15) % 2**64)

    from_name = int.from_bytes(hashlib.blake2b(b"layer", digest_size=8).digest(), "little")
    seed, seq, number, dropout = 2**62 + 12345, 17, 3, 0.37
    mask = RowMask.of_datum(seed, seq, number, 9, dropout, CPU)
    for expert in (None, 5):
        kept = (mask if expert is None else mask.of_expert(expert)).times("layer", torch.ones(9, 7)) != 0
        for position in range(9):
            row = after(after(after(mix((seed + 0x9E3779B97F4A7C15) % 2**64), seq), number), position)
            row = row if expert is None else after(row, expert)
            for column in range(7):
                bits = after(mix((row + from_name) % 2**64), column // 2)
                half = bits >> 32 if column % 2 else bits % 2**32
                assert bool(kept[position, column]) == (half >= int(dropout * 2**32))


def test_bfloat16_keeps_the_expectation() -> None:
    """The scale isn't rounded before it is multiplied with."""
    mask = RowMask.of_datum(1, 1, 0, 64, 0.1, CPU)
    x_NI = torch.full((64, 64), 1.0078125, dtype=torch.bfloat16)
    kept_NI = mask.times("m", x_NI)
    assert kept_NI.dtype == torch.bfloat16
    assert set(kept_NI.float().unique().tolist()) == {0.0, float(torch.tensor(1.0078125 / 0.9).bfloat16())}
