"""JSON schemas as grammars that an answer can be held to, by the llguidance library. Knows no tokens.

Answers are written as Python's `json` writes them (one space after commas and colons, none elsewhere), so that no model
can go on with white space forever.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher

from tinsmith.errors import UnsupportedError, UserError

MAX_SCHEMA_BYTES = 1 << 16
LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
OPTIONS = "x-guidance"  # where a schema could ask the library to overlook what it doesn't know


@lru_cache(maxsize=64)
def json_grammar(schema: str) -> str:
    """The grammar of a JSON schema, for `LLMatcher`; checked, which may take a second of a large one's first time.

    Raises:
        UserError: it is no JSON object, or too large.
        UnsupportedError: it is no JSON schema, or has keywords that can't be held to; the message names them.
    """
    grammar = grammar_of(schema)
    problem = LLMatcher.validate_grammar(grammar)
    if problem:
        raise refusal(problem)
    return grammar


def grammar_of(schema: str) -> str:
    """The grammar, with its keywords not checked yet: whoever compiles it is told.

    Raises:
        UserError: it is no JSON object, or too large.
    """
    if len(schema) > MAX_SCHEMA_BYTES:
        raise UserError(
            f"json_schema has {len(schema)} characters, at most {MAX_SCHEMA_BYTES} are allowed: simplify it"
        )
    try:
        is_object = isinstance(json.loads(schema, object_pairs_hook=_without_options), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise UserError("json_schema must be a JSON schema, an object")
    try:
        grammar: str = LLMatcher.grammar_from_json_schema(schema, overrides=LAYOUT)
    except ValueError as error:  # what Python reads as JSON and the library doesn't: NaN, half a surrogate pair
        raise UserError(f"json_schema is no JSON ({str(error)[:300]}): write it anew") from None
    return grammar


def _without_options(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Any object of the schema, whatever its keys are written with and how often they come.

    Raises:
        UnsupportedError: options of the library.
    """
    if any(key == OPTIONS for key, _ in pairs):
        raise UnsupportedError(f"json_schema: {OPTIONS} is not offered here, every keyword is held to: leave it out")
    return dict(pairs)


def refusal(problem: str) -> UnsupportedError:
    return UnsupportedError(f"json_schema can't be held to ({problem[:300]}): leave that out")
