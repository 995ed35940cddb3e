"""LongRoPE: one set of frequencies for all sequences of a server, chosen by the longest that it takes."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs
from transformers import Phi3Config, Phi3ForCausalLM, PhimoeConfig
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

from tests.families.configs import COMMON, LONGROPE, PHI4_MINI, VOCAB
from tests.numerics.lab import assert_same_bits, grads, item, make_trainer, run_pass, spec
from tests.numerics.sampling_lab import make_sampler, prompt, run_all, sample
from tinsmith.bases.catalog import BaseRef, describe
from tinsmith.errors import UnsupportedError
from tinsmith.model import BaseModel, load_base, load_model
from tinsmith.model.longrope import settle_longrope
from tinsmith.types import Datum

FIRST = 48  # the length that the model was first trained at
BOUND = 1e-5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("phi")
    torch.manual_seed(7)
    rope = {**LONGROPE, "rope_type": "longrope"}
    config = Phi3Config(**{**PHI4_MINI, "original_max_position_embeddings": FIRST}, rope_parameters=rope)
    Phi3ForCausalLM(config).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


def opened(directory: Path, max_context: int, *, deterministic: bool = False) -> BaseModel:
    info = describe(BaseRef("phi", directory), max_context=max_context)
    return load_base(info, device=CPU, dtype=torch.float32, deterministic=deterministic)


def plain(directory: Path, *, only_long: bool = False) -> Any:
    """transformers' own, in float64; or one that has the long factors for short sequences too."""
    config = Phi3Config.from_pretrained(directory)
    if only_long:
        rope = deepcopy(config.rope_parameters)
        config.rope_parameters = {**rope, "short_factor": rope["long_factor"]}
    return Phi3ForCausalLM.from_pretrained(
        directory, config=config, dtype=torch.float64, attn_implementation="eager"
    ).eval()


def plain_logprobs(model: Any, tokens: Any) -> Any:
    """Of each token after the first."""
    tokens_T = torch.from_numpy(np.asarray(tokens, np.int64))
    with torch.no_grad():
        logits_TV = model(input_ids=tokens_T[None]).logits[0, :-1].log_softmax(-1)
    return logits_TV.gather(1, tokens_T[1:, None])[:, 0].numpy()


def datum_of(tokens: Any) -> Datum:
    tokens = np.asarray(tokens)
    weights = np.ones(len(tokens) - 1, np.float32)
    return Datum(tokens[:-1].astype(np.int32), {"target_tokens": tokens[1:].astype(np.int64), "weights": weights})


def trained_logprobs(base: BaseModel, sequences: list[Any]) -> list[Any]:
    trainer = make_trainer(base, deterministic=False)
    trainer.create_run(spec("a"))  # its B is zero
    (result,) = run_pass(trainer, [item("a", [datum_of(tokens) for tokens in sequences], backward=False)])
    return result.logprobs


def test_the_longest_sequence_of_a_server_is_the_models_or_less(directory: Path) -> None:
    found = [describe(BaseRef("phi", directory), max_context=most).max_context for most in (0, FIRST, 100_000)]
    assert found == [COMMON["max_position_embeddings"], FIRST, COMMON["max_position_embeddings"]]


def test_on_a_server_of_short_sequences_each_is_as_in_transformers(directory: Path) -> None:
    sequences = [prompt(seed, length, VOCAB) for seed, length in enumerate((5, FIRST // 2, FIRST))]
    for tokens, ours in zip(sequences, trained_logprobs(opened(directory, FIRST), sequences), strict=True):
        np.testing.assert_allclose(ours, plain_logprobs(plain(directory), tokens), rtol=0, atol=BOUND)


def test_on_a_server_of_long_sequences_all_have_the_long_factors(directory: Path) -> None:
    """A long one beside short ones: as in transformers by itself; the short ones as if their factors were the long."""
    sequences = [prompt(seed, length, VOCAB) for seed, length in enumerate((5, FIRST, FIRST + 2, 120))]
    short, first, crossing, long = trained_logprobs(opened(directory, 0), sequences)
    for ours, tokens in ((crossing, sequences[2]), (long, sequences[3])):
        np.testing.assert_allclose(ours, plain_logprobs(plain(directory), tokens), rtol=0, atol=BOUND)
    only_long = plain(directory, only_long=True)
    for ours, tokens in ((short, sequences[0]), (first, sequences[1])):
        np.testing.assert_allclose(ours, plain_logprobs(only_long, tokens), rtol=0, atol=BOUND)
        assert np.abs(ours - plain_logprobs(plain(directory), tokens)).max() > 100 * BOUND


@pytest.mark.parametrize("max_tokens", [12, 90], ids=["stays", "crosses"])
def test_what_is_sampled_has_the_trainers_logprobs_on_both_sides(directory: Path, max_tokens: int) -> None:
    """From a prompt shorter than the first length, and decoded beyond it."""
    base = opened(directory, 0)
    request = sample("r", prompt(3, 20, VOCAB), max_tokens=max_tokens, prompt_logprobs=True)
    result = run_all(make_sampler(base), [request])["r"]
    tokens = np.concatenate([request.prompt, result.sequences[0].tokens])
    assert (len(tokens) > FIRST) == (max_tokens == 90)
    ours = np.concatenate([result.prompt_logprobs[1:], result.sequences[0].logprobs])
    np.testing.assert_allclose(ours, trained_logprobs(base, [tokens])[0], rtol=0, atol=BOUND)
    reference = plain(directory, only_long=max_tokens == 12)
    np.testing.assert_allclose(ours, plain_logprobs(reference, tokens), rtol=0, atol=BOUND)


def test_a_short_sequence_beside_a_long_one_has_the_bits_of_one_alone(directory: Path) -> None:
    base = opened(directory, 0, deterministic=True)
    short, long = (
        item(run, [datum_of(prompt(n, length, VOCAB))]) for n, (run, length) in enumerate([("a", 30), ("b", 150)])
    )
    together, alone = make_trainer(base, spec("a"), spec("b", seed=2)), make_trainer(base, spec("a"))
    ours, theirs = run_pass(together, [short, long])[0], run_pass(alone, [short])[0]
    assert_same_bits({"logprobs": ours.logprobs[0]}, {"logprobs": theirs.logprobs[0]})
    assert_same_bits(grads(together, "a"), grads(alone, "a"))


def test_the_plain_model_of_full_runs_has_the_same_factors(directory: Path) -> None:
    tokens = prompt(1, 30, VOCAB)
    for max_context, only_long in ((FIRST, False), (0, True)):
        model = load_model(describe(BaseRef("phi", directory), max_context=max_context), CPU, torch.float64)
        ours, theirs = plain_logprobs(model, tokens), plain_logprobs(plain(directory, only_long=only_long), tokens)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-9)


def test_an_embedding_that_changes_more_than_frequencies_is_refused_beyond_the_first_length() -> None:
    """Phi-3.5-MoE's has a factor of its own for long sequences, which it chooses at each call."""
    rope = {**LONGROPE, "rope_type": "longrope", "short_mscale": 1.2, "long_mscale": 1.3}
    rope["original_max_position_embeddings"] = FIRST
    rope |= {name: [1.0, *factors, 3.0] for name, factors in LONGROPE.items()}
    config = PhimoeConfig(**COMMON, rope_parameters=rope)
    module = torch.nn.ModuleDict({"rotary": PhimoeRotaryEmbedding(config)})
    with pytest.raises(UnsupportedError, match=f"rotary changes more .*--max-context-tokens {FIRST}"):
        settle_longrope(module, FIRST + 1)
    settle_longrope(torch.nn.ModuleDict({"rotary": PhimoeRotaryEmbedding(config)}), FIRST)


def test_the_log_says_which_factors_short_sequences_get(directory: Path) -> None:
    for max_context, lines in ((FIRST, 0), (FIRST + 1, 1)):
        with capture_logs() as said:
            opened(directory, max_context)
        assert len([line for line in said if f"--max-context-tokens {FIRST}" in line["event"]]) == lines
