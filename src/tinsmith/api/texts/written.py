"""One sampled sequence on its way to text: tokens come in pieces, text goes out that will not change any more.

Held back is what may still turn out otherwise: half a character, and what may be the beginning of a stop string. What
goes out in pieces is, put together, what comes out of the whole at once. The end token and the stop string are no part
of the text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

from tinsmith.bases.tokenizer import REPLACEMENT, ChatTokenizer
from tinsmith.errors import TinsmithError
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
        self._searches = [Search(stop) for stop in self._stops]
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
            sure = len(self._text) - max((search.num_begun for search in self._searches), default=0)
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
            new = after[len(before) :]
            self._text += new
            for search in self._searches:
                search.read(new)
            self._num_read = len(self._tokens)

    def _decode(self, tokens: Sequence[int]) -> str:
        shown = [token for token in tokens if token not in self._end_tokens]
        return self._tokenizer.decode(shown, skip_special_tokens=not self._keeps_special)

    def _cut(self) -> int | None:
        """Where the first stop string begins."""
        return min((search.found_at for search in self._searches if search.found_at is not None), default=None)

    def _send(self, end: int) -> str:
        text = self._text[self._num_sent : end]
        self._num_sent = max(self._num_sent, end)
        return text


class Search:
    """Looks for the first place of a string in a text that comes in pieces, in time linear in the new piece (Knuth,
    Morris, Pratt: Fast pattern matching in strings, 1977).

    found_at: where it begins. num_begun: characters at the end of the text that the string may begin with.
    """

    def __init__(self, string: str) -> None:
        self._string = string
        self._num_before = 0
        self.found_at: int | None = None
        self.num_begun = 0

    def read(self, piece: str) -> None:
        if self.found_at is not None:
            return
        string, begun = self._string, self.num_begun
        start = 0 if begun else piece.find(string[0])
        if start >= 0:
            borders = _borders(string)
            for at in range(start, len(piece)):
                while begun and piece[at] != string[begun]:
                    begun = borders[begun - 1]
                begun += piece[at] == string[begun]
                if begun == len(string):
                    self.found_at = self._num_before + at + 1 - begun
                    break
        self.num_begun = 0 if self.found_at is not None else begun
        self._num_before += len(piece)


@lru_cache(maxsize=4096)
def _borders(string: str) -> tuple[int, ...]:
    """Of each beginning of the string: the length of its longest end, but itself, that the string begins with."""
    borders = [0] * len(string)
    length = 0
    for i in range(1, len(string)):
        while length and string[i] != string[length]:
            length = borders[length - 1]
        length += string[i] == string[length]
        borders[i] = length
    return tuple(borders)
