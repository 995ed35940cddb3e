"""Which JSON schemas an answer can be held to."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
import pytest

from tinsmith.bases.catalog import SHIPPED_NAME, SHIPPED_PATH, BaseRef, describe
from tinsmith.bases.tokenizer import ChatTokenizer
from tinsmith.errors import UnsupportedError, UserError
from tinsmith.sampling.grammar import Grammar, Grammars, Matcher
from tinsmith.validate.jsonform import MAX_SCHEMA_BYTES, json_grammar

INFO = describe(BaseRef(SHIPPED_NAME, SHIPPED_PATH))
TOKENIZER = ChatTokenizer.from_dir(SHIPPED_PATH)
ANIMAL = {
    "type": "object",
    "properties": {"name": {"enum": ["fox", "bear"]}, "legs": {"type": "integer"}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"not": {"type": "string"}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "nope"}, "nope"),
        ({"type": "string", "format": "weird"}, "weird"),
        ({"$ref": "http://127.0.0.1:1/schema"}, "not present"),
    ],
)
def test_schemas_that_can_not_be_held_to(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        json_grammar(json.dumps(schema))


@pytest.mark.parametrize("text", ["", "[]", "{", "1", " " * (MAX_SCHEMA_BYTES + 1), "[" * 60_000])
def test_what_is_no_schema(text: str) -> None:
    with pytest.raises(UserError):
        json_grammar(text)


@pytest.mark.parametrize("key", ["x-guidance", r"\u0078-guidance", r"x\u002dguidance"])
@pytest.mark.parametrize(
    "schema",
    [
        '{"type": "string", "format": "weird", "%s": {"lenient": true}}',
        '{"type": "object", "properties": {"a": {"%s": {"lenient": true}, "format": "weird"}}}',
        '{"anyOf": [{"type": "string", "%s": {"lenient": true}}]}',
        '{"%s": {"lenient": true}, "x-guidance ": 1, "a": {}, "a": 1}',
    ],
)
def test_no_schema_makes_the_library_lenient(schema: str, key: str) -> None:
    with pytest.raises(UnsupportedError, match="x-guidance is not offered"):
        json_grammar(schema % key)


def test_a_text_may_speak_of_options() -> None:
    assert json_grammar('{"enum": ["x-guidance"], "description": "x-guidance"}')


def test_wild_schemas_take_no_time() -> None:
    wild = [
        {"type": "string", "pattern": "(a+)+$"},
        {"type": "array", "items": {}, "maxItems": 10**9},
        {"type": "string", "minLength": 10**6},
        {"anyOf": [{"type": "string", "pattern": f"^({'a|' * i}b)*$"} for i in range(200)]},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    ]
    for schema in wild:
        started = time.monotonic()
        try:
            json_grammar(json.dumps(schema))
        except UserError:
            continue
        finally:
            assert time.monotonic() - started < 1


def matcher_of(schema: Any) -> Matcher:
    grammars = Grammars(INFO)
    while (found := grammars.find(json.dumps(schema), "somebody")) is None:
        grammars.wait(1)
    assert isinstance(found, Grammar)
    return found.matcher()


def test_a_matcher_allows_what_the_schema_allows() -> None:
    matcher = matcher_of(ANIMAL)
    for token in TOKENIZER.encode('{"name": "fox", "legs": 4}'):
        allowed = matcher.allowed()
        assert allowed.shape == (INFO.vocab_size,)
        assert allowed[token]
        assert not allowed[list(INFO.eos_tokens)].any()
        assert matcher.accept(token)
    assert np.flatnonzero(matcher.allowed()).tolist() == sorted(INFO.eos_tokens)


def test_a_matcher_that_was_led_astray_allows_nothing() -> None:
    matcher = matcher_of(ANIMAL)
    assert not matcher.accept(TOKENIZER.encode("x")[0])
    assert not matcher.allowed().any()


def test_tenants_take_turns_at_having_schemas_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crowd of one tenant's costs another the one that is under way; what nobody waits for isn't compiled."""
    compiled: list[str] = []
    may_go_on = threading.Event()

    def compile_one(_: Grammars, schema: str) -> UserError:
        assert may_go_on.wait(10)
        compiled.append(schema)
        return UserError(schema)

    monkeypatch.setattr(Grammars, "_compile", compile_one)
    grammars = Grammars(INFO)
    crowd = [f"a{i}" for i in range(5)]
    for schema in crowd:
        grammars.find(schema, "alice")
    assert grammars.find("b", "bob") is None
    grammars.forget("a4", "alice")
    may_go_on.set()
    wanted = [*((schema, "alice") for schema in crowd[:4]), ("b", "bob")]
    while any(grammars.find(*one) is None for one in wanted):
        grammars.wait(1)
    assert sorted(compiled) == ["a0", "a1", "a2", "a3", "b"]
    assert compiled.index("b") <= 2
    assert grammars.find("b", "alice") is grammars.find("b", "bob")
