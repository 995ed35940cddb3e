"""Full fine-tuning of families whose layers are not plain ones: torch.optim.AdamW on the plain model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.families.gallery import seeing, with_pictures
from tests.families.twin import plain_model
from tests.numerics.full_lab import make_pair, publish, run_all
from tests.numerics.lab import datum, grads, item, make_trainer, relative, run_pass, spec
from tests.numerics.sampling_lab import sample
from tests.numerics.test_full import FULL, backward, step
from tinsmith.errors import UnsupportedError
from tinsmith.types import AdamParams, Failure, RunId

BOUND = 1e-5
NEIGHBOUR = replace(spec("b", 4), seed=2)


@pytest.mark.parametrize(
    "kind", ["gemma2", "qwen3_moe", "gpt_oss", "deepseek_v3", "llama4", "qwen3_next", "qwen3_vl", "gemma3_vl"]
)
def test_two_steps_are_those_of_adamw_on_the_plain_model(make_base, kind: str) -> None:
    """With decay and clipping, beside an adapter. Weights that words don't reach, a tower's, stay as they are."""
    base = make_base(kind)
    trainer, model = make_trainer(base, NEIGHBOUR, deterministic=False), plain_model(base)
    trainer.create_run(FULL)
    params = AdamParams(learning_rate=1e-3, beta1=0.8, beta2=0.99, eps=1e-5, weight_decay=0.1, grad_clip_norm=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.99), eps=1e-5, weight_decay=0.1)
    before = {name: weight.detach().numpy().astype(np.float32) for name, weight in model.named_parameters()}
    rng = np.random.default_rng(4)
    for _ in range(2):
        data = [datum(rng, length) for length in (20, 33)]
        optimizer.zero_grad()
        expected = backward(model, data)
        (result, _) = run_pass(trainer, [item("f", data), item("b", [datum(rng, 9)])], max_tokens=30)
        for ours, theirs in zip(result.logprobs, expected, strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=BOUND)
        own = grads(trainer, "f")
        for name, weight in model.named_parameters():
            if weight.grad is None:
                assert not own[f"grad/{name}"].any(), name
            else:
                assert relative(own[f"grad/{name}"], weight.grad) < BOUND, name
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        step(trainer, params)
    assert any(weight.grad is None for weight in model.parameters()) == (base.eyes is not None)
    after = trainer.export_run(RunId("f"), ("param",)).tensors
    assert after.keys() == {f"param/{name}" for name in before}
    for name, weight in model.named_parameters():
        assert relative(after[f"param/{name}"], weight) < BOUND, name
        is_still = np.array_equal(after[f"param/{name}"], before[name])
        assert is_still == (weight.grad is None), name


def test_pictures_are_refused_where_the_base_sees(make_base) -> None:
    """In training and in sampling, each with the cure; words go on, and so does the base's own sight."""
    base = make_base("qwen3_vl")
    seen = seeing(base, 3)
    assert seen.pictures
    trainer, samplers = make_pair(base)
    trainer.create_run(NEIGHBOUR)
    failed, done = run_pass(trainer, [item("f", [seen], backward=False), item("b", [seen], backward=False)])
    assert isinstance(failed, Failure)
    assert (failed.code, failed.category) == ("unsupported", "user")
    assert "datum 0: " in failed.message
    assert "create the run with a rank of 1 or more" in failed.message
    assert not isinstance(done, Failure)
    publish(trainer, samplers, "s")
    with pytest.raises(UnsupportedError, match="create the run with a rank of 1 or more"):
        samplers.submit(with_pictures(sample("a", seen.tokens, "s", max_tokens=3), seen.pictures))
    assert samplers.num_samples == 0
    assert run_all(samplers, sample("a", [1, 2], "s", max_tokens=3))["a"].sequences
