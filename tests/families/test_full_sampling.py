"""Samples of full runs have the trainer's log-probabilities in families whose layers are not plain ones."""

from __future__ import annotations

import numpy as np
import pytest

from tests.numerics.full_lab import logprobs, make_pair, publish, run_all, train
from tests.numerics.sampling_lab import sample

BOUND = 1e-5


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "gemma3", "qwen3_next"])
def test_logprobs_are_the_trainers_after_a_step(kind: str, make_base) -> None:
    trainer, samplers = make_pair(make_base(kind))
    asked = np.arange(3, 40)
    for step in range(2):
        publish(trainer, samplers, f"s{step}")
        found = run_all(samplers, sample("a", asked, f"s{step}", 2, seed=3, prompt_logprobs=True))["a"]
        for sequence in found.sequences:
            ours = np.concatenate([found.prompt_logprobs[1:], sequence.logprobs])
            want = logprobs(trainer, np.concatenate([asked, sequence.tokens]))
            np.testing.assert_allclose(ours, want, rtol=0, atol=BOUND)
        train(trainer)
