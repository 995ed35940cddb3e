"""One sampled sequence on its way to text: tokens come in pieces, text goes out that will not change any more.

Held back is what may still turn out otherwise: half a character, and what may be the beginning of a stop string. What
goes out in pieces is, put together, what comes out of the whole at once. The end token and the stop string are no part
of the text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tinsmith.errors import TinsmithError
from tinsmith.tokenizer import REPLACEMENT, ChatTokenizer
from tinsmith.types import SampledSequence

MAX_OVERLAP = 8  # tokens decoded again to the left of new ones, so that spaces and characters join as in the whole


class ContradictionError(TinsmithError):
    """The recorded result isn't what was sent of it already."""


@dataclass(frozen=True, slots=True)
class Ending:
    """text: what was still held back. stop_string: the one that ended it. is_whole: it didn't end at max_tokens."""

    text: str
    is_whole: bool
    stop_string: str | None


class Written:
    def __init__(
        self,
        tokenizer: ChatTokenizer,
        end_tokens: Collection[int],
        stops: Sequence[str],
        *,
        keeps_special: bool = False,
    ) -> None:
        """keeps_special: special tokens show in the text (marks of tool calls may be some); else they are left out."""
        self._tokenizer = tokenizer
        self._keeps_special = keeps_special
        self._end_tokens = frozenset(end_tokens)
        self._stops = tuple(stops)
        self._tokens: list[int] = []
        self._num_read = 0  # tokens whose text is in `_text`
        self._text = ""  # decoded for good
        self._num_sent = 0  # characters of it that went out

    def add(self, tokens: Sequence[int]) -> str:
        """New tokens; the text that is certain by now."""
        self._tokens += [int(token) for token in tokens]
        self._read()
        sure = self._cut()
        if sure is None:
            sure = len(self._text) - max((_held(self._text, stop) for stop in self._stops), default=0)
        return self._send(sure)

    def end(self, sequence: SampledSequence) -> Ending:
        """The sequence is complete, and this is all of it.

        Raises:
            ContradictionError: it doesn't begin with what was added before.
        """
        tokens = [int(token) for token in sequence.tokens]
        if tokens[: len(self._tokens)] != self._tokens:
            raise ContradictionError("the answer was made anew and came out otherwise: send the request again")
        self._tokens = tokens
        ends_itself = sequence.stopped and tokens[-1] in self._end_tokens
        self._read(is_last=True)
        cut = None if ends_itself or not sequence.stopped else self._cut()
        stop = None
        if sequence.stopped and not ends_itself:
            whole = self._tokenizer.decode(tokens)
            found = [(whole.find(text), text) for text in self._stops if text in whole]
            stop = min(found)[1] if found else None
        return Ending(self._send(len(self._text) if cut is None else cut), sequence.stopped, stop)

    def _read(self, *, is_last: bool = False) -> None:
        """Decode what is new, with some tokens before it, as decoding is no sum of its parts."""
        start = max(0, self._num_read - MAX_OVERLAP)
        before = self._decode(self._tokens[start : self._num_read])
        after = self._decode(self._tokens[start:])
        if is_last or not after.endswith(REPLACEMENT):
            self._text += after[len(before) :]
            self._num_read = len(self._tokens)

    def _decode(self, tokens: Sequence[int]) -> str:
        shown = [token for token in tokens if token not in self._end_tokens]
        return self._tokenizer.decode(shown, skip_special_tokens=not self._keeps_special)

    def _cut(self) -> int | None:
        """Where the first stop string begins."""
        found = [at for at in (self._text.find(stop) for stop in self._stops) if at >= 0]
        return min(found, default=None)

    def _send(self, end: int) -> str:
        text = self._text[self._num_sent : end]
        self._num_sent = max(self._num_sent, end)
        return text


def _held(text: str, stop: str) -> int:
    """Characters at the end of the text that a stop string may begin with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
