"""Which tokens a sequence may go on with so that its text stays within a JSON schema."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

from tinsmith.jsonform import json_grammar
from tinsmith.types import BaseInfo


class Matcher:
    """The state of one sequence."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> npt.NDArray[np.bool_]:
        """[V], all false once the matcher gave up. End tokens are allowed where the text may end."""
        if self._matcher.is_error():
            return np.zeros(self._vocab_size, np.bool_)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(np.bool_)

    def accept(self, token: int) -> bool:
        """The sequence went on with this token. False if that isn't within the schema, or the schema is too complex."""
        return bool(self._matcher.consume_token(token))


class Grammars:
    """The schemas of one base model's requests."""

    def __init__(self, info: BaseInfo) -> None:
        self._info = info
        self._tokenizer: LLTokenizer | None = None

    def matcher(self, schema: str) -> Matcher:
        """A sequence at its beginning. The first one costs the reading of the tokenizer.

        Raises:
            UserError: the schema can't be held to.
        """
        grammar = json_grammar(schema)
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                str(Path(self._info.path) / "tokenizer.json"),
                n_vocab=self._info.vocab_size,
                eos_token=list(self._info.eos_tokens),
            )
        return Matcher(LLMatcher(self._tokenizer, grammar, log_level=0), self._info.vocab_size)
