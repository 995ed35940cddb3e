"""Sequences of tens of thousands of tokens: trained, sampled after, with memory that grows with their length alone."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.numerics.lab import grads, item, make_trainer, run_pass, spec
from tests.numerics.long_memory import LENGTHS, MODES
from tests.numerics.sampling_lab import make_sampler, prompt, run_all, sample
from tinsmith.model import BaseModel
from tinsmith.types import Datum, TrainResult

ROOT = Path(__file__).resolve().parents[2]
LONG = 32 * 1024
MIB = 2**20


def test_a_sequence_of_32k_tokens_trains_with_a_loss_on_all(long_base: BaseModel) -> None:
    """Its first half has the log-probabilities that it has alone: no token sees a later one, at any distance."""
    trainer = make_trainer(long_base, spec("a"), chunk_tokens=512)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, long_base.info.vocab_size, LONG + 1)
    data = [Datum(tokens[:end].astype(np.int32), {"target_tokens": tokens[1 : end + 1]}) for end in (LONG, LONG // 2)]
    (whole,) = run_pass(trainer, [item("a", data[:1])])
    assert isinstance(whole, TrainResult)
    assert whole.metrics["tokens:sum"] == LONG
    assert np.isfinite(whole.logprobs[0]).all()
    assert all(np.isfinite(grad).all() and grad.any() for grad in grads(trainer, "a").values())
    (half,) = run_pass(trainer, [item("a", data[1:], seq=2, backward=False)])
    np.testing.assert_allclose(half.logprobs[0], whole.logprobs[0][: LONG // 2], atol=1e-5)


def test_sampling_after_32k_tokens_agrees_with_the_trainer(long_base: BaseModel) -> None:
    """Across a block's end, where the sequence moves to a larger class."""
    run = spec("a", rank=8)
    trainer = make_trainer(long_base, run, chunk_tokens=512)
    sampler = make_sampler(long_base, {"a": trainer.export_run(run.run_id, ("param",))})
    ids = prompt(3, LONG - 4)
    (result,) = run_all(sampler, [sample("s", ids, "a", max_tokens=8)]).values()
    (sequence,) = result.sequences
    assert len(sequence.tokens) == 8
    tokens = np.concatenate([ids, sequence.tokens])
    whole = Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:].astype(np.int64)})
    (forward,) = run_pass(trainer, [item("a", [whole], backward=False)])
    np.testing.assert_allclose(sequence.logprobs, forward.logprobs[0][-8:], atol=1e-5)


@pytest.fixture(scope="module")
def peaks_by_mode(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    script = [sys.executable, "-m", "tests.numerics.long_memory", str(tmp_path_factory.mktemp("memory"))]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return {mode: list(map(int, peaks)) for mode, *peaks in map(str.split, run.stdout.splitlines())}


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read as Linux shows them")
@pytest.mark.parametrize("mode", MODES)
def test_memory_is_linear_in_the_length(peaks_by_mode: dict[str, list[int]], mode: str) -> None:
    """One square of 8k tokens would be 64 MiB with a byte an entry, and 256 MiB in float32; the logits of 8k tokens
    over 32,001 words would be 1,000 MiB."""
    start, *peaks = peaks_by_mode[mode]
    taken = [peak - start for peak in peaks]
    a_token = taken[-1] / LENGTHS[-1]
    print(f"{mode}: {[round(one / MIB, 1) for one in taken]} MiB, {a_token:.0f} bytes a token")
    assert taken[-1] < 64 * MIB
    for shorter, longer in itertools.pairwise(taken):
        assert longer < 2.2 * shorter + 8 * MIB
