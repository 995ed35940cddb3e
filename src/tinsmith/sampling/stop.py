"""When a sequence ends by itself: at a stop token, or once its text holds a stop string.

Knows token ids and text, nothing of tensors. Text is looked at after every token, so the token that completes a stop
string is the last one, whether the string lies inside one token or spans several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tinsmith.types import SamplingParams

MARGIN_TOKENS = 8  # tokens decoded beyond what the longest string needs, so that its left edge is clean text


class Detokenizer(Protocol):
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True, slots=True)
class StopRule:
    """tokens: ids that end a sequence. strings: non-empty texts that do."""

    tokens: frozenset[int]
    strings: tuple[str, ...]
    detokenizer: Detokenizer

    @classmethod
    def of(cls, params: SamplingParams, eos_tokens: Sequence[int], detokenizer: Detokenizer) -> StopRule:
        """The rule of a request: its own stop tokens, or the model's end tokens where it names none."""
        chosen = eos_tokens if params.stop_tokens is None else params.stop_tokens
        return cls(frozenset(chosen), params.stop_strings, detokenizer)

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether the last of the sampled `tokens` ends the sequence; it did not end at an earlier one."""
        if tokens[-1] in self.tokens:
            return True
        return bool(self.strings) and self._has_string(tokens)

    def _has_string(self, tokens: Sequence[int]) -> bool:
        """Looks at the tail alone: a string that ends in the last token begins at most its own length before it."""
        longest = max(len(text) for text in self.strings)
        size = longest + MARGIN_TOKENS + 1
        while size < len(tokens) and len(self.detokenizer.decode(tokens[-size:-1])) < longest + MARGIN_TOKENS:
            size *= 2
        tail = self.detokenizer.decode(tokens[-size:])
        return any(text in tail for text in self.strings)
