"""Sampling from full runs: logprobs are the trainer's, snapshots are frozen, and memory is bounded."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.numerics.full_lab import FULL, logprobs, make_pair, publish, run_all, train
from tests.numerics.lab import CPU, VOCAB
from tests.numerics.sampling_lab import assert_same_sample, prompt, sample
from tinsmith.errors import NoMemoryError, UnsupportedError
from tinsmith.model import BaseModel, load_base
from tinsmith.sampling import full
from tinsmith.types import Failure, OpId, RunId, RunState

BOUND = 1e-5


def test_logprobs_are_the_trainers_at_every_step(base: BaseModel) -> None:
    """Of prompts and of what is sampled; the same prompt again, so that a cache of an earlier step would show."""
    trainer, samplers = make_pair(base)
    asked, seen = prompt(1, 150), []
    for step in range(3):
        publish(trainer, samplers, f"s{step}")
        for name in ("cold", "warm"):
            found = run_all(samplers, sample(name, asked, f"s{step}", 2, seed=3, prompt_logprobs=True))[name]
            for sequence in found.sequences:
                want = logprobs(trainer, np.concatenate([asked, sequence.tokens]))
                np.testing.assert_allclose(found.prompt_logprobs[1:], want[: len(asked) - 1], rtol=0, atol=BOUND)
                np.testing.assert_allclose(sequence.logprobs, want[len(asked) - 1 :], rtol=0, atol=BOUND)
        seen.append(found.prompt_logprobs[1:])
        train(trainer)
    assert all(np.abs(one - other).max() > 100 * BOUND for one, other in pairwise(seen))


def test_a_snapshot_is_frozen_and_comes_back_to_the_bit(base: BaseModel) -> None:
    """Also half-way through a request, and after it had to leave for others."""
    trainer, samplers = make_pair(base, full_snapshots=2)
    state = publish(trainer, samplers, "old")
    asked = sample("a", prompt(2, 40), "old", 2, seed=1, max_tokens=12)
    before = run_all(samplers, asked)["a"]
    samplers.submit(asked)
    for _ in range(4):
        samplers.step()
    assert samplers.seats == (2, 256)
    train(trainer)
    publish(trainer, samplers, "new")
    assert samplers.open_keys == {"old": True, "new": False}
    found = run_all(samplers, sample("b", prompt(2, 40), "new", 2, seed=1, max_tokens=12))
    assert_same_sample(found["a"], before)
    assert not np.array_equal(found["b"].sequences[0].logprobs, before.sequences[0].logprobs)
    train(trainer)
    publish(trainer, samplers, "newer")
    assert "old" not in samplers
    samplers.add("old", RunState(state.spec, state.step, {k: v.copy() for k, v in state.tensors.items()}))
    assert len(samplers.open_keys) == 2
    assert_same_sample(run_all(samplers, asked)["a"], before)


def test_only_so_many_are_open_and_those_in_use_stay(base: BaseModel) -> None:
    trainer, samplers = make_pair(base, full_snapshots=2)
    publish(trainer, samplers, "a")
    publish(trainer, samplers, "b")
    for key in "ab":
        samplers.submit(sample(key, [1, 2], key, max_tokens=30))
    assert samplers.num_places == 0
    publish(trainer, samplers, "c")
    assert samplers.open_keys == {"a": True, "b": True}
    samplers.cancel(OpId("a"))
    assert samplers.num_places == 1
    publish(trainer, samplers, "c")
    assert samplers.open_keys == {"b": True, "c": False}


def test_what_does_not_fit_is_refused_with_the_memory_it_would_need(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can be let go for it is let go, but nothing that is in use."""
    trainer, samplers = make_pair(base)
    state = publish(trainer, samplers, "a")
    needed = samplers.needed_bytes
    assert needed == 4 * trainer.full.num_params
    room = [needed - 1]
    monkeypatch.setattr(trainer.full, "free_bytes", lambda: room[0] - needed * len(samplers.open_keys))
    sizes = rf"needs {needed / 2**30:.2f} GiB .*{(needed - 1) / 2**30:.2f} GiB are free.*export"
    with pytest.raises(NoMemoryError, match=sizes):
        samplers.add("b", state)
    assert not samplers.open_keys
    room[0] = needed
    for key in "bc":
        samplers.add(key, state)
        assert list(samplers.open_keys) == [key]
    samplers.submit(sample("x", [1, 2], "c"))
    assert samplers.num_places == 0
    with pytest.raises(NoMemoryError):
        samplers.add("d", state)
    assert samplers.open_keys == {"c": True}
    with pytest.raises(NoMemoryError, match=rf"copy of the weights .*needs {needed / 2**30:.2f} GiB"):
        trainer.copy_weights(RunId("f"))
    assert not isinstance(run_all(samplers)["x"], Failure)
    trainer.full.make_room = samplers.let_go
    trainer.copy_weights(RunId("f"))
    assert not samplers.open_keys, "a run comes before a snapshot that nobody samples from"


def test_weights_that_diverged_fail_the_request_alone(base: BaseModel) -> None:
    trainer, samplers = make_pair(base)
    publish(trainer, samplers, "good")
    state = trainer.export_run(RunId("f"), ("param",))
    tensors = {name: array * np.float32(np.nan) for name, array in state.tensors.items()}
    samplers.add("bad", RunState(FULL, 1, tensors))
    found = run_all(samplers, sample("a", [1, 2], "good"), sample("b", [1, 2], "bad"))
    assert not isinstance(found["a"], Failure)
    assert isinstance(found["b"], Failure)
    assert (found["b"].code, found["b"].category) == ("non_finite_logits", "user")


def test_products_that_are_uneven_are_refused_where_bits_are_promised(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(full, "uneven_products", lambda matrices: [(1, 2)])
    trainer, samplers = make_pair(base)
    state = publish(trainer, samplers, "a")
    assert "a" not in samplers, "the run goes on, and the first request is told"
    with pytest.raises(UnsupportedError, match=r"--deterministic.*--threads"):
        samplers.add("a", state)


def test_a_base_in_fewer_bits_is_sampled_from_in_float32(base: BaseModel) -> None:
    """As it is trained."""
    small = load_base(base.info, device=CPU, dtype=torch.bfloat16, deterministic=True)
    trainer, samplers = make_pair(small)
    train(trainer)
    publish(trainer, samplers, "a")
    asked = prompt(3, 30, VOCAB)
    found = run_all(samplers, sample("x", asked, "a", seed=3))["x"].sequences[0]
    want = logprobs(trainer, np.concatenate([asked, found.tokens]))
    np.testing.assert_allclose(found.logprobs, want[len(asked) - 1 :], rtol=0, atol=BOUND)
