"""`--expert-adapters own`: an expert's factors are its own on both sides, in training, sampling and on the way out."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from tests.families.test_battery import data_of, write_adapter
from tests.families.test_whole import farthest
from tests.families.twin import MergedTwin, plain_model
from tests.numerics.lab import assert_same_bits, datum, grads, item, make_trainer, reader_of, relative, run_pass, spec
from tests.numerics.sampling_lab import make_sampler, run_all, sample
from tinsmith.bases.catalog import text_model_type, weight_shapes
from tinsmith.export.adapter import read_adapter
from tinsmith.export.merge import merge
from tinsmith.export.peft_files import BaseShapes, write_peft
from tinsmith.training import Trainer
from tinsmith.types import Datum, RunId

BOUND = 1e-5
# experts one by one in the files, under both kinds of names, and all of a layer in one tensor, either way round; beside
# experts that all tokens share, layers without experts, and a router that scores each expert by itself
KINDS = ("qwen3_moe", "mixtral", "llama4", "deepseek_v3", "qwen2_moe", "gpt_oss")


@pytest.mark.parametrize(("kind", "deterministic"), [*((kind, False) for kind in KINDS), ("gpt_oss", True)])
def test_gradients_and_samples(make_base, kind: str, deterministic: bool) -> None:
    """Against autograd on merged weights, in the sampler, and to the bit however a pass is cut."""
    base = make_base(kind, deterministic=deterministic, shares_factors=False)
    run, other = spec("a", 4), spec("b", 8, seed=2)
    rng = np.random.default_rng(10)
    data = [datum(rng, length) for length in (9, 33, 20)]
    trainer = make_trainer(base, run, other, deterministic=deterministic)
    (result, _) = run_pass(trainer, [item("a", data), item("b", [datum(rng, 30)])], 40)
    state = trainer.export_run(run.run_id)
    assert_each_expert_has_its_own(trainer)
    twin = MergedTwin(base, state)
    _, logprobs = twin.backward(data)
    for ours, theirs in zip(result.logprobs, logprobs, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=BOUND)
    found = grads(trainer, "a")
    assert max(relative(found[f"grad/{name}"], p.grad) for name, p in twin.params.items()) < BOUND
    if deterministic:
        alone = make_trainer(base, run)
        run_pass(alone, [item("a", data)])
        assert_same_bits(found, grads(alone, "a"))
    request = sample("r", data[1].tokens, "a", max_tokens=1, prompt_logprobs=True)
    (sampled,) = run_all(make_sampler(base, {"a": state}, deterministic=deterministic), [request]).values()
    whole = Datum(data[1].tokens[:-1], {"target_tokens": data[1].tokens[1:].astype(np.int64)})
    (forward,) = run_pass(trainer, [item("a", [whole], backward=False)])
    np.testing.assert_allclose(sampled.prompt_logprobs[1:], forward.logprobs[0], rtol=0, atol=BOUND)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_in_peft_the_numbers_are_the_trainers(make_base, kind: str, tmp_path: Path) -> None:
    base = make_base(kind, shares_factors=False)
    trainer = make_trainer(base, spec("a", 8), deterministic=False)
    (result,) = run_pass(trainer, [item("a", data_of(1), backward=False)])
    assert_each_expert_has_its_own(trainer)
    own, out, path = tmp_path / "own", tmp_path / "peft", Path(base.info.path)
    own.mkdir()
    out.mkdir()
    write_adapter(base, trainer, own)
    merge(path, read_adapter(own), tmp_path / "merged")
    merged, report = reader_of(base).from_pretrained(
        tmp_path / "merged", dtype=torch.float64, attn_implementation="eager", experts_implementation="eager",
        output_loading_info=True,
    )  # fmt: skip
    assert not report["missing_keys"] | report["unexpected_keys"]
    assert farthest(merged, result.logprobs) < BOUND

    write_peft(read_adapter(own), out, BaseShapes(weight_shapes(path), text_model_type(path)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")  # peft looks at modules
        model = PeftModel.from_pretrained(plain_model(base), out).double().eval()
    assert farthest(model, result.logprobs) < BOUND


def assert_each_expert_has_its_own(trainer: Trainer) -> None:
    """Both factors of the run "a", and no two of a layer alike."""
    tensors = trainer.export_run(RunId("a")).tensors
    experts = {name: tensor for name, tensor in tensors.items() if ".experts.w" in name and name.startswith("param/")}
    assert experts
    for name, tensor in experts.items():
        assert tensor.ndim == 3, name
        assert len(np.unique(tensor.reshape(len(tensor), -1), axis=0)) == len(tensor) > 1, name
