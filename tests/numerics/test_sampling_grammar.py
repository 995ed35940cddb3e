"""Samples held to a JSON schema: the text fits, the numbers are the model's own, neighbours notice nothing."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

from tinsmith.bases.catalog import SHIPPED_NAME, SHIPPED_PATH, BaseRef, describe
from tinsmith.bases.tokenizer import ChatTokenizer
from tinsmith.config import Settings
from tinsmith.sampling.grammar import Grammars
from tinsmith.torch_engine import TorchEngine
from tinsmith.types import Failure, OpId, SampleItem, SampleResult, SamplingParams

TOKENIZER = ChatTokenizer.from_dir(SHIPPED_PATH)
PROMPT = TOKENIZER.encode(TOKENIZER.render([{"role": "user", "content": "Tell me a story about a fox."}]))
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"enum": ["fox", "bear"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "legs"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return TorchEngine(describe(BaseRef(SHIPPED_NAME, SHIPPED_PATH)), Settings())


def item(name: str, prompt: list[int] = PROMPT, num_samples: int = 1, **params: object) -> SampleItem:
    given = SamplingParams(**{"max_tokens": 60, **params})
    return SampleItem(OpId(name), None, np.array(prompt, np.int32), given, num_samples, seed=5, prompt_logprobs=True)


def run(engine: TorchEngine, *items: SampleItem, left: int = 0) -> dict[str, SampleResult | Failure]:
    for each in items:
        engine.submit_sample(each)
    found: dict[str, SampleResult | Failure] = {}
    while engine.num_samples > left:
        found |= dict(engine.step_samples())
    return found


def test_every_sample_fits_the_schema_and_neighbours_are_free(engine: TorchEngine) -> None:
    held = item("held", num_samples=6, json_schema=SCHEMA, temperature=1.5)
    together = run(engine, item("free", num_samples=3), held, item("greedy", json_schema=SCHEMA, temperature=0))
    for name in ("held", "greedy"):
        for sequence in together[name].sequences:
            assert sequence.stopped
            animal = json.loads(TOKENIZER.decode(sequence.tokens.tolist(), skip_special_tokens=True))
            assert animal["name"] in ("fox", "bear")
            assert 0 <= animal["legs"] <= 99
    for name, alone in (("held", held), ("free", item("free", num_samples=3))):
        lonely = run(engine, alone)[name]
        for one, other in zip(lonely.sequences, together[name].sequences, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.logprobs, other.logprobs)


def test_logprobs_are_those_of_the_model(engine: TorchEngine) -> None:
    sequence = run(engine, item("held", json_schema=SCHEMA))["held"].sequences[0]
    whole = [*PROMPT, *sequence.tokens.tolist()]
    prompt_logprobs = run(engine, item("again", whole, max_tokens=1))["again"].prompt_logprobs
    np.testing.assert_allclose(sequence.logprobs, prompt_logprobs[len(PROMPT) :], atol=1e-5)
    assert sequence.logprobs.min() < -3


def test_a_bad_schema_fails_alone(engine: TorchEngine) -> None:
    found = run(engine, item("bad", json_schema='{"uniqueItems": true}'), item("free"))
    assert isinstance(found["bad"], Failure)
    assert "uniqueItems" in found["bad"].message
    assert isinstance(found["free"], SampleResult)


def test_a_schema_that_upsets_the_compiler_fails_alone(engine: TorchEngine) -> None:
    found = run(engine, item("bad", json_schema='{"enum": [NaN]}'), item("free"))
    assert isinstance(found["bad"], Failure)
    assert isinstance(found["free"], SampleResult)


def test_a_schema_is_compiled_once_beside_the_steps(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it takes its time, others are sampled; its own samples are what they would have been."""
    num_compiled = 0
    may_go_on = threading.Event()
    compiling = Grammars._compile

    def slow(self: Grammars, schema: str) -> object:
        nonlocal num_compiled
        num_compiled += 1
        assert may_go_on.wait(60)
        return compiling(self, schema)

    expected = run(engine, item("held", num_samples=3, json_schema=SCHEMA))["held"]
    monkeypatch.setattr(Grammars, "_compile", slow)
    engine._sampler._grammars._kept.clear()
    engine.submit_sample(item("held", num_samples=3, json_schema=SCHEMA))
    engine.submit_sample(item("twin", num_samples=40, max_tokens=2, json_schema=SCHEMA))
    engine.submit_sample(item("gone", json_schema='{"type": "array"}'))
    assert list(run(engine, item("free"), left=3)) == ["free"]
    engine.cancel_sample(OpId("gone"))
    may_go_on.set()
    together = run(engine)
    assert num_compiled == 1
    for one, other in zip(expected.sequences, together["held"].sequences, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_an_answer_that_can_not_be_held_fails_alone(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinsmith.sampling.grammar.Matcher.accept", lambda *_: False)
    found = run(engine, item("held", json_schema=SCHEMA, num_samples=2), item("free"))
    failure = found["held"]
    assert isinstance(failure, Failure)
    assert (failure.code, failure.category) == ("unsupported", "user")
    assert isinstance(found["free"], SampleResult)
